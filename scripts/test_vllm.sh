#!/usr/bin/env bash
# The tests of real engines in VENV, recorded as vLLM VERSION, and the table made anew: test_vllm.sh VENV VERSION [PYTEST ARGS]
#
# With arguments only some tests run: what the record says of the others stays.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1 version=$2
shift 2
add=(); [ $# = 0 ] || add=(--capabilities-add)
status=0
# Those too long for `make test` belong to the table where they show a capability.
"$venv/bin/python" -m pytest -p tests.capabilities --capabilities "docs/vllm_versions/$version.json" "${add[@]}" \
    -m "vllm and (capability or not matrix)" tests/adapters tests/end_to_end "$@" || status=$?
"$venv/bin/python" scripts/vllm_table.py
exit $status
