#!/usr/bin/env bash
# Makes .venv-tools: the pinned stub generator and buf. Apart from .venv, because they need an older protobuf.
set -euo pipefail
cd "$(dirname "$0")/.."
state=$(cat "$0" requirements/tools.txt | cksum)
[ "$(cat .venv-tools/.hotweights-setup 2>/dev/null)" = "$state" ] && exit 0
[ -x .venv-tools/bin/pip ] || "${PYTHON:-python3}" -m venv .venv-tools
.venv-tools/bin/pip install -qq --no-deps -r requirements/tools.txt
printf '%s' "$state" >.venv-tools/.hotweights-setup
