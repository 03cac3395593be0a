#!/usr/bin/env bash
# Builds libcpcr_nccl.so, the one part that needs CUDA's headers, from src/bridge/nccl, and checks that torch supplies
# every symbol that it wants. No GPU, driver or CUDA toolkit is needed: the headers are wheels, locked like libtorch.
# cpcr-engine opens it from its own folder on a machine with GPUs.
#
#   scripts/build-nccl.sh [OUTPUT]       (default: target/release/libcpcr_nccl.so)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
output=${1:-target/release/libcpcr_nccl.so}

# The set that is in force stays so, whatever this machine has.
case "$(readlink -- .libtorch || true)" in
    *-cuda/torch) scripts/setup.sh --quiet --cuda --nccl-headers ;;
    *-cpu/torch) scripts/setup.sh --quiet --cpu --nccl-headers ;;
    *) scripts/setup.sh --quiet --nccl-headers ;;
esac
libtorch=$(readlink -f -- "${LIBTORCH:-.libtorch}")
includes=()
for folder in "$libtorch"/../nvidia/*/include "$libtorch"/../nvidia/*/include/cccl; do
    [ ! -d "$folder" ] || includes+=(-isystem "$folder")
done
[ "${#includes[@]}" -gt 0 ] || { echo "build-nccl: error: no CUDA headers beside $libtorch: unset LIBTORCH, so that setup.sh fetches a libtorch with them" >&2; exit 2; }

mkdir -p -- "$(dirname -- "$output")"
"${CXX:-g++}" -std=c++17 -O2 -fPIC -shared -fvisibility=hidden -DUSE_C10D_NCCL \
    -isystem "$libtorch/include" -isystem "$libtorch/include/torch/csrc/api/include" "${includes[@]}" \
    src/bridge/nccl/nccl.cpp src/bridge/c10d/guard.cpp \
    -L"$libtorch/lib" -Wl,-rpath,"$libtorch/lib" -Wl,--no-as-needed -ltorch_cuda -lc10_cuda -ltorch_cpu -lc10 \
    -Wl,--allow-shlib-undefined -Wl,--no-undefined -o "$output"

# Every undefined symbol must come from torch or the C and C++ runtimes; NCCL's own may not be wanted.
supplied=$(mktemp)
trap 'rm -f -- "$supplied"' EXIT
for library in "$libtorch"/lib/lib{torch_cuda,c10_cuda,torch_cpu,c10}.so; do
    nm -D --defined-only "$library"
done | awk '{ sub(/@.*/, "", $NF); print $NF }' | sort -u >"$supplied"
missing=$(nm -D --undefined-only "$output" | awk '$NF !~ /@/ { print $NF }' | sort -u | comm -23 - "$supplied" |
    grep -vE '^(_ITM_|__gmon_start__|__cxa_finalize)' || true)
if [ -n "$missing" ]; then
    printf 'build-nccl: error: libtorch does not supply:\n%s\n' "$missing" >&2
    exit 1
fi
printf '%s\n' "$output"
