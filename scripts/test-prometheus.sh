#!/usr/bin/env bash
# Metrics, alerts, scrape settings and dashboard against a real Prometheus: scripts/observability/check.py.
#   scripts/test-prometheus.sh              the files of docs/observability: promtool checks and tests them, the dashboard's queries are parsed
#   scripts/test-prometheus.sh --bin DIR    also a small run of DIR/cpcr-launch, which Prometheus scrapes (a minute or two)
# Builds prometheus and promtool from the Go modules of scripts/observability/go.mod first, once, some 7 minutes on one core; without Go it
# says so and passes. Wants python3, its standard library only.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

go=$(command -v go || echo /usr/local/go/bin/go)
tools=${CPCR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cpcr}/prometheus-$(sha256sum scripts/observability/go.sum | cut -c1-12)
if [ ! -x "$tools/promtool" ]; then
    if [ ! -x "$go" ]; then
        python3 scripts/observability/check.py --without-tools
        echo "SKIPPED: Prometheus: no Go here to build it" >&2
        exit 0
    fi
    mkdir -p "$tools.new"
    # Of the service discoveries only Kubernetes, without which the example would not parse; no web assets. One core, and that politely.
    (cd scripts/observability && GOMAXPROCS=1 nice -n 19 "$go" build -p 1 -mod=readonly -tags remove_all_sd,enable_kubernetes_sd \
        -trimpath -ldflags '-s -w' -o "$tools.new/" tool)
    mv -T "$tools.new" "$tools"
fi
exec python3 scripts/observability/check.py --tools "$tools" "$@"
