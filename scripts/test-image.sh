#!/usr/bin/env bash
# The image without a Docker daemon: a Debian root with the packages of the Dockerfile's last stage (mmdebstrap), what scripts/install.sh puts into it,
# written as an OCI layout (oci/, for `skopeo copy oci:...`); then the pods of k8s/overlays/trial run in that root (scripts/pods.py).
#   scripts/test-image.sh [--keep DIR]     the root and the layout are kept in DIR
# Wants root, mmdebstrap and Debian's packages; says so otherwise. Builds a release of cpcr first.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

skip() { echo "skipped: image: $*" >&2; exit 0; }
keep=
[ "${1:-}" != --keep ] || keep=${2:?--keep wants a folder}
[ "$(id -u)" = 0 ] || skip "wants root"
command -v mmdebstrap >/dev/null || skip "no mmdebstrap here (apt-get install mmdebstrap)"

scripts/setup.sh --quiet
cargo build --release --locked
folder=${keep:-$(mktemp -d)}
[ -n "$keep" ] || trap 'rm -rf -- "$folder"' EXIT
mkdir -p "$folder"
root=$folder/root

# One list of packages and one user: the Dockerfile's.
suite=$(sed -n 's/^FROM debian:\([a-z]*\)-slim AS base$/\1/p' Dockerfile)
packages=$(sed -n '/AS base$/,/^FROM/s/.*--no-install-recommends \([^&]*\) && rm.*/\1/p' Dockerfile | xargs | tr ' ' ,)
user=$(sed -n 's/^USER \([0-9]*\):.*/\1/p' Dockerfile)
if [ -z "$suite" ] || [ -z "$packages" ] || [ -z "$user" ]; then
    echo "test-image: error: the Dockerfile's last stage is not what this script reads" >&2
    exit 1
fi
rm -rf -- "$root"
mmdebstrap --quiet --variant=minbase --include="$packages" "$suite" "$root"
chroot "$root" useradd --uid "$user" --no-create-home --shell /usr/sbin/nologin cpcr
scripts/install.sh "$root/usr/local"
mkdir -p "$root/usr/share/cpcr" && cp -r configs "$root/usr/share/cpcr/"

python=$(scripts/setup.sh --quiet --peers)
"$python" scripts/oci.py "$root" "$folder/oci" --user "$user"
# What the build's own machine has must not be needed: its libtorch is not in there. A program finds its own folder by /proc.
# shellcheck disable=SC2016
unshare --mount --pid --fork sh -c 'mount -t proc proc "$1/proc" && exec chroot --userspec="$2:$2" "$1" /usr/local/bin/cpcr-engine devices' sh "$root" "$user"
"$python" scripts/pods.py --image "$root"
