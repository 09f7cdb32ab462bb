# dockway. `make help` lists what there is to do.
.DELETE_ON_ERROR:
.PHONY: help demo test test-host test-networks test-demo bench install plugin build setup vet lint fuzz clean image

export GOFLAGS := -buildvcs=false $(GOFLAGS)
version := $(shell git describe --always --dirty 2>/dev/null || echo unknown)

help:
	@printf '%s\n' \
	  'make demo      shows the main job in a lab of simulated hosts; sets up all it needs' \
	  'make test      every test; sets up all it needs' \
	  'make bench     measures against the engine'"'"'s own drivers, and prints tables' \
	  'make install   installs dockway:latest into this machine'"'"'s engine, and the network nat' \
	  'make plugin    builds the managed plugin: build/plugin/{config.json,rootfs}' \
	  'make build     builds the program: build/dockway' \
	  'make image     builds the same content with the Dockerfile' \
	  'make vet       go vet, gofmt; part of make test' \
	  'make lint      golangci-lint, with the rules of .golangci.yml' \
	  'make fuzz      every fuzz target for a while' \
	  'make clean     removes build/'

setup:
	@./integration/setup.sh

build:
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(version)' -o build/dockway ./cmd/dockway

plugin: build
	@mkdir -p build/plugin/rootfs
	@cp build/dockway build/plugin/rootfs/dockway
	@cp plugin/config.json build/plugin/config.json

demo: setup plugin
	@go build -o build/demo ./integration/demo
	@exec build/demo

test: setup plugin vet
	go test -race -timeout 40m $$(go list ./... | grep -v /integration)
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-host test-networks
	@$(MAKE) --no-print-directory test-demo

# The tests on engines wait more than they work: those of networks beyond the host are tried beside the
# others, each in a lab of its own.
networks := ^Test(Overlay|Underlay|NamespacesOutlive|Uplink|Wire|DHCP|VLAN)
test-host:
	go test -count=1 -timeout 75m -skip '$(networks)' $$(go list ./integration/... | grep -v /demo)
test-networks:
	go test -count=1 -timeout 75m -run '$(networks)' $$(go list ./integration/... | grep -v /demo)
test-demo:
	go test -count=1 -timeout 40m ./integration/demo

bench: setup plugin
	@CGO_ENABLED=0 go build -o build/bench ./integration/bench
	@exec build/bench

vet:
	go vet ./...
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo 'gofmt -w these files'; exit 1; }

lint:
	go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0 run --max-issues-per-linter=0 --max-same-issues=0 ./...

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
