#!/bin/sh
# Sets up what the lab needs on a Debian 12 machine with Go: packages, two engines, DHCP servers. What is there is left alone;
# what was interrupted is done again. Nothing is started, and the machine's own engine is not touched.
set -eu

cache=${DOCKWAY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dockway}
moby=v2.0.0-beta.24
containerd=v2.4.2
runc=v1.5.2

say() { printf '==> %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

packages() {
	missing=
	for p in "$@"; do
		dpkg-query -W -f '${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || missing="$missing $p"
	done
	[ -n "$missing" ] || return 0
	say "installing Debian packages:$missing"
	apt-get update -qq
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
}

# cached NAME FUNCTION: FUNCTION fills a folder, which is moved into place when it is whole.
cached() {
	[ -d "$cache/$1" ] && return 0
	rm -rf "$cache/$1.part"
	mkdir -p "$cache/$1.part"
	"$2" "$cache/$1.part"
	mv "$cache/$1.part" "$cache/$1"
}

# unpack FOLDER PACKAGE...: what is unpacked, not installed, does not run on this machine.
unpack() {
	dir=$1
	shift
	apt-get update -qq
	mkdir "$dir/deb"
	(cd "$dir/deb" && apt-get download -qq -o APT::Sandbox::User=root "$@")
	for d in "$dir"/deb/*.deb; do dpkg -x "$d" "$dir"; done
	rm -r "$dir/deb"
}

# The engine of Debian would be started by its package.
debian() {
	say "fetching Debian's engine (docker.io 20.10)"
	unpack "$1" docker.io containerd runc tini
	mkdir "$1/bin"
	for b in usr/bin/docker usr/sbin/dockerd usr/sbin/docker-proxy usr/bin/containerd usr/bin/containerd-shim-runc-v2 usr/sbin/runc; do
		mv "$1/$b" "$1/bin/"
	done
	rm -rf "$1/usr" "$1/etc" "$1/lib" "$1/var"
}

# So would be the DHCP servers. The libraries that they need besides are installed: see packages below.
dhcp() {
	say "fetching Debian's DHCP servers (dnsmasq 2.90, Kea 2.2)"
	unpack "$1" dnsmasq-base kea-dhcp4-server kea-dhcp6-server kea-common
	rm -rf "$1/etc" "$1/lib" "$1/usr/share"
	LD_LIBRARY_PATH=$(echo "$1"/usr/lib/*/) "$1/usr/sbin/kea-dhcp4" -v >/dev/null || fail "Kea does not run"
	LD_LIBRARY_PATH=$(echo "$1"/usr/lib/*/) "$1/usr/sbin/kea-dhcp6" -v >/dev/null || fail "Kea does not run"
	"$1/usr/sbin/dnsmasq" -v >/dev/null || fail "dnsmasq does not run"
}

build() { # build FOLDER MODULE...: with the Go toolchain, pinned
	dir=$1
	shift
	for m in "$@"; do
		say "building $m (the first time takes a minute)"
		(cd / && GOBIN=$dir GOFLAGS=-buildvcs=false go install -trimpath -ldflags='-s -w' "$m" 2>&1 | grep -v '^go: downloading' >&2) || true
		[ -x "$dir/$(basename "${m%@*}")" ] || fail "building $m failed"
	done
}

mobyengine() {
	mkdir "$1/bin"
	CGO_ENABLED=0 build "$1/bin" "github.com/moby/moby/v2/cmd/dockerd@$moby" "github.com/moby/moby/v2/cmd/docker-proxy@$moby" \
		"github.com/containerd/containerd/v2/cmd/containerd@$containerd" "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@$containerd"
	say "building github.com/opencontainers/runc@$runc"
	(cd / && GOBIN=$1/bin GOFLAGS=-buildvcs=false CGO_ENABLED=1 go install -tags seccomp -trimpath "github.com/opencontainers/runc@$runc")
	cp "$cache/debian/bin/docker" "$1/bin/"
}

# Kernel modules that a new network namespace cannot ask for by itself.
modules() {
	[ -e /proc/sys/net/bridge ] || modprobe br_netfilter || fail "this kernel has no br_netfilter"
	grep -qw overlay /proc/filesystems || modprobe overlay || say "this kernel has no overlay file system: the engines copy"
}

[ "$(id -u)" = 0 ] || fail "the lab is made of namespaces: run this as root"
command -v go >/dev/null || fail "there is no go command: install Go first"
printf '%s\n' go1.21 "$(cd / && go env GOVERSION)" | sort -VC || fail "$(cd / && go env GOVERSION) is too old: install Go 1.21 or later, which fetches the version of go.mod"
packages nftables iptables iproute2 tcpdump busybox-static conntrack pkg-config libseccomp-dev gcc libc6-dev \
	libdevmapper1.02.1 libsystemd0 util-linux procps kmod \
	liblog4cplus-2.0.5 libmariadb3 libpq5 libssl3 libdbus-1-3 libidn2-0 libnetfilter-conntrack3 libnftables1
modules
mkdir -p "$cache"
exec 9>"$cache/lock" # two at once: the second waits, and finds all done
flock 9
cached debian debian
[ -x "$cache/dhcp/usr/sbin/kea-dhcp6" ] || rm -rf "$cache/dhcp" # of before there was DHCPv6
cached dhcp dhcp
cached "moby-$moby-$containerd-$runc" mobyengine
ln -sfn "moby-$moby-$containerd-$runc" "$cache/moby"
say "the lab is ready in $cache"
