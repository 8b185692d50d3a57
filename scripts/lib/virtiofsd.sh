# Debian's virtiofsd, for the comparison with the classic way: unpacked below var/virtiofsd with the libraries that it needs, not
# installed, because Debian 12 has no such package. Needs common.sh, apt.sh and tools.sh.
#
# var/virtiofsd/virtiofsd is a wrapper that starts the program with those libraries.
# shellcheck shell=bash

readonly VIRTIOFSD=$VAR/virtiofsd
readonly VIRTIOFSD_PACKAGES="virtiofsd libc6 libgcc-s1 libcap-ng0 libseccomp2"

install_virtiofsd() {
    [ -x "$VIRTIOFSD/virtiofsd" ] && return
    if allowed_missing virtiofsd; then
        say "missing, as allowed: virtiofsd"
        return
    fi
    apt_prepare
    local package packages=()
    # All out of one suite: the program and its libraries were built together.
    for package in $VIRTIOFSD_PACKAGES; do packages+=("$package/sid"); done
    say "virtiofsd: ${packages[*]}"
    rm -rf "$VIRTIOFSD.part"
    mkdir -p "$VIRTIOFSD.part/root"
    (cd "$VIRTIOFSD.part" && apt_quietly download "${packages[@]}" && for deb in *.deb; do dpkg-deb -x "$deb" root; done)
    rm -f "$VIRTIOFSD.part"/*.deb
    cat >"$VIRTIOFSD.part/virtiofsd" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
exec "$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" "$root/usr/libexec/virtiofsd" "$@"
WRAPPER
    chmod 755 "$VIRTIOFSD.part/virtiofsd"
    "$VIRTIOFSD.part/virtiofsd" --version >/dev/null || die "the unpacked virtiofsd does not start"
    rm -rf "$VIRTIOFSD"
    mv -T "$VIRTIOFSD.part" "$VIRTIOFSD"
}
