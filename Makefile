# dockway. `make help` lists what there is to do.
.DELETE_ON_ERROR:
.PHONY: help demo test bench install plugin build setup lint fuzz clean image

export GOFLAGS := -buildvcs=false $(GOFLAGS)
version := $(shell git describe --always --dirty 2>/dev/null || echo unknown)

help:
	@printf '%s\n' \
	  'make demo      shows the main job in a lab of simulated hosts; sets up all it needs' \
	  'make test      every test; sets up all it needs' \
	  'make bench     measures against the engine'"'"'s own bridge, and prints a table' \
	  'make install   installs dockway:latest into this machine'"'"'s engine, and the network nat' \
	  'make plugin    builds the managed plugin: build/plugin/{config.json,rootfs}' \
	  'make build     builds the program: build/dockway' \
	  'make image     builds the same content with the Dockerfile' \
	  'make lint      vet, format' \
	  'make fuzz      every fuzz target for a while' \
	  'make clean     removes build/'

setup:
	@./integration/setup.sh

build:
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(version)' -o build/dockway ./cmd/dockway

plugin: build
	@mkdir -p build/plugin/rootfs
	@cp build/dockway build/plugin/rootfs/dockway
	@cp plugin/config.json build/plugin/config.json

demo: setup plugin
	@go build -o build/demo ./integration/demo
	@exec build/demo

test: setup plugin lint
	go test -race -timeout 20m $$(go list ./... | grep -v /integration)
	go test -count=1 -timeout 40m ./integration/...

bench: setup plugin
	@CGO_ENABLED=0 go build -o build/bench ./integration/bench
	@exec build/bench

lint:
	go vet ./...
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo 'gofmt -w these files'; exit 1; }

time ?= 20s
fuzz:
	@for p in $$(go list ./... | grep -v /integration); do \
	  for f in $$(go test -list '^Fuzz' $$p | grep '^Fuzz'); do \
	    echo "$$p $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(time) $$p || exit 1; done; done

install: plugin
	@./integration/install.sh

image:
	docker build -t dockway-rootfs .

clean:
	rm -rf build
