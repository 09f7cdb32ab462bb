package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// isTransit reports whether a link's name promises an end of a pair that leads from the host to a
// network namespace of ours.
func isTransit(name string) bool { return strings.HasPrefix(name, transitPrefix) }

// putTransit makes a pair, or makes one what the plan wants. A pair that leads elsewhere is made anew.
func (k *Kernel) putTransit(ctx context.Context, t plan.Transit) error {
	if !isTransit(t.Name) || !isTransit(t.Peer) {
		return fmt.Errorf("the names of a link to a network namespace begin with %q", transitPrefix)
	}
	child, leave, err := k.enter(t.Namespace)
	if err != nil {
		return err
	}
	if child == nil {
		return fmt.Errorf("network namespace %s: %w", t.Namespace, unix.ENOENT)
	}
	defer leave()
	old, err := k.mine(ctx, t.Name)
	if err != nil {
		return err
	}
	if old != nil {
		end, err := k.otherEnd(ctx, old)
		if err != nil {
			return err
		}
		if end.link == nil || end.namespace != t.Namespace || end.name != t.Peer {
			if _, err := k.route.request(ctx, deleteLink(t.Name)); err != nil && !isGone(err) {
				return err
			}
		}
	}
	shape := attrs{}.u32(unix.IFLA_MTU, uint32(t.MTU)).u32(unix.IFLA_NUM_TX_QUEUES, 1).u32(unix.IFLA_NUM_RX_QUEUES, 1)
	peer := append(attrs{}.str(unix.IFLA_IFNAME, t.Peer).u32(unix.IFLA_GROUP, doomedGroup).
		u32(unix.IFLA_NET_NS_FD, uint32(child.namespace.Fd())), shape...)
	create := createLink(t.Name, append(shape, attrs{}.
		nest(unix.IFLA_LINKINFO, attrs{}.str(unix.IFLA_INFO_KIND, kindVeth).
			nest(unix.IFLA_INFO_DATA, attrs{}.nest(nl.VETH_INFO_PEER, linkBody(0, 0, 0, peer))))...))
	configure := func(name string) message {
		return tuneLink(name, k.withoutAutoconf(attrs{}.
			u32(unix.IFLA_GROUP, 0).u32(unix.IFLA_MTU, uint32(t.MTU)).str(unix.IFLA_IFALIAS, t.Alias), t.MTU))
	}
	if err := k.putLink(ctx, t.Name, kindVeth, t.MTU, create, configure(t.Name)); err != nil {
		return err
	}
	// By itself: with carrier at once, an end would have an IPv6 address before it is told to have none.
	for _, step := range []struct {
		by *socket
		message
	}{{child.route, configure(t.Peer)}, {k.route, changeLink(t.Name, t.Up, nil)}, {child.route, changeLink(t.Peer, t.Up, nil)}} {
		if _, err := step.by.request(ctx, step.message); err != nil {
			return err
		}
	}
	return nil
}

// An otherEnd is where a pair leads.
type otherEnd struct {
	namespace string
	*link
}

// otherEnd looks up where a link leads that is one of a pair, if that is in a namespace of ours: its
// link is nil if not.
func (k *Kernel) otherEnd(ctx context.Context, l *link) (otherEnd, error) {
	name, err := k.namespaceOf(l.nsid)
	if err != nil || name == "" {
		return otherEnd{}, err
	}
	child, leave, err := k.enter(name)
	if err != nil || child == nil {
		return otherEnd{}, err
	}
	defer leave()
	ends, err := child.linksByIndex(ctx, l.beyond)
	if err != nil {
		return otherEnd{}, fmt.Errorf("network namespace %s: %w", name, err)
	}
	return otherEnd{name, ends[0]}, nil
}

// namespaceOf names the namespace of ours that has a number in the host's; empty: none has.
func (k *Kernel) namespaceOf(nsid int32) (string, error) {
	if nsid < 0 {
		return "", nil
	}
	find := func() string {
		k.children.Lock()
		defer k.children.Unlock()
		for name, child := range k.children.byName {
			if child.nsid == nsid {
				return name
			}
		}
		return ""
	}
	if name := find(); name != "" {
		return name, nil
	}
	err := k.openAll()
	return find(), err
}

// observeTransits looks pairs up by name: in the host, whose they are.
func (k *Kernel) observeTransits(ctx context.Context, names []string, out plan.State) error {
	if k.parent != nil || len(names) == 0 {
		return nil
	}
	links, err := k.links(ctx, names...)
	if err != nil {
		return err
	}
	return k.observeTransitLinks(ctx, links, out)
}

// observeTransitLinks shows pairs of ours. Of one whose ends do not match, nothing is right.
func (k *Kernel) observeTransitLinks(ctx context.Context, links []*link, out plan.State) error {
	for _, l := range links {
		if l == nil || !l.ours() || !isTransit(l.name) {
			continue
		}
		end, err := k.otherEnd(ctx, l)
		if err != nil {
			return err
		}
		t := plan.Transit{Name: l.name, Alias: l.alias}
		if l.kind == kindVeth && end.link != nil && end.ours() && end.alias == l.alias && end.mtu == l.mtu {
			t.Namespace, t.Peer, t.MTU, t.Up = end.namespace, end.name, l.mtu, l.up && end.up
		}
		out.Add(t)
	}
	return nil
}

// numberOf is the number that a namespace has in the host's. The kernel gives it one when it is first
// asked to, and it keeps that.
func (k *Kernel) numberOf(ctx context.Context, namespace *os.File) (int32, error) {
	const unassigned = ^uint32(0)                                         // NETNSA_NSID_NOT_ASSIGNED
	body := func(a attrs) []byte { return append(make([]byte, 4), a...) } // struct rtgenmsg
	fd := attrs{}.u32(unix.NETNSA_FD, uint32(namespace.Fd()))
	_, err := k.route.request(ctx, message{kind: unix.RTM_NEWNSID, flags: unix.NLM_F_ACK, body: body(append(fd, attrs{}.u32(unix.NETNSA_NSID, unassigned)...))})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, fmt.Errorf("number a network namespace: %w", err)
	}
	bodies, err := k.route.request(ctx, message{kind: unix.RTM_GETNSID, body: body(fd)})
	if err != nil || len(bodies) == 0 || len(bodies[0]) < 4 {
		return -1, fmt.Errorf("number of a network namespace: %w", err)
	}
	number, _ := attribute(bodies[0][4:], unix.NETNSA_NSID)
	return int32(value(number, true)), nil
}
