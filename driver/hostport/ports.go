// Package hostport holds the host's published ports with sockets, and relays the connections that arrive at them.
//
// Published traffic does not come this way: nftables translates its destination before a socket is
// looked for. What is left for the sockets is to keep the port from everybody else on the host,
// and the traffic that no rule may translate: to a loopback address (that would take
// route_localnet), and of IPv6 clients to a container that has only IPv4. A relayed container sees
// the host's address, not the client's, and a relay ends with the process.
//
// It is not for deciding which ports are published, nor for reaching a container from outside. SCTP
// ports are held, where the kernel has SCTP, but not relayed: the host's own clients reach them at
// every address but loopback. Without SCTP in the kernel they are held against one another only; so
// is a port of every IPv6 address of a host that has no IPv6.
package hostport

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// The protocols of a plan.HostPort.
const (
	tcp  = "tcp"
	udp  = "udp"
	sctp = "sctp"
)

// Ports holds host ports in one network namespace. It is safe for concurrent use.
//
// All sockets belong to one loop, on one thread that stays in the namespace; what follows the
// line below is touched in its turn only. A held port costs one
// socket and one small structure, never a goroutine; a relayed TCP connection costs two
// goroutines, a UDP client none.
type Ports struct {
	log     *logrus.Entry
	limits  limits
	loop    *loop
	holders holders
	relays  sync.WaitGroup // the goroutines of TCP relays

	// ---

	held    map[number][]*port
	closed  bool
	origins map[origin]int // where our own connections come from, to notice a relay to ourselves
	active  int            // TCP relays and UDP flows
	paused  map[*port]bool // listeners that wait for a free file descriptor
	rearmAt time.Time
	flowing map[*port]bool // ports that have UDP flows
	sweepAt time.Time
	buffer  []byte // of one datagram
	oob     []byte // of its ancillary data
	full    seldom
	failing seldom
	looping seldom
}

// number is a port whatever the address.
type number struct {
	proto string
	port  uint16
}

// New makes a Ports for the network namespace of the calling thread. It raises the process's soft
// limit of open files to the hard one, since every port takes a file descriptor. It fails when the
// process lacks file descriptors, or /proc.
func New(log *logrus.Entry) (*Ports, error) {
	files, err := raiseFileLimit()
	if err != nil {
		log.WithError(err).Warn("raise the limit of open files")
	}
	return newPorts(log, limitsFor(files))
}

func newPorts(log *logrus.Entry, l limits) (*Ports, error) {
	p := &Ports{
		log:     log,
		limits:  l,
		held:    map[number][]*port{},
		origins: map[origin]int{},
		paused:  map[*port]bool{},
		flowing: map[*port]bool{},
		buffer:  make([]byte, 1<<16),
		oob:     make([]byte, 256),
	}
	var err error
	if p.loop, err = startLoop(p.tick); err != nil {
		return nil, fmt.Errorf("start holding host ports: %w", err)
	}
	return p, nil
}

// Hold takes the port and listens on it. A port that is held already gets the new target: TCP
// connections that are open stay with the old one, UDP clients, who may go on for ever, go to the
// new one with their next datagram.
//
// The error is a *plan.PortInUseError when somebody else has the port. Otherwise it wraps what the
// kernel said (bind(2), ip(7)): EADDRNOTAVAIL for an address that the host does not have, EACCES
// for a privileged port without CAP_NET_BIND_SERVICE, EMFILE and ENFILE; or net.ErrClosed.
func (p *Ports) Hold(hp plan.HostPort) error {
	err := validate(hp)
	if err == nil {
		err = p.hold(hp)
	}
	var inUse *plan.PortInUseError
	if err == nil || errors.As(err, &inUse) {
		return err
	}
	return fmt.Errorf("hold host port %s/%s: %w", hp.Host, hp.Proto, err)
}

func (p *Ports) hold(hp plan.HostPort) error {
	var err error
	diag := -1
	if !p.loop.doInside(func() {
		if err = p.take(hp); errors.Is(err, unix.EADDRINUSE) {
			diag = openDiag() // in the namespace; the asking is left to the caller's goroutine
		}
	}) {
		return net.ErrClosed
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return &plan.PortInUseError{Port: hp, Holder: p.holders.of(hp, diag)}
	}
	return err
}

// Release lets the port go, with the connections that it relays: they are reset. A port that is
// not held is fine.
func (p *Ports) Release(hp plan.HostPort) error {
	p.loop.do(func() {
		if o := p.find(hp); o != nil {
			p.drop(o)
		}
	})
	return nil
}

// Lookup gives the port of this key as it is held, in constant time.
func (p *Ports) Lookup(key plan.Key) (plan.HostPort, bool) {
	var hp plan.HostPort
	found := false
	p.loop.do(func() {
		if o := p.find(fromKey(key)); o != nil {
			hp, found = o.hp, true
		}
	})
	return hp, found
}

// Held lists the ports, sorted. What the kernel took away is not in it.
func (p *Ports) Held() []plan.HostPort {
	var all []plan.HostPort
	p.loop.do(func() {
		for _, ports := range p.held {
			for _, o := range ports {
				all = append(all, o.hp)
			}
		}
	})
	slices.SortFunc(all, func(a, b plan.HostPort) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), a.Host.Compare(b.Host))
	})
	return all
}

// Close lets all ports go and returns when nothing is left of them. Hold fails from then on.
func (p *Ports) Close() error {
	p.loop.do(func() {
		for _, ports := range p.held {
			for _, o := range slices.Clone(ports) {
				p.drop(o)
			}
		}
		p.closed = true
	})
	p.relays.Wait()
	p.loop.post(p.loop.stop)
	<-p.loop.done
	return nil
}

// tick does what is due and says how long the loop may wait until it is called again; negative
// is for ever.
func (p *Ports) tick() time.Duration {
	now := p.limits.now()
	wait := time.Duration(-1)
	if len(p.paused) > 0 {
		if wait = p.rearmAt.Sub(now); wait <= 0 {
			p.resume()
			wait = -1
		}
	}
	if len(p.flowing) > 0 {
		if !p.sweepAt.After(now) {
			p.sweep(now)
			p.sweepAt = now.Add(p.limits.idle / 8)
		}
		if left := p.sweepAt.Sub(now); len(p.flowing) > 0 && (wait < 0 || left < wait) {
			wait = left
		}
	}
	return wait
}

// validate refuses what can only be a mistake.
func validate(hp plan.HostPort) error {
	target := hp.Target.Addr().Unmap()
	switch {
	case hp.Proto != tcp && hp.Proto != udp && hp.Proto != sctp:
		return fmt.Errorf("unknown protocol %q: want tcp, udp or sctp", hp.Proto)
	case !hp.Host.Addr().IsValid() || hp.Host.Port() == 0:
		return errors.New("the host's side wants an address and a port")
	case !target.IsValid() || hp.Target.Port() == 0:
		return fmt.Errorf("target %s: want an address and a port", hp.Target)
	case target.IsUnspecified() || target.IsLoopback() || target.IsMulticast():
		return fmt.Errorf("target %s: %s is never the address of a container", hp.Target, target)
	}
	return nil
}
