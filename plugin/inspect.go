package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"

	"github.com/dockway/dockway/driver"
)

// Paths below the socket's root that answer GET with what dockway knows, for its command line.
const (
	StatusPath    = "dockway/v1/status"
	NetworksPath  = "dockway/v1/networks"
	EndpointsPath = "dockway/v1/endpoints"
	PortsPath     = "dockway/v1/ports"
	PeersPath     = "dockway/v1/peers"
	OverlaysPath  = "dockway/v1/overlays"
	KeysPath      = "dockway/v1/keys"
)

// ChangeKeyPath answers POST of a KeyRequest with what each host made of it.
const ChangeKeyPath = "dockway/v1/change-key"

// KeyRequest changes the keys of the whole cluster.
type KeyRequest struct {
	Verb string `json:"verb"` // "add", "use" or "remove"
	Key  string `json:"key"`  // in base64
}

// Cluster is what the command line asks about the other hosts.
type Cluster interface {
	Peers() []driver.PeerInfo
	// Keys are the fingerprints of the gossip's keys, the one in use first.
	Keys() []string
	ChangeKey(ctx context.Context, verb, key string) ([]driver.KeyReply, error)
}

// Status is what StatusPath answers.
type Status struct {
	driver.Status
	// Registered tells that an engine which runs dockway as a managed plugin has taken note of this
	// process. It does so half a second after the start: a container that is being started then may
	// have to be started again. Of a service that it did not start, an engine takes note once.
	Registered bool `json:"registered"`
	// Goroutines is how many this process has. It follows the calls under way and the connections that
	// are open, not how long dockway has run: a number that only grows is a leak.
	Goroutines int `json:"goroutines"`
}

func (s *Server) handleInspection() {
	tell(s, StatusPath, http.MethodGet, func() any { return Status{s.Networks.Status(), s.known.Load(), runtime.NumGoroutine()} })
	tell(s, NetworksPath, http.MethodGet, func() any { return list(s.Networks.Networks()) })
	tell(s, EndpointsPath, http.MethodGet, func() any { return list(s.Networks.Endpoints()) })
	tell(s, PortsPath, http.MethodGet, func() any { return list(s.Networks.Ports()) })
	tell(s, OverlaysPath, http.MethodGet, func() any { return list(s.Networks.Overlays()) })
	tell(s, PeersPath, http.MethodGet, func() any { return list(s.Cluster.Peers()) })
	tell(s, KeysPath, http.MethodGet, func() any { return list(s.Cluster.Keys()) })
	call(s, ChangeKeyPath, decodeKeyRequest, func(ctx context.Context, req KeyRequest) (any, error) {
		replies, err := s.Cluster.ChangeKey(ctx, req.Verb, req.Key)
		return list(replies), err
	})
}

func decodeKeyRequest(body []byte) (KeyRequest, error) {
	var req KeyRequest
	err := unmarshal(body, &req)
	switch {
	case err != nil:
	case req.Verb == "":
		err = errors.New("field verb is missing")
	case req.Key == "":
		err = errors.New("field key is missing")
	}
	if err != nil {
		return req, fmt.Errorf("%s: %w", req, err)
	}
	return req, nil
}

// String is what the log may have of it.
func (r KeyRequest) String() string { return plain(r.Verb) + " a key" }

// list makes no items an empty array.
func list[T any](items []T) []T {
	if items == nil {
		return []T{}
	}
	return items
}
