#!/usr/bin/env bash
# Kills, freezes and starves real runs at random moments, and checks that nothing was lost.
#   scripts/chaos.sh --runs 200 --seed 1     a campaign of that many runs, every one audited
#   scripts/chaos.sh --figures 20            how long recovery takes, medians of 20 of each kind
#   scripts/chaos.sh --runs 15 --always disk   each with a full disk (root); also: clock, and slow with --partitions
# Prints Markdown for docs/reliability.md. Builds a release first, unless --bin DIR names one.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

case " $* " in
*" --bin "* | *" --help "* | *" -h "*) ;;
*)
    scripts/setup.sh --quiet
    cargo build --release --locked
    ;;
esac
exec python3 scripts/chaos.py "$@"
