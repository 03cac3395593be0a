#!/usr/bin/env bash
# Feeds every parser of outside bytes with libFuzzer (fuzz/src/main.rs) and prints how often; fails at the first finding, whose input is kept.
#   scripts/fuzz.sh                     ten minutes each
#   scripts/fuzz.sh --seconds 60 nifti  one of them, for a minute
# Two at a time. Seeds are in fuzz/corpus, what is found on the way goes to target/fuzz/corpus. Needs the usual toolchain, no nightly.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

seconds=600
targets=()
while [ $# -gt 0 ]; do
    case "$1" in
    --seconds) seconds=${2:?--seconds wants a number}; shift 2 ;;
    --help | -h) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) targets+=("$1"); shift ;;
    esac
done
if [ ${#targets[@]} = 0 ]; then targets=(manifest index ledger checkpoint nifti hdf5 control config); fi

scripts/setup.sh --quiet
# What `cargo fuzz --sanitizer none` passes: counters at every edge, and the operands of comparisons.
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags+=" -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
# With a --target the flags are not for build scripts.
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS=$flags cargo build --locked --release --manifest-path fuzz/Cargo.toml --target-dir target/fuzz --target "$host"
binary=target/fuzz/$host/release/cpcr-fuzz

export LD_LIBRARY_PATH=$PWD/.libtorch/lib
one() {
    local target=$1 found=target/fuzz/corpus/$1 log=target/fuzz/$1.log
    mkdir -p "$found" "target/fuzz/artifacts/$target"
    # 64 KiB of input that want 2 GiB or 10 s are a finding. libFuzzer counts memory only once it is touched: the shell counts what is asked for.
    ulimit -v $((4 << 20))
    CPCR_FUZZ_TARGET=$target "$binary" -max_total_time="$seconds" -max_len=65536 -rss_limit_mb=2048 -timeout=10 \
        -print_final_stats=1 -artifact_prefix="target/fuzz/artifacts/$target/" "$found" "fuzz/corpus/$target" >"$log" 2>&1
}

status=0
running=()
printf '| target | executions | a second | edges | peak memory |\n|---|---|---|---|---|\n'
report() {
    local target=$1 log=target/fuzz/$1.log
    local executions rate edges memory
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")
    memory=$(sed -n 's/^stat::peak_rss_mb: *//p' "$log")
    edges=$(grep -o 'cov: [0-9]*' "$log" | tail -1 | cut -d' ' -f2)
    printf '| %s | %s | %s | %s | %s MiB |\n' "$target" "${executions:-?}" "${rate:-?}" "${edges:-?}" "${memory:-?}"
}
for target in "${targets[@]}" ""; do
    if [ ${#running[@]} = 2 ] || [ -z "$target" ]; then
        for pair in "${running[@]}"; do
            wait "${pair%%:*}" || { status=1; printf 'FOUND by %s: target/fuzz/%s.log, target/fuzz/artifacts/%s\n' "${pair#*:}" "${pair#*:}" "${pair#*:}" >&2; }
            report "${pair#*:}"
        done
        running=()
    fi
    if [ -n "$target" ]; then
        (one "$target") &
        running+=("$!:$target")
    fi
done
exit $status
