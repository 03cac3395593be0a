#!/usr/bin/env bash
# Runs test binaries that were built elsewhere on a machine with a GPU, against the PyTorch that is on that machine.
# For machines which can build nothing: no Rust, no network. Build first where you can, on an equal or older glibc:
#   scripts/setup.sh --cuda && cargo test --no-run && cargo build --release
# then copy target/gpu-check (made by `scripts/gpu-check.sh --pack`) and this script over, and run
#   scripts/gpu-check.sh [--out DIR] [test-name-filter]
# Everything it prints also goes to DIR/gpu-check.log. First version: not yet run on a GPU.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
carried=$repo/target/gpu-check
out=${OUT:-.}

pack() { # the test binaries, stripped, and the engine
    local binary name
    rm -rf -- "$carried"
    mkdir -p "$carried"
    cd "$repo"
    while read -r binary; do
        name=${binary##*/}
        strip -o "$carried/${name%-*}.test" "$binary"
    done < <(cargo test --locked --no-run --message-format=json | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
    for binary in target/release/cpcr target/release/cpcr-launch target/release/cpcr-engine; do
        [ ! -x "$binary" ] || strip -o "$carried/${binary##*/}" "$binary"
    done
    scripts/build-nccl.sh "$carried/libcpcr_nccl.so"
    du -sh "$carried" >&2
}

case "${1:-}" in
    --pack) pack; exit 0 ;;
    --out) out=$2; shift 2 ;;
    -*) echo "usage: scripts/gpu-check.sh [--pack | --out DIR] [FILTER]" >&2; exit 2 ;;
esac
mkdir -p "$out"
exec > >(tee "$out/gpu-check.log") 2>&1

[ -d "$carried" ] || { echo "gpu-check: $carried is missing: run scripts/gpu-check.sh --pack where the project was built" >&2; exit 2; }
[ -r /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null || { echo "gpu-check: no NVIDIA driver here" >&2; exit 2; }

# The machine's own PyTorch, or what LIBTORCH names. The carried rpath does not exist here, so the path is given.
torch=${LIBTORCH:-$(python3 -c 'import torch, os; print(os.path.dirname(torch.__file__))')}
version=$(sed -n "s/^__version__ = '\(.*\)'/\1/p" "$torch/version.py")
case "$version" in
    2.11.0*) ;;
    *) echo "gpu-check: torch $version is here, 2.11.0 is needed" >&2; exit 2 ;;
esac
path=$torch/lib
for folder in "$torch"/../nvidia/*/lib; do [ ! -d "$folder" ] || path=$path:$folder; done
export LD_LIBRARY_PATH=$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} LIBTORCH=$torch
# A test that finds this set must not skip itself for want of a GPU.
export CPCR_EXPECT_GPU=1
# As .cargo/config.toml has it for tests.
export TORCH_FR_BUFFER_SIZE=0
# The path that the tests were compiled with may not exist here.
export CPCR_GOLDEN_DIR=$repo/tests/golden

echo "torch $version at $torch"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv

passed=0 failed=0
for binary in "$carried"/*.test; do
    echo "== ${binary##*/}"
    if (cd "$repo" && timeout 300 "$binary" --test-threads 2 "$@"); then passed=$((passed + 1)); else failed=$((failed + 1)); fi
done
if [ -x "$carried/cpcr" ]; then
    "$carried/cpcr" doctor || true
    # A whole run of one trainer on the GPU, over NCCL, through the embedded S3 server.
    if "$carried/cpcr-launch" --nodes 1 --backend nccl --run "$out/demo"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
fi
echo "gpu-check: $passed passed, $failed failed"
[ "$failed" = 0 ]
