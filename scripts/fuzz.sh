#!/usr/bin/env bash
# Fuzzes the targets of tests/fuzz, FUZZ_S seconds each (60 unless set), and goes on after a find; 1 if there was one.
#
#   scripts/fuzz.sh [TARGET ...]      all of them unless named
#
# atheris goes into a folder of its own, .venv-fuzz, beside the packages of .venv: nothing else needs it.
# What was learnt stays in .fuzz/TARGET for the next time; an input that lets something out is .fuzz/TARGET-crash-*.
set -uo pipefail
cd "$(dirname "$0")/.."

atheris=3.0.0
python=.venv/bin/python
if [ "$(cat .venv-fuzz/.hotweights-setup 2>/dev/null)" != "$atheris" ]; then
    rm -rf .venv-fuzz
    .venv/bin/pip install -qq --no-deps --target .venv-fuzz "atheris==$atheris" || exit 1
    printf '%s' "$atheris" >.venv-fuzz/.hotweights-setup
fi

# In memory where there is some: the store and the headers' file are written thousands of times.
shm=/dev/shm; [ -w "$shm" ] || shm=${TMPDIR:-/tmp}
TMPDIR=$(mktemp -d "$shm/hotweights-fuzz.XXXXXX") && export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

export PYTHONPATH=.venv-fuzz:. PYTHONDONTWRITEBYTECODE=1
names=${*:-$("$python" -c 'from tests.fuzz.targets import TARGETS; print(*TARGETS)')}
status=0
for name in $names; do
    echo "fuzz: $name, ${FUZZ_S:-60} s"
    mkdir -p .fuzz
    if "$python" -m tests.fuzz.run "$name" "${FUZZ_S:-60}" .fuzz >".fuzz/$name.log" 2>&1; then
        grep -E 'number_of_executed_units|new_units_added' ".fuzz/$name.log" | sed 's/^stat::/    /'
    else
        status=1
        echo "fuzz: $name let something out; see .fuzz/$name.log"
        tail -n 20 ".fuzz/$name.log"
    fi
done
exit $status
