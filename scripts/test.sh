#!/usr/bin/env bash
# Every check of this repository, from a fresh clone: libtorch, formatting, lints, the dependency rules, the tests.
# What cannot run on this machine is said at the end, not passed over in silence. Arguments go to `cargo test`.
# CPCR_SKIP_DENY=1 skips the dependency rules (the first run on a machine compiles cargo-deny, some 3 minutes).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

readonly DENY_VERSION=0.20.2
cache=${CPCR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cpcr}
skipped=()

step() { printf '\n== %s (%d s so far)\n' "$*" "$SECONDS" >&2; }

step setup
scripts/setup.sh

step formatting
if cargo fmt --version >/dev/null 2>&1; then
    cargo fmt --all --check
else
    skipped+=("formatting: rustfmt is not installed (rustup component add rustfmt)")
fi

step lints
if cargo clippy --version >/dev/null 2>&1; then
    cargo clippy --locked --all-targets -- -D warnings
else
    skipped+=("lints: clippy is not installed (rustup component add clippy)")
fi

step shell scripts
if command -v shellcheck >/dev/null; then
    shellcheck scripts/*.sh .ci/run
else
    skipped+=("shell scripts: shellcheck is not installed (sudo apt-get install shellcheck)")
fi
scripts/test-setup.sh

step kubernetes manifests
status=0
python=$(scripts/setup.sh --quiet --peers) || status=$?
case "$status" in
    0)
        "$python" scripts/test-k8s.py
        export CPCR_PEER_PYTHON=$python # tests talk to its S3 server
        ;;
    2) skipped+=("kubernetes manifests: the Python that reads YAML cannot be had here (the line is above)") ;;
    *) exit "$status" ;;
esac

step dependency rules
if [ "${CPCR_SKIP_DENY:-0}" = 1 ]; then
    skipped+=("dependency rules: CPCR_SKIP_DENY=1")
else
    if ! command -v cargo-deny >/dev/null; then
        PATH=$cache/cargo-deny-$DENY_VERSION/bin:$PATH
        command -v cargo-deny >/dev/null ||
            env -u CARGO_TARGET_DIR cargo install --quiet --locked --root "$cache/cargo-deny-$DENY_VERSION" "cargo-deny@$DENY_VERSION"
    fi
    cargo fetch --quiet --locked --target x86_64-unknown-linux-gnu
    # The fuzz targets are a workspace of their own, which nothing else here builds: its lock file is to fit.
    cargo fetch --quiet --locked --manifest-path fuzz/Cargo.toml --target x86_64-unknown-linux-gnu
    cargo deny --offline check bans licenses sources
fi

step NCCL object
if [ -n "${LIBTORCH:-}" ]; then
    skipped+=("the NCCL object: LIBTORCH names a libtorch of your own, whose CUDA headers are not looked for")
else
    CPCR_NCCL_LIBRARY=$PWD/$(scripts/build-nccl.sh target/nccl/libcpcr_nccl.so)
    export CPCR_NCCL_LIBRARY
fi

step tests
cargo test --locked "$@"

printf '\n== done after %d s\n' "$SECONDS" >&2
for line in "${skipped[@]}"; do printf 'NOT CHECKED, %s\n' "$line" >&2; done
