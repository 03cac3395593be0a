#!/usr/bin/env bash
# Starts the processes of k8s/overlays/trial with exactly the manifests' commands, environment and volumes, in namespaces, kills worker 0 and
# then the coordinator, and sees the run complete: scripts/pods.py. Wants root, `ip` and `kubectl` (for kustomize); says so otherwise.
# Builds a release first, unless --bin DIR names one.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

case " $* " in
*" --bin "* | *" --help "* | *" -h "*) ;;
*)
    scripts/setup.sh --quiet
    cargo build --release --locked
    set -- --bin target/release
    ;;
esac
python=${CPCR_PEER_PYTHON:-$(scripts/setup.sh --quiet --peers)}
exec "$python" scripts/pods.py "$@"
