#!/usr/bin/env bash
# What tests marked `container` need, from the distribution's own packages: mmdebstrap makes a base root, buildah builds
# and runs the Dockerfile in it without a daemon. Without root, or where there is no apt, the tests skip and say so.
set -euo pipefail

have() { command -v "$1" >/dev/null 2>&1; }
have mmdebstrap && have buildah && exit 0
if [ "$(id -u)" != 0 ] || ! have apt-get; then
    echo "container: mmdebstrap and buildah are missing, and only root on a Debian can install them" >&2
    exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap buildah >/dev/null
