#!/bin/sh
# Installs build/plugin into this machine's engine as dockway:latest, the command line, and the network nat. Run again, it
# upgrades: containers keep running, and their connections flow on.
set -eu
cd "$(dirname "$0")/.."

name=dockway:latest
fail() { echo "install: $*" >&2; exit 1; }

command -v docker >/dev/null || fail "there is no docker command: install Docker first"
docker version >/dev/null 2>&1 || fail "the engine does not answer (docker version): start it, or run this as root"

install -m 0755 build/dockway /usr/local/bin/dockway
if docker plugin inspect "$name" >/dev/null 2>&1; then
	# The engine has no way to replace a plugin that was not pulled: its state is kept aside and put into the new one.
	old=$(docker plugin inspect -f '{{.Id}}' "$name")
	root=$(docker info -f '{{.DockerRootDir}}')/plugins
	docker plugin disable -f "$name" >/dev/null
	state=$(mktemp -d)
	cp -a "$root/$old/propagated-mount/." "$state/"
	docker plugin rm -f "$name" >/dev/null
	docker plugin create "$name" build/plugin >/dev/null
	new=$(docker plugin inspect -f '{{.Id}}' "$name")
	mkdir -p "$root/$new/propagated-mount"
	cp -a "$state/." "$root/$new/propagated-mount/"
	rm -rf "$state"
else
	docker plugin create "$name" build/plugin >/dev/null
fi
docker plugin enable "$name" >/dev/null
docker network inspect nat >/dev/null 2>&1 || docker network create -d "$name" --ipam-driver "$name" -o network_name=nat nat >/dev/null
echo "dockway is installed: docker run --network nat …, dockway status"
