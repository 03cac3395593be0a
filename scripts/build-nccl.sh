#!/usr/bin/env bash
# Builds libcpcr_nccl.so, the one part that needs CUDA's headers: fetches them as PyPI wheels into a
# cache, compiles src/bridge/nccl against $LIBTORCH and checks that torch supplies what it wants.
#
#   scripts/build-nccl.sh [OUTPUT]       (default: target/libcpcr_nccl.so)
set -euo pipefail
cd "$(dirname "$0")/.."
libtorch=$(readlink -f "${LIBTORCH:-.libtorch}")
output=${1:-target/libcpcr_nccl.so}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cpcr/cuda-headers
# The versions that torch 2.11.0's wheel (CUDA 13.0) names, and two header sets that it leaves out.
wheels=(
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
  nvidia-nccl-cu13==2.28.9 nvidia-cublas==13.1.0.3 nvidia-cusparse==12.6.3.3 nvidia-cusolver==12.0.4.66
)
include=$cache/include
mkdir -p "$include"
for wheel in "${wheels[@]}"; do
  stamp=$cache/$wheel.done
  [[ -e $stamp ]] && continue
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$work" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_25_x86_64 \
    --platform manylinux_2_18_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "$wheel"
  # Only the headers are kept: nvidia/<package>/include/... -> include/...
  python3 - "$work"/*.whl "$include" <<'PY'
import pathlib, sys, zipfile

wheel, include = zipfile.ZipFile(sys.argv[1]), pathlib.Path(sys.argv[2])
for name in wheel.namelist():
    head, found, tail = name.partition("/include/")
    if found and tail and not tail.endswith("/"):
        target = (include / tail).resolve()
        if include.resolve() not in target.parents:
            sys.exit(f"refused: {name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(wheel.read(name))
PY
  rm -rf "$work"
  touch "$stamp"
done

mkdir -p "$(dirname "$output")"
"${CXX:-g++}" -std=c++17 -O2 -fPIC -shared -fvisibility=hidden -DUSE_C10D_NCCL \
  -isystem "$libtorch/include" -isystem "$libtorch/include/torch/csrc/api/include" \
  -isystem "$include" -isystem "$include/cccl" \
  src/bridge/nccl/nccl.cpp src/bridge/c10d/guard.cpp \
  -L"$libtorch/lib" -Wl,-rpath,"$libtorch/lib" -Wl,--no-as-needed -ltorch_cuda -lc10_cuda -ltorch_cpu -lc10 \
  -Wl,--allow-shlib-undefined -Wl,--no-undefined -o "$output"

# Every undefined symbol must come from torch or the C and C++ runtimes; NCCL's own may not be wanted.
supplied=$(mktemp)
trap 'rm -f "$supplied"' EXIT
for library in "$libtorch"/lib/lib{torch_cuda,c10_cuda,torch_cpu,c10}.so; do
  nm -D --defined-only "$library"
done | awk '{ sub(/@.*/, "", $NF); print $NF }' | sort -u >"$supplied"
missing=$(nm -D --undefined-only "$output" | awk '$NF !~ /@/ { print $NF }' | sort -u | comm -23 - "$supplied" |
  grep -vE '^(_ITM_|__gmon_start__|__cxa_finalize)' || true)
if [[ -n $missing ]]; then
  printf 'libtorch does not supply:\n%s\n' "$missing" >&2
  exit 1
fi
echo "$output"
