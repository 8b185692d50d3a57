# Guest kernels out of Debian packages: unpacked below var/kernels, never installed. Needs common.sh and apt.sh.
#
# var/kernels/<series>/ holds vmlinuz, release (what `uname -r` will say), config and modules/ (uncompressed, with their load order
# in modules/order). virtio-fs, FUSE and virtio-pci are built into the newer kernels; where they are modules (6.1), they are in
# root-modules/ in the same way, for an initramfs. The network card is always a module.
# shellcheck shell=bash

readonly KERNELS=$VAR/kernels
# In load order. Not every kernel has every one (libcrc32c is built in since 6.15).
readonly GUEST_MODULES="virtio_console failover net_failover virtio_net overlay loop libcrc32c erofs"
readonly ROOT_MODULES="virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci fuse virtiofs"

# kernel_fetch SERIES REGEX...: the newest version that matches the first REGEX with a match; a REGEX covers the version without flavour.
kernel_fetch() {
    local series=$1 regex name version packages=() tmp
    shift
    [ -e "$KERNELS/$series/vmlinuz" ] && return
    if allowed_missing "kernel-$series"; then
        say "missing, as allowed: kernel-$series"
        return
    fi
    apt_prepare
    for regex in "$@"; do
        # Up to 6.x all is in linux-image, later the image is in linux-binary and the rest in packages of its own.
        name=$(apt_newest "linux-(image|binary)-$regex-cloud-amd64")
        [ -n "$name" ] && break
    done
    [ -n "$name" ] || die "no cloud kernel $series among the packages of Debian 12 and of $EXTRA_SUITES"
    version=${name#linux-image-}
    version=${version#linux-binary-}
    packages=("linux-image-$version")
    if [ -n "$(apt_newest "linux-binary-${version//+/\\+}")" ]; then
        packages=("linux-binary-$version" "linux-modules-$version" "linux-base-$version")
    fi
    say "kernel $series: ${packages[*]}"
    mkdir -p "$KERNELS"
    rm -rf "$KERNELS"/.tmp.*
    tmp=$(mktemp -d "$KERNELS/.tmp.XXXXXX")
    (cd "$tmp" && apt_quietly download "${packages[@]}" && for deb in *.deb; do dpkg-deb -x "$deb" root; done)
    kernel_arrange "$tmp/root" "$version" "$tmp/out"
    mv -T "$tmp/out" "$KERNELS/$series"
    rm -rf "$tmp"
}

# kernel_arrange ROOT VERSION OUT: picks image, config and the guest's modules out of an unpacked package.
kernel_arrange() {
    local root=$1 version=$2 out=$3 modules
    mkdir -p "$out"
    modules=$(find "$root" -type d -path "*lib/modules/$version" | head -n 1)
    cp "$(find "$root" -type f \( -name "vmlinuz-$version" -o -path "*/$version/vmlinuz" \) | head -n 1)" "$out/vmlinuz"
    cp "$(find "$root" -type f \( -name "config-$version" -o -path "*/$version/config" \) | head -n 1)" "$out/config"
    # shellcheck disable=SC2086  # lists of words
    kernel_modules "$modules" "$out/modules" $GUEST_MODULES
    # shellcheck disable=SC2086
    kernel_modules "$modules" "$out/root-modules" $ROOT_MODULES
    printf '%s\n' "$version" >"$out/release"
}

# kernel_modules FROM INTO NAME...: those of the modules that the package in the folder FROM has, and INTO/order with their names.
kernel_modules() {
    local from=$1 into=$2 module file
    shift 2
    mkdir -p "$into"
    : >"$into/order"
    for module in "$@"; do
        file=$(find "$from" -name "$module.ko*" | head -n 1)
        case $file in
        '') continue ;;
        *.xz) xz -dc "$file" >"$into/$module.ko" ;;
        *.zst) zstd -qdc "$file" >"$into/$module.ko" ;;
        *) cp "$file" "$into/$module.ko" ;;
        esac
        printf '%s\n' "$module.ko" >>"$into/order"
    done
}

# 6.1 is Debian 12's own and needs an initramfs; 6.12 is what most hosts of microVMs run; 7.2 checks the used length of virtio-fs answers.
# When the archive has moved on from 7.2, its newest 7.x stands in.
install_kernels() {
    kernel_fetch 6.1 '6\.1\.[0-9]+[^-]*(-[0-9]+)?'
    kernel_fetch 6.12 '6\.12\.[0-9]+[^-]*(-[0-9]+)?'
    kernel_fetch 7 '7\.2\.[0-9]+[^-]*(-[0-9]+)?' '7\.[0-9.]+[^-]*(-[0-9]+)?'
}
