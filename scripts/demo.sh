#!/usr/bin/env bash
# From a fresh clone to a trained model: libtorch, a release build, and the demonstration on four workers.
# Arguments go to cpcr-launch, e.g. `scripts/demo.sh --nodes 2`.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
cargo build --release --locked
# Only the CUDA set of libtorch brings NCCL.
[ ! -d .libtorch/../nvidia/nccl/lib ] || scripts/build-nccl.sh
[ $# -gt 0 ] || set -- --nodes 4
exec target/release/cpcr-launch "$@"
