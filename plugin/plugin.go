// Package plugin is what Docker sees of dockway: the routes, wire types and packaging of its
// network and IPAM driver. It decodes, validates and answers; it knows no network and no address.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/go-plugins-helpers/sdk"
	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/driver/policy"
)

// manifest answers Plugin.Activate, which an engine asks of a plugin that it did not start itself.
const manifest = `{"Implements": ["NetworkDriver", "IpamDriver"]}`

// Networks is the network service. Every method is idempotent, and deleting what is unknown
// succeeds, because engines repeat and forget.
type Networks interface {
	CreateNetwork(context.Context, driver.NetworkRequest) error
	DeleteNetwork(ctx context.Context, networkID string) error
	CreateEndpoint(context.Context, driver.EndpointRequest) (driver.EndpointReply, error)
	DeleteEndpoint(ctx context.Context, networkID, endpointID string) error
	Join(ctx context.Context, networkID, endpointID string) (driver.JoinReply, error)
	Leave(ctx context.Context, networkID, endpointID string) error
	// Publish makes the mappings the endpoint's only ones.
	Publish(ctx context.Context, networkID, endpointID string, ports []policy.PortMapping) error
	Unpublish(ctx context.Context, networkID, endpointID string) error

	Status() driver.Status
	Networks() []driver.NetworkInfo
	Endpoints() []driver.EndpointInfo
	Ports() []driver.PortInfo
	Overlays() []driver.OverlayInfo
}

// Config is what a Server serves.
type Config struct {
	Networks  Networks
	Addresses Addresses
	Cluster   Cluster
	Log       *logrus.Entry
	Limit     time.Duration // longest that a call may take; 0: 10 s
}

// Server answers the engine's calls and the command line's questions on one socket.
type Server struct {
	Config
	handler sdk.Handler
	calls   *calls
	known   atomic.Bool // to the engine, since the start

	mu       sync.Mutex
	listener *listener // nil: not serving yet
	stopped  bool
}

// New makes a server that is not yet serving.
func New(c Config) *Server {
	if c.Limit == 0 {
		c.Limit = 10 * time.Second
	}
	s := &Server{Config: c, handler: sdk.NewHandler(manifest), calls: newCalls()}
	s.handleNetworks()
	s.handleAddresses()
	s.handleInspection()
	s.handler.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.refuse(w, http.StatusNotFound, fmt.Errorf("dockway has no call %.100q", r.URL.Path))
	})
	return s
}

// Serve answers on l until Shutdown.
func (s *Server) Serve(l net.Listener) error {
	tracked, err := s.listen(l)
	if err != nil {
		return err
	}
	err = s.handler.Serve(tracked)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return fmt.Errorf("serve on %s: %w", l.Addr(), err)
}

func (s *Server) listen(l net.Listener) (*listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil, errors.Join(fmt.Errorf("serve on %s: already shut down", l.Addr()), l.Close())
	}
	s.listener = newListener(l)
	return s.listener, nil
}

// Shutdown stops accepting, waits for the calls under way until ctx ends, and closes all
// connections. A call that arrives on an open connection meanwhile is still answered: an engine
// would repeat a request that was cut off with an empty body.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopped = true
	l := s.listener
	s.mu.Unlock()

	var err error
	if l != nil {
		err = l.Close()
	}
	select {
	case <-s.calls.drained():
	case <-ctx.Done():
		err = errors.Join(err, errors.New("calls still under way were cut off"))
	}
	if l != nil {
		l.closeConnections()
	}
	return err
}
