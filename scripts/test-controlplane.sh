#!/usr/bin/env bash
# k8s/overlays/trial on a real control plane: scripts/controlplane.py. Builds kube-apiserver, kube-controller-manager, kube-scheduler and etcd from the
# Go modules of k8s/controlplane/go.mod first (once, some 20 minutes on two cores), and a release of cpcr unless --bin DIR names one. Wants root, Go,
# `kubectl` and `openssl`; says so otherwise.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

go=$(command -v go || echo /usr/local/go/bin/go)
if [ ! -x "$go" ]; then
    echo "skipped: control plane: no Go here" >&2
    exit 0
fi
parts=${CPCR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cpcr}/controlplane-$(sha256sum k8s/controlplane/go.sum | cut -c1-12)
if [ ! -x "$parts/kube-scheduler" ]; then
    mkdir -p "$parts.new"
    (cd k8s/controlplane && "$go" build -mod=readonly -trimpath -ldflags '-s -w' -o "$parts.new/" tool)
    mv -T "$parts.new" "$parts"
fi
case " $* " in
*" --bin "* | *" --help "* | *" -h "*) ;;
*)
    scripts/setup.sh --quiet
    cargo build --release --locked
    set -- --bin target/release
    ;;
esac
python=${CPCR_PEER_PYTHON:-$(scripts/setup.sh --quiet --peers)}
exec "$python" scripts/controlplane.py --parts "$parts" "$@"
