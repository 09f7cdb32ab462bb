# The content of the plugin's root file system: /dockway and nothing else, as `make plugin` puts
# into build/plugin/rootfs. docs/plugin.md says how to make a plugin of it.
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY driver driver
COPY ipam ipam
COPY plugin plugin
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=${VERSION}" -o /dockway ./cmd/dockway

FROM scratch
COPY --from=build /dockway /dockway
ENTRYPOINT ["/dockway"]
CMD ["serve"]
