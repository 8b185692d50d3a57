# Which tools building, checking and booting need, how each is recognised, and which package brings it. Needs common.sh and apt.sh.
# shellcheck shell=bash

# version_at_least HAVE WANT
version_at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

have_python() { python3 -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
have_cc() { command -v cc >/dev/null && [ -e /usr/include/stdio.h ]; }
have_rust() {
    command -v cargo >/dev/null && command -v rustc >/dev/null && version_at_least "$(rustc --version | cut -d' ' -f2)" 1.85
}
have_rustfmt() { command -v rustfmt >/dev/null; }
have_clippy() { command -v cargo-clippy >/dev/null; }
have_chromium() { command -v chromium-headless-shell >/dev/null || command -v chromium >/dev/null; }
have_qemu() {
    command -v qemu-system-x86_64 >/dev/null &&
        version_at_least "$(qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p')" 10
}

# allowed_missing NAME: was --allow-missing=NAME given?
allowed_missing() { case " ${ALLOW_MISSING:-} " in *" $1 "*) return 0 ;; *) return 1 ;; esac }

# want NAME TEST PACKAGE...: the packages are noted unless TEST says that the tool is there.
MISSING_PACKAGES=()
want() {
    local name=$1 present=$2
    shift 2
    $present && return
    if allowed_missing "$name"; then
        say "missing, as allowed: $name"
        return
    fi
    MISSING_PACKAGES+=("$@")
}

# is COMMAND: a test for want.
is() { command -v "$1" >/dev/null; }

# What building and the checks without a guest need.
install_build_tools() {
    MISSING_PACKAGES=()
    want ca-certificates "test -e /etc/ssl/certs/ca-certificates.crt" ca-certificates
    want python have_python python3 python3-venv
    want cc have_cc gcc libc6-dev
    # Debian 12 keeps a current Rust beside its old one, for the packages of browsers.
    want rust have_rust rustc-web cargo-web
    want rustfmt have_rustfmt rustfmt-web
    want clippy have_clippy rust-web-clippy
    want docker-registry "is docker-registry" docker-registry
    want openssl "is openssl" openssl
    want valgrind "is valgrind" valgrind
    # The page of a report is looked at by a browser; this one has no window and is a third of the size.
    want chromium have_chromium chromium-headless-shell
    want erofs-utils "is fsck.erofs" erofs-utils
    # A registry for tests is started by the tests. The package's own service would listen on all interfaces.
    case " ${MISSING_PACKAGES[*]} " in
    *" docker-registry "*)
        mkdir -p /etc/systemd/system
        [ -e /etc/systemd/system/docker-registry.service ] || ln -s /dev/null /etc/systemd/system/docker-registry.service
        ;;
    esac
    [ ${#MISSING_PACKAGES[@]} = 0 ] || apt_install "${MISSING_PACKAGES[@]}"
    hash -r
    allowed_missing rust || have_rust || die "Rust 1.85 or newer is needed, $(rustc --version 2>&1 || true) comes first in PATH"
    allowed_missing python || have_python || die "Python 3.11 or newer with venv is needed, $(python3 --version 2>&1) comes first in PATH"
}

# What booting a guest needs, beside the kernels (kernels.sh).
install_guest_tools() {
    MISSING_PACKAGES=()
    want debootstrap "is debootstrap" debootstrap
    want mke2fs "is mke2fs" e2fsprogs
    want busybox "test -x /bin/busybox" busybox-static
    want xz "is xz" xz-utils
    [ ${#MISSING_PACKAGES[@]} = 0 ] || apt_install "${MISSING_PACKAGES[@]}"
    MISSING_PACKAGES=()
    want qemu-system-x86_64 have_qemu qemu-system-x86
    [ ${#MISSING_PACKAGES[@]} = 0 ] || apt_install -t bookworm-backports "${MISSING_PACKAGES[@]}"
    hash -r
    allowed_missing qemu-system-x86_64 || have_qemu || die "QEMU 10 or newer is needed"
}
