#!/usr/bin/env bash
# Makes this clone ready to build: fetches libtorch 2.11.0 (PyPI's `torch` wheel, every file checked
# against the SHA-256 in scripts/locks/) into a cache that all clones share, and links it to .libtorch,
# where .cargo/config.toml and build.rs look for it. Run it as often as you like: when all is there it
# only looks. It asks for no root and changes nothing outside the clone and the cache.
#
# Exit status: 0 ready, 1 the download failed, 2 something is missing on this machine (one line says what).
set -euo pipefail

readonly TORCH_VERSION=2.11.0
readonly RUST_MINOR_MIN=92       # rust-version in Cargo.toml
readonly DRIVER_MAJOR_MIN=580    # CUDA 13
readonly COMPUTE_CAP_MIN=75      # CUDA 13: 7.5, Turing
# Disk use while installing, in MB: the wheels and their unpacked files together, rounded up; CPU computed, the others estimated.
readonly -A NEED_MB=([cpu]=2300 [cuda]=7500 [headers]=2500 [peers]=700 [peers_torch]=8000)

usage() {
    cat <<'USAGE'
usage: scripts/setup.sh [--cpu | --cuda] [--nccl-headers] [--peers] [--peers-torch] [--quiet]

  --cpu           the three wheels that a machine without an NVIDIA GPU needs (0.6 GB to download)
  --cuda          all CUDA 13 libraries (3.8 GB on disk); the default where an NVIDIA driver is found
  --nccl-headers  with --cpu: also the CUDA and NCCL headers, to compile (not run) the NCCL bridge
  --peers         a Python environment for tests that talk to other people's software (moto, nibabel, pyarrow, numpy);
                  the last line printed is its python
  --peers-torch   the same with PyTorch and its CUDA libraries (some GB; to compare against it); implies --peers
  --quiet         say nothing unless something is fetched or wrong

CPCR_CACHE   where downloads are kept (default: $XDG_CACHE_HOME/cpcr or ~/.cache/cpcr)
LIBTORCH     use this libtorch 2.11.0 and fetch none
USAGE
}

say() { [ "$quiet" = 1 ] || printf 'setup: %s\n' "$*" >&2; }
loud() { printf 'setup: %s\n' "$*" >&2; }
missing() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }
failed() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

quiet=0 variant='' headers=0 peers=0 peers_torch=0
while [ $# -gt 0 ]; do
    case "$1" in
        --cpu) variant=cpu ;;
        --cuda) variant=cuda ;;
        --nccl-headers) headers=1 ;;
        --peers) peers=1 ;;
        --peers-torch) peers=1 peers_torch=1 ;;
        --quiet) quiet=1 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; missing "unknown option '$1'" ;;
    esac
    shift
done

repo=$(cd -- "${BASH_SOURCE[0]%/*}/.." && pwd)
readonly repo locks="$repo/scripts/locks"
# Tests point this at a folder with a made-up /proc and /usr/lib.
readonly root="${CPCR_SETUP_ROOT:-}"
cache=${CPCR_CACHE:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/cpcr}
case "$cache" in /*) ;; *) cache=$PWD/$cache ;; esac
readonly cache

# ---- What must be on the machine -------------------------------------------------------------------

check_platform() {
    case "$OSTYPE" in linux*) ;; *) missing "cpcr runs on Linux only, this is $OSTYPE: use a Linux machine, or the Dockerfile" ;; esac
    local machine=${CPCR_SETUP_MACHINE:-$HOSTTYPE}
    [ "$machine" = x86_64 ] || missing "cpcr runs on x86_64 only, this is $machine: PyPI's CUDA build of torch $TORCH_VERSION has no other kind that is tested here"
}

check_tools() {
    command -v cargo >/dev/null || missing "cargo is missing: install Rust 1.$RUST_MINOR_MIN or newer with rustup (https://rustup.rs)"
    command -v g++ >/dev/null || missing "g++ is missing: sudo apt-get install g++"
    command -v flock >/dev/null || missing "flock is missing: sudo apt-get install util-linux"
    local version minor
    version=$(rustc --version 2>/dev/null) || missing "rustc is missing or broken: install Rust 1.$RUST_MINOR_MIN or newer with rustup (https://rustup.rs)"
    minor=${version#rustc 1.} minor=${minor%%.*}
    case "$minor" in '' | *[!0-9]*) return 0 ;; esac # an unknown numbering: let cargo judge
    [ "$minor" -ge "$RUST_MINOR_MIN" ] || missing "$version is too old, 1.$RUST_MINOR_MIN is needed: rustup update stable (Debian's own rustc package is older)"
}

# A pip that works, as an array. Debian and Ubuntu package it apart from python3.
find_pip() {
    command -v python3 >/dev/null || missing "python3 is missing (it fetches libtorch): sudo apt-get install python3 python3-pip"
    if python3 -m pip --version >/dev/null 2>&1; then
        pip=(python3 -m pip)
    elif python3 -m venv --clear "$1/pip" >/dev/null 2>&1; then
        pip=("$1/pip/bin/python" -m pip)
    else
        missing "python3 has no pip: sudo apt-get install python3-pip"
    fi
}

need_disk() { # MB WHAT
    local free_mb
    free_mb=$(df -Pm -- "$cache" | { read -r _; read -r _ _ _ free _; echo "$free"; })
    [ "${CPCR_SETUP_FREE_MB:-$free_mb}" -ge "$1" ] ||
        missing "$2 needs $1 MB of disk under $cache while it installs, ${CPCR_SETUP_FREE_MB:-$free_mb} MB are free: free some, or set CPCR_CACHE to a folder on a larger disk"
}

# ---- Which libtorch --------------------------------------------------------------------------------

driver_version() { # of the NVIDIA kernel driver; empty without one
    local line word
    [ -r "$root/proc/driver/nvidia/version" ] || return 0
    read -r line <"$root/proc/driver/nvidia/version" || true
    for word in $line; do
        case "$word" in [0-9]*.[0-9]*) echo "$word"; return 0 ;; esac
    done
}

has_libcuda() {
    local dir
    for dir in /usr/lib/x86_64-linux-gnu /usr/lib64 /usr/lib /usr/lib/wsl/lib /usr/local/nvidia/lib64; do
        [ ! -e "$root$dir/libcuda.so.1" ] || return 0
    done
    return 1
}

# Why the GPUs of this machine cannot be used; empty when they can. A machine without any passes: images are built on such.
why_no_cuda() {
    local version cap
    version=$(driver_version)
    if [ -n "$version" ] && [ "${version%%.*}" -lt "$DRIVER_MAJOR_MIN" ]; then
        echo "the NVIDIA driver is $version, CUDA 13 needs $DRIVER_MAJOR_MIN or newer: upgrade it (sudo apt-get install nvidia-driver-$DRIVER_MAJOR_MIN on Ubuntu)"
        return 0
    fi
    [ -n "$version" ] && command -v nvidia-smi >/dev/null || return 0
    while read -r cap; do
        case "$cap" in [0-9]*.[0-9]*) ;; *) continue ;; esac
        [ "${cap/./}" -ge "$COMPUTE_CAP_MIN" ] || {
            echo "a GPU of compute capability $cap is in this machine, CUDA 13 needs 7.5 or higher (Turing or newer)"
            return 0
        }
    done < <(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)
}

choose_variant() {
    local why
    if [ "$variant" = cuda ]; then
        why=$(why_no_cuda)
        [ -z "$why" ] || missing "$why; or take --cpu"
    elif [ -z "$variant" ]; then
        variant=cpu
        if [ -n "$(driver_version)" ] || has_libcuda; then
            why=$(why_no_cuda)
            if [ -z "$why" ]; then variant=cuda; else loud "$why. Taking the CPU build"; fi
        fi
    fi
}

check_own_libtorch() { # the libtorch that LIBTORCH names
    local version=''
    if [ -r "$LIBTORCH/build-version" ]; then
        read -r version <"$LIBTORCH/build-version" || true
    elif [ -r "$LIBTORCH/version.py" ]; then
        version=$(sed -n "s/^__version__ = '\(.*\)'/\1/p" "$LIBTORCH/version.py")
    fi
    case "$version" in
        "$TORCH_VERSION" | "$TORCH_VERSION"+*) say "using LIBTORCH=$LIBTORCH ($version)" ;;
        '') missing "LIBTORCH=$LIBTORCH holds no libtorch (no build-version, no version.py): point it at one of version $TORCH_VERSION, or unset it" ;;
        *) missing "LIBTORCH=$LIBTORCH is version $version, $TORCH_VERSION is needed: point it at that one, or unset it" ;;
    esac
}

# ---- Fetching --------------------------------------------------------------------------------------

tmp=''
trap '[ -z "$tmp" ] || rm -rf -- "$tmp"' EXIT

# Runs the rest under a lock of that name, in a fresh $tmp beside the target. What a killed run left is removed.
begin() { # NAME MB
    mkdir -p -- "$cache" 2>/dev/null || missing "$cache cannot be made: set CPCR_CACHE to a folder that you may write"
    [ -w "$cache" ] || missing "$cache cannot be written: set CPCR_CACHE to a folder that you may write"
    exec {lock_fd}>"$cache/.lock-$1"
    flock --nonblock "$lock_fd" || { loud "another setup is fetching $1, waiting for it"; flock "$lock_fd"; }
    rm -rf -- "$cache/.tmp-$1".*
    tmp=$(mktemp -d -- "$cache/.tmp-$1.XXXXXX")
}

finish() {
    rm -rf -- "$tmp"
    tmp=''
    exec {lock_fd}>&-
}

# Settings of the user's own that contradict --target are switched off; index and certificate settings stay.
# The lock is closed for pip: when this script is killed, a pip left behind must not make the next one wait.
run_pip() { TMPDIR="$tmp" PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore "${pip[@]}" "$@" {lock_fd}>&-; }

fetch() { # LOCK TARGET: wheels for CPython 3.12, whatever python3 here is: only their C++ parts are used
    local platform platforms=()
    for platform in manylinux_2_28 manylinux_2_27 manylinux_2_25 manylinux_2_18 manylinux_2_17 manylinux_2_12 manylinux_2_5 manylinux2014 manylinux2010 manylinux1; do
        platforms+=(--platform "${platform}_x86_64")
    done
    run_pip install --quiet --target "$2" --no-deps --no-compile --no-cache-dir --require-hashes --only-binary=:all: \
        --python-version 3.12 --implementation cp --abi cp312 --abi none "${platforms[@]}" -r "$1" >&2 ||
        failed "fetching the packages of ${1#"$repo/"} failed (pip's words are above): check the network or pip's index settings, then run this again"
}

install_libtorch() {
    local name=libtorch-$TORCH_VERSION-$variant start=$SECONDS
    [ ! -d "$cache/$name/torch" ] || { link_libtorch "$cache/$name"; return 0; }
    begin "$name"
    if [ ! -d "$cache/$name/torch" ]; then # nobody else made it while we waited
        need_disk "${NEED_MB[$variant]}" "libtorch ($variant)"
        find_pip "$tmp"
        loud "fetching libtorch $TORCH_VERSION ($variant) into $cache, once for all clones"
        fetch "$locks/libtorch-$variant.txt" "$tmp/lib"
        mv -T -- "$tmp/lib" "$cache/$name"
        loud "libtorch is there after $((SECONDS - start)) s"
    fi
    finish
    link_libtorch "$cache/$name"
}

link_libtorch() { # an existing link to the same place is left alone, so that nothing is rebuilt
    local link=$repo/.libtorch
    if [ "$(readlink -- "$link" || true)" != "$1/torch" ]; then
        [ ! -e "$link" ] || [ -L "$link" ] || missing ".libtorch is a file or folder of your own: move it away"
        ln -sfnT -- "$1/torch" "$link"
        loud "linked .libtorch to $1/torch"
    fi
}

# The headers that torch's CUDA headers include and that the CPU set lacks. Only include/ is kept.
install_headers() {
    local name=libtorch-$TORCH_VERSION-cpu dir
    [ "$variant" = cpu ] || return 0 # the CUDA set has them
    [ ! -e "$cache/$name/.nccl-headers" ] || return 0
    begin nccl-headers
    if [ ! -e "$cache/$name/.nccl-headers" ]; then
        need_disk "${NEED_MB[headers]}" "the CUDA headers"
        find_pip "$tmp"
        loud "fetching the CUDA and NCCL headers"
        fetch "$locks/nccl-headers.txt" "$tmp/lib"
        for dir in "$tmp"/lib/nvidia/*/include; do
            dir=${dir#"$tmp/lib/"}
            mkdir -p -- "$cache/$name/$dir"
            cp -rn -- "$tmp/lib/$dir/." "$cache/$name/$dir/"
        done
        : >"$cache/$name/.nccl-headers"
    fi
    finish
}

# Python that tests and comparisons run, never the product. A folder per lock file and Python version.
install_peers() {
    local version sum name need=${NEED_MB[peers]} lock files=("$locks/peers.txt")
    command -v python3 >/dev/null || missing "python3 is missing: sudo apt-get install python3 python3-venv"
    [ "$peers_torch" = 0 ] || { need=${NEED_MB[peers_torch]}; files+=("$locks/peers-torch.txt"); }
    version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case "$version" in 3.1[0-3]) ;; *) missing "the peers' packages are locked for Python 3.10 to 3.13, python3 here is $version: put one of those first on PATH" ;; esac
    sum=$(cat -- "${files[@]}" | sha256sum)
    name=peers-py$version-${sum:0:12}
    if [ ! -x "$cache/$name/bin/python" ]; then
        begin "$name"
        if [ ! -x "$cache/$name/bin/python" ]; then
            need_disk "$need" "the peers' Python environment"
            # A venv knows its own path, so it is made where it stays; bin/python is put in place last.
            rm -rf -- "${cache:?}/$name"
            python3 -m venv --without-pip "$cache/$name" || missing "python3 cannot make virtual environments: sudo apt-get install python3-venv"
            mv -- "$cache/$name/bin/python" "$cache/$name/bin/.python"
            find_pip "$tmp"
            loud "fetching the peers' Python packages"
            for lock in "${files[@]}"; do
                run_pip install --quiet --target "$cache/$name/lib/python$version/site-packages" --upgrade --no-deps --no-cache-dir \
                    --require-hashes --only-binary=:all: -r "$lock" >&2 ||
                    failed "fetching the packages of ${lock#"$repo/"} failed (pip's words are above): check the network, then run this again"
            done
            mv -- "$cache/$name/bin/.python" "$cache/$name/bin/python"
        fi
        finish
    fi
    printf '%s\n' "$cache/$name/bin/python"
}

check_platform
check_tools
if [ -n "${LIBTORCH:-}" ]; then
    check_own_libtorch
else
    choose_variant
    install_libtorch
    [ "$headers" = 0 ] || install_headers
    say "libtorch $TORCH_VERSION ($variant) is in place"
fi
[ "$peers" = 0 ] || install_peers
