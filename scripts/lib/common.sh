# Sourced by everything in scripts/: where things are, how a script speaks, which tool folders count.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# All that the scripts download or make and that is not the virtual environment or the cargo target: git-ignored, may be deleted.
VAR=$ROOT/var
readonly ROOT VAR

# rustup's folder is not in PATH of a non-interactive shell.
[ -d "${HOME:-/root}/.cargo/bin" ] && PATH="${HOME:-/root}/.cargo/bin:$PATH"
# Debian keeps debootstrap and mke2fs where an ordinary user's PATH does not look.
PATH="$PATH:/usr/sbin:/sbin"
export PATH

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}
