# Debian packages for the scripts. Needs common.sh.
#
# Some tools are newer than Debian 12 (QEMU 10, guest kernels), so other suites are needed too. They are configured in a folder of
# this project, used with `apt-get -c`, and pinned low: the sources and pins of the machine stay as they are, and nothing that is
# installed is upgraded on the way.
# shellcheck shell=bash

readonly APT_DIR=$VAR/apt
readonly EXTRA_SUITES="bookworm-backports trixie-backports sid"
APT_READY=

# "URI SUITE" of everything that the machine's own configuration names, whether its lists have been fetched or not.
machine_sources() {
    # shellcheck disable=SC2016  # apt expands $(...), not the shell
    apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | sort -u
}

# The base URI of the Debian archive in the machine's own configuration, so that a mirror or a proxy in use there is used here too.
debian_mirror() {
    local uri
    uri=$(machine_sources | awk '$2 ~ /^(bookworm|oldstable|stable)$/ { uri = $1 } $2 == "bookworm" { exact = $1 }
        END { print exact ? exact : uri }')
    printf '%s\n' "${uri:-http://deb.debian.org/debian/}"
}

# Writes the private configuration and fetches its package lists, once per run, and only when something has to be installed.
apt_prepare() {
    [ -n "$APT_READY" ] && return
    command -v apt-get >/dev/null || die "no apt-get here: install the missing tools by hand (scripts/lib/tools.sh lists them)"
    [ "$(id -u)" = 0 ] || die "something has to be installed: run this once as root"
    local mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    mirror=$(debian_mirror)
    mkdir -p "$APT_DIR/lists/partial" "$APT_DIR/archives/partial" "$APT_DIR/empty"
    {
        # Debian 12 itself, with the updates that the machine uses, then the newer suites.
        {
            printf '%s bookworm\n' "$mirror"
            machine_sources | awk '$2 ~ /^bookworm-(updates|security)$/'
        } | awk -v key="$keyring" '{ print "deb [signed-by=" key "] " $1 " " $2 " main" }'
        # A mirror may be frozen or lag behind; the signatures are checked all the same.
        for suite in $EXTRA_SUITES; do say "deb [signed-by=$keyring check-valid-until=no] $mirror $suite main"; done
    } >"$APT_DIR/sources.list"
    # 100 and less: never chosen over an installed package, only for what Debian 12 does not have or where a suite is named.
    {
        printf 'Package: *\nPin: release n=bookworm-backports\nPin-Priority: 100\n\n'
        printf 'Package: *\nPin: release n=trixie-backports\nPin-Priority: 50\n\n'
        printf 'Package: *\nPin: release n=sid\nPin-Priority: 40\n'
    } >"$APT_DIR/preferences"
    cat >"$APT_DIR/apt.conf" <<CONF
Dir::Etc::SourceList "$APT_DIR/sources.list";
Dir::Etc::SourceParts "$APT_DIR/empty";
Dir::Etc::Preferences "$APT_DIR/preferences";
Dir::Etc::PreferencesParts "$APT_DIR/empty";
Dir::State::Lists "$APT_DIR/lists";
Dir::Cache::Archives "$APT_DIR/archives";
Dir::Cache::PkgCache "";
Dir::Cache::SrcPkgCache "";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Acquire::Retries "3";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
DPkg::Lock::Timeout "900";
CONF
    say "apt: package lists of Debian 12 and of $EXTRA_SUITES"
    apt_quietly update
    APT_READY=1
}

# apt-get with the private configuration; its output is shown only when it fails.
apt_quietly() {
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -q -c "$APT_DIR/apt.conf" "$@" </dev/null >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "apt-get $1 failed (above)"
    fi
    rm -f "$log"
}

# apt_install [-t SUITE] PACKAGE...: never removes anything and never replaces a configuration file.
apt_install() {
    apt_prepare
    say "apt: installs $*"
    apt_quietly install -y --no-remove -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@"
    apt_quietly clean
}

# The newest package whose name matches the extended regular expression $1, or nothing.
apt_newest() {
    apt-cache -c "$APT_DIR/apt.conf" pkgnames linux- | { grep -E "^($1)\$" || true; } | sort -V | tail -n 1
}
