#!/usr/bin/env bash
# Puts the release build into a folder that may be moved anywhere, or made an image of: DIR/bin with the binaries, DIR/lib/cpcr with what they
# load at run time, and its licences. Nothing of Python, no headers.
#   scripts/install.sh DIR
# With the CUDA set (scripts/setup.sh --cuda) all of its libraries go along, with the CPU set those that are linked.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
target=${1:?usage: scripts/install.sh DIR}
libtorch=$(readlink -f -- "${LIBTORCH:-.libtorch}")
set=$(dirname -- "$libtorch")
mkdir -p "$target/bin" "$target/lib/cpcr"
target=$(readlink -f -- "$target")

[ -x target/release/cpcr-engine ] || { echo "install: error: no release build: cargo build --release --locked" >&2; exit 2; }
for binary in cpcr cpcr-launch cpcr-engine; do
    # Debug information is two thirds of them.
    strip --strip-debug -o "$target/bin/$binary" "target/release/$binary"
    chmod 755 "$target/bin/$binary"
done

# Not piped into `grep -q`, which may leave ldd with a broken pipe.
wanted=$(ldd "$libtorch/lib/libtorch_cuda.so" 2>&1 || true)
if [[ $wanted = *"not found"* ]]; then
    files=$(ldd target/release/cpcr-engine | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | xargs -n1 realpath -s | grep "^$set/" || true)
else
    [ ! -f target/release/libcpcr_nccl.so ] || install -m 755 target/release/libcpcr_nccl.so "$target/bin/"
    files=$(find "$set" -type f \( -path '*/torch/lib/*' -o -path '*/nvidia/*/lib/*' \) -name '*.so*' ! -name '*python*')
fi
[ -n "$files" ] || { echo "install: error: the binaries load nothing from $set" >&2; exit 1; }
licences=$(find "$set" -type f \( -name LICENSE -o -name NOTICE -o -iname 'License.txt' \))
cd "$set"
printf '%s\n' "$files" "$licences" | sed "s|^$set/||" | sort -u | while IFS= read -r file; do
    mkdir -p "$target/lib/cpcr/$(dirname -- "$file")"
    cp -L -- "$file" "$target/lib/cpcr/$file"
done
