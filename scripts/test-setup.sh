#!/usr/bin/env bash
# Tests of scripts/setup.sh that need no network: each error is one line, names the way out and exits with 2.
set -euo pipefail
setup=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)/setup.sh
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
passed=0 failed=0

# A PATH of stand-ins: every tool that setup.sh calls, each case then spoils one.
mkdir -p "$work/bin" "$work/clone/scripts" "$work/root" "$work/cache"
cp -r -- "$setup" "${setup%/*}/locks" "$work/clone/scripts/"
for tool in bash env df mkdir mktemp rm mv ln readlink flock sed cat sha256sum cp; do ln -s "$(command -v "$tool")" "$work/bin/$tool"; done
stand_in() { rm -f -- "$1"; printf '#!/usr/bin/env bash\n%s\n' "$2" >"$1"; chmod +x "$1"; }

reset() {
    stand_in "$work/bin/cargo" 'exit 0'
    stand_in "$work/bin/g++" 'exit 0'
    stand_in "$work/bin/rustc" 'echo "rustc 1.95.0 (59807616e 2026-04-14)"'
    # Stands for a python3 whose pip puts a torch in place.
    stand_in "$work/bin/python3" "echo \"\$*\" >>'$work/pip.log'
        while [ \$# -gt 0 ]; do [ \"\$1\" = --target ] && mkdir -p \"\$2/torch\"; shift; done; exit 0"
    rm -rf -- "$work/cache" "$work/clone/.libtorch" "$work/root" "$work/pip.log" "$work/bin/nvidia-smi"
    mkdir -p "$work/cache" "$work/root"
}

run() { env -i PATH="$work/bin" HOME="$work" CPCR_CACHE="$work/cache" CPCR_SETUP_ROOT="$work/root" "${vars[@]}" bash "$work/clone/scripts/setup.sh" "$@" 2>&1; }

expect() { # NAME STATUS TEXT LINES arguments...
    local name=$1 status=$2 text=$3 lines=$4 output got=0
    shift 4
    output=$(run "$@") || got=$?
    if [ "$got" = "$status" ] && [[ "$output" == *"$text"* ]] && { [ "$lines" = any ] || [ "$(wc -l <<<"$output")" = "$lines" ]; }; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED %s: exit %s (wanted %s), wanted text: %s\n%s\n' "$name" "$got" "$status" "$text" "$output" >&2
    fi
    vars=()
}
driver() { mkdir -p "$work/root/proc/driver/nvidia"; printf 'NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  %s  Release Build  (root)\n' "$1" >"$work/root/proc/driver/nvidia/version"; }

vars=()
reset; rm "$work/bin/cargo"; expect no-cargo 2 'rustup' 1
reset; rm "$work/bin/g++"; expect no-compiler 2 'sudo apt-get install g++' 1
reset; stand_in "$work/bin/rustc" 'echo "rustc 1.75.0"'; expect old-rust 2 '1.92 is needed: rustup update stable' 1
reset; rm "$work/bin/python3"; expect no-python 2 'sudo apt-get install python3 python3-pip' 1
reset; stand_in "$work/bin/python3" 'exit 1'; expect no-pip 2 'sudo apt-get install python3-pip' 1
reset; vars=(CPCR_SETUP_FREE_MB=100); expect disk-full 2 'needs 2300 MB of disk' 1
reset; vars=(CPCR_SETUP_MACHINE=aarch64); expect other-machine 2 'x86_64 only, this is aarch64' 1
reset; vars=(OSTYPE=darwin23); expect other-system 2 'Linux only' 1
reset; expect bad-option 2 "unknown option '--gpu'" any --gpu
reset; vars=(CPCR_CACHE=/proc/nowhere); expect bad-cache 2 'set CPCR_CACHE' 1

reset; expect fresh 0 'linked .libtorch' any
[ "$(readlink "$work/clone/.libtorch")" = "$work/cache/libtorch-2.11.0-cpu/torch" ] || { failed=$((failed + 1)); echo 'FAILED fresh: no link' >&2; }
grep -q -- '--require-hashes' "$work/pip.log" || { failed=$((failed + 1)); echo 'FAILED fresh: hashes are not required' >&2; }
rm "$work/pip.log"; expect again 0 'is in place' 1
[ ! -e "$work/pip.log" ] || { failed=$((failed + 1)); echo 'FAILED again: pip ran' >&2; }
expect again-quiet 0 '' 1 --quiet
mkdir -p "$work/cache/.tmp-libtorch-2.11.0-cuda.dead"; expect cuda-asked 0 '(cuda) is in place' any --cuda
[ ! -e "$work/cache/.tmp-libtorch-2.11.0-cuda.dead" ] || { failed=$((failed + 1)); echo 'FAILED cuda-asked: the leftover stays' >&2; }
reset; stand_in "$work/bin/python3" "[ \"\$3\" = --version ]"; expect download-fails 1 'run this again' any
[ ! -e "$work/cache/libtorch-2.11.0-cpu" ] || { failed=$((failed + 1)); echo 'FAILED download-fails: half a libtorch' >&2; }
reset; mkdir "$work/clone/.libtorch"; expect own-folder 2 'move it away' any; rm -r "$work/clone/.libtorch"

reset; driver 580.65.06; expect gpu 0 '(cuda) is in place' any
reset; driver 535.104; expect old-driver-auto 0 'Taking the CPU build' any
reset; driver 535.104; expect old-driver-cuda 2 '580 or newer: upgrade it' 1 --cuda
reset; driver 590.1; stand_in "$work/bin/nvidia-smi" 'echo 9.0; echo 7.0'; expect old-card 2 'capability 7.0' 1 --cuda
reset; mkdir -p "$work/root/usr/lib/wsl/lib"; : >"$work/root/usr/lib/wsl/lib/libcuda.so.1"; expect wsl 0 '(cuda) is in place' any

reset; mkdir "$work/lt"; vars=(LIBTORCH="$work/lt"); expect own-none 2 'holds no libtorch' 1
reset; echo "__version__ = '2.10.0+cu130'" >"$work/lt/version.py"; vars=(LIBTORCH="$work/lt"); expect own-old 2 'is version 2.10.0+cu130, 2.11.0 is needed' 1
reset; echo "__version__ = '2.11.0+cu130'" >"$work/lt/version.py"; vars=(LIBTORCH="$work/lt"); expect own 0 'using LIBTORCH' 1
# shellcheck disable=SC2016
reset
# shellcheck disable=SC2016 # the stand-in expands them
stand_in "$work/bin/python3" 'case "$*" in *--target*) while [ "$1" != --target ]; do shift; done; mkdir -p "$2/torch" ;; *) echo 3.9 ;; esac'
expect peers-python 2 'locked for Python 3.10 to 3.13' any --peers

# Two at once: one fetches, the other waits and finds it there.
reset
run >"$work/a" & one=$!
run >"$work/b" & two=$!
if wait "$one" && wait "$two" && [ "$(grep -c -- '--require-hashes' "$work/pip.log")" = 1 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo 'FAILED two-at-once' >&2; fi

echo "setup: $passed passed, $failed failed"
[ "$failed" = 0 ]
