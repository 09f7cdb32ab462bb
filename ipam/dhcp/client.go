// Package dhcp leases addresses for containers from the DHCP server of the LAN (RFC 2131 and 2132 for IPv4, RFC 8415 for IPv6): on behalf of each container,
// from the host, before the container starts and for as long as it runs. It renews what it has leased.
//
// It is not for setting an address on a link, nor for keeping a record: the caller does both, and hands the recorded leases
// back after a restart. It reaches servers that are behind the link, never one on the host itself or in a container of its.
package dhcp

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// obtainTime is how long Obtain tries.
const obtainTime = 15 * time.Second

// Config says what a Client does beside leasing.
type Config struct {
	// Log gets what goes wrong with leases that are kept. Nil: logrus's standard logger.
	Log *logrus.Entry
	// Changed is told what becomes of a lease that is kept: the lease as it is now, which should be recorded, and what happened.
	// Calls about one lease come one after the other, those about several side by side. It must not call the client. It may be
	// nil.
	Changed func(Lease, Event)
	// Holder is who of this host has an address on a link's LAN, which nobody who asks the LAN by the link finds out; no MAC if
	// nobody has. It may be nil.
	Holder func(link string, a netip.Addr) MAC
	// Probe is how long the LAN is asked whether somebody uses a leased address already (ARP). 0: 200 ms. Negative: not at all.
	Probe time.Duration
}

// Kind is what happened to a lease.
type Kind string

const (
	// Renewed says that the lease goes on, with new times and perhaps a new server.
	Renewed Kind = "renewed"
	// Changed says that the lease goes on, but something differs that a container was set up with: after Refused or Expired the
	// address itself, or a gateway, a name server and the like (Lease.SameSettings).
	Changed Kind = "changed"
	// Refused says that the server took the address back before its time (DHCPNAK). The container should stop using it. It is
	// asked for again from now on.
	Refused Kind = "refused"
	// Expired says that no server renewed the lease in time. The container should stop using it. It is asked for again from now
	// on.
	Expired Kind = "expired"
)

// Event is what happened to a lease.
type Event struct {
	Kind     Kind
	Previous Lease // as it was before
	Err      error // why, when Refused or Expired
}

// Client leases addresses and keeps leases, in one network namespace. It is safe for concurrent use. A lease that is kept
// costs a goroutine and a timer; links are listened on only while there is something to say.
type Client struct {
	log       *logrus.Entry
	changed   func(Lease, Event)
	holder    func(link string, a netip.Addr) MAC
	probe     time.Duration
	open      opener
	namespace *os.File
	started   time.Time // older leases are from before a restart
	life      context.Context
	end       context.CancelFunc // Close's

	mu     sync.Mutex
	lans   map[lanKey]*lan
	kept   map[key]*keeper
	closed bool
}

// New makes a Client for the network namespace of the calling thread. It needs CAP_NET_RAW, and fails without /proc.
func New(cfg Config) (*Client, error) {
	namespace, err := os.Open(threadNamespace)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	c := newClient(cfg, func(link string, t traffic) (opened transport, err error) {
		err = inside(namespace, func() error {
			opened, err = openSocket(link, t)
			return err
		})
		return opened, err
	})
	c.namespace = namespace
	return c, nil
}

func newClient(cfg Config, open opener) *Client {
	c := &Client{
		log:     cfg.Log,
		changed: cfg.Changed,
		holder:  cfg.Holder,
		probe:   cfg.Probe,
		open:    open,
		started: time.Now(),
		lans:    map[lanKey]*lan{},
		kept:    map[key]*keeper{},
	}
	c.life, c.end = context.WithCancel(context.Background())
	if c.log == nil {
		c.log = logrus.NewEntry(logrus.StandardLogger())
	}
	if c.changed == nil {
		c.changed = func(Lease, Event) {}
	}
	if c.holder == nil {
		c.holder = func(string, netip.Addr) MAC { return MAC{} }
	}
	if c.probe == 0 {
		c.probe = 200 * time.Millisecond
	}
	return c
}

// Obtain leases an address, within 15 s. Nothing is kept yet: an address that is used needs Keep, one that is not, Release.
//
// The error wraps ErrNoServer, or is an *OfferedError, a *TakenError or a *RefusedError inside; or it says what is wrong with
// the request, the link, or the servers' answers.
func (c *Client) Obtain(ctx context.Context, r Request) (Lease, error) {
	lease, err := c.obtain(ctx, r)
	if err != nil {
		return Lease{}, fmt.Errorf("lease an address on %s for %s: %w", r.Link, r.MAC, err)
	}
	return lease, nil
}

func (c *Client) obtain(ctx context.Context, r Request) (Lease, error) {
	if err := r.validate(); err != nil {
		return Lease{}, err
	}
	l, err := c.lan(r)
	if err != nil {
		return Lease{}, err
	}
	if err := l.ready(); err != nil {
		return Lease{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, obtainTime)
	defer cancel()
	defer context.AfterFunc(c.life, cancel)()
	return acquisition{Client: c, lan: l, request: r, wanted: r.Address, only: r.Address.IsValid()}.run(ctx)
}

// Keep renews a lease from now on, and reports through Config.Changed. It takes leases of Obtain, and recorded ones from before
// a restart: those are first confirmed by the server (INIT-REBOOT), and go on if no server says anything. A lease of the same
// link and MAC that is kept already is replaced.
func (c *Client) Keep(lease Lease) error {
	if err := lease.validate(); err != nil {
		return fmt.Errorf("keep lease %s: %w", lease, err)
	}
	l, err := c.lan(lease.Request)
	if err != nil {
		return fmt.Errorf("keep lease %s: %w", lease, err)
	}
	ctx, cancel := context.WithCancel(c.life)
	k := &keeper{Client: c, lan: l, lease: lease, cancel: cancel, done: make(chan struct{})}

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		cancel()
		return fmt.Errorf("keep lease %s: %w", lease, os.ErrClosed)
	}
	k.previous = c.kept[lease.key()]
	if k.previous != nil {
		k.previous.cancel()
	}
	c.kept[lease.key()] = k
	go k.run(ctx, lease.Obtained.Before(c.started))
	return nil
}

// Release gives a lease back and stops keeping it. Of a lease that is kept its present state counts. There are no events about
// it afterwards. A lease that has expired is merely forgotten, as is one whose server does not hear: servers do not answer.
func (c *Client) Release(ctx context.Context, lease Lease) error {
	if err := c.release(ctx, lease); err != nil {
		return fmt.Errorf("release %s: %w", lease, err)
	}
	return nil
}

func (c *Client) release(ctx context.Context, lease Lease) error {
	c.mu.Lock()
	k := c.kept[lease.key()]
	delete(c.kept, lease.key())
	c.mu.Unlock()
	if k != nil {
		k.cancel()
		select {
		case <-k.done:
			lease = k.current()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := lease.validate(); err != nil {
		return err
	}
	if !time.Now().Before(lease.Expires()) {
		return nil
	}
	l, err := c.lan(lease.Request)
	if err != nil {
		return err
	}
	x := l.begin(lease.MAC)
	defer x.end()
	return x.release(lease)
}

// Leases lists the leases that are kept, by link and MAC. One whose time is over is listed too, as long as it is asked for.
func (c *Client) Leases() []Lease {
	c.mu.Lock()
	defer c.mu.Unlock()
	leases := make([]Lease, 0, len(c.kept))
	for _, k := range c.kept {
		leases = append(leases, k.current())
	}
	slices.SortFunc(leases, func(a, b Lease) int { return a.key().compare(b.key()) })
	return leases
}

// Close stops everything and releases nothing: the leases go on until their time is over. There are no events afterwards,
// and an Obtain that is under way fails.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	kept, lans := c.kept, c.lans
	c.kept, c.lans = map[key]*keeper{}, map[lanKey]*lan{}
	c.mu.Unlock()
	c.end()
	for _, k := range kept {
		<-k.done
	}
	for _, l := range lans {
		l.close()
	}
	if c.namespace == nil {
		return nil
	}
	return c.namespace.Close()
}

// lanKey is a link and whether it is for IPv6: each has a transport of its own.
type lanKey struct {
	link string
	ipv6 bool
}

func (c *Client) lan(r Request) (*lan, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, os.ErrClosed
	}
	k := lanKey{r.Link, r.IPv6}
	l := c.lans[k]
	if l == nil {
		l = newLAN(r.Link, r.protocol(), c.open, c.log)
		c.lans[k] = l
	}
	return l, nil
}
