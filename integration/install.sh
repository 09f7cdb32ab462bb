#!/bin/sh
# Installs build/plugin into this machine's engine as dockway:latest, the command line, and the network nat. Run again, it
# upgrades: containers keep running, and their connections flow on. What was interrupted goes on where it was.
set -eu
cd "$(dirname "$0")/.."

name=dockway:latest
bin=${DOCKWAY_BIN:-/usr/local/bin}
fail() { echo "install: $*" >&2; exit 1; }

command -v docker >/dev/null || fail "there is no docker command: install Docker first"
root=$(docker info -f '{{.DockerRootDir}}' 2>/dev/null) && [ -n "$root" ] ||
	fail "the engine does not answer (docker info): start it, or run this as root"
[ -w "$bin" ] && [ -w "$root" ] || fail "$bin or $root cannot be written: run this as root, on the engine's machine"

install -m 0755 build/dockway "$bin/dockway"

# The engine cannot replace a plugin that was not pulled: the old one is removed, and its state (which networks there are)
# and its settings are kept aside until the new one has them and runs.
saved=$root/dockway-saved
mount() { echo "$root/plugins/$(docker plugin inspect -f '{{.Id}}' "$name")/propagated-mount"; }
if docker plugin inspect "$name" >/dev/null 2>&1; then
	docker plugin disable -f "$name" >/dev/null 2>&1 || true # it may be disabled
	if [ -e "$(mount)/dockway.db" ]; then
		rm -rf "$saved" "$saved.part"
		mkdir "$saved.part"
		cp -a "$(mount)" "$saved.part/state"
		docker plugin inspect -f '{{range .Settings.Env}}{{println .}}{{end}}' "$name" >"$saved.part/settings"
		mv "$saved.part" "$saved"
	fi
	docker plugin rm -f "$name" >/dev/null
fi
docker plugin create "$name" build/plugin >/dev/null
if [ -d "$saved" ]; then
	mkdir -p "$(mount)"
	cp -a "$saved/state/." "$(mount)/"
	while read -r setting; do
		[ -z "$setting" ] || docker plugin set "$name" "$setting" </dev/null || echo "install: the new plugin does not take $setting" >&2
	done <"$saved/settings"
fi
docker plugin enable "$name" >/dev/null || fail "the plugin does not start: see the engine's log. Its state is in $(mount)"
rm -rf "$saved"

docker network inspect nat >/dev/null 2>&1 || docker network create -d "$name" --ipam-driver "$name" -o network_name=nat nat >/dev/null
echo "dockway is installed: docker run --network nat …, dockway status"
