package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// neighbourBody is struct ndmsg and attributes, see rtnetlink(7).
func neighbourBody(index int32, state uint16, flags byte, a netip.Addr) []byte {
	family := byte(unix.AF_INET6)
	if a.Is4() {
		family = unix.AF_INET
	}
	b := []byte{family, 0, 0, 0}
	b = append(b, native32(uint32(index))...)
	b = binary.NativeEndian.AppendUint16(b, state)
	b = append(b, flags, 0)
	return append(b, attrs{}.put(unix.NDA_DST, a.AsSlice())...)
}

// States of a neighbour whose address is known, if not for sure (RFC 4861, section 7.3.2).
const known = unix.NUD_REACHABLE | unix.NUD_STALE | unix.NUD_DELAY | unix.NUD_PROBE | unix.NUD_PERMANENT | unix.NUD_NOARP

// A nearby is who has an address on a link.
type nearby struct {
	link    int32
	address netip.Addr
	mac     plan.MAC // zero: it does not answer
	state   uint16
}

// Neighbour gives the MAC of a neighbour on a link, as the kernel knows it, and has the kernel find
// it out, or make sure that it is still true, when it does not know. It is zero while the neighbour
// does not answer. From then on Watch ticks when it is another.
func (k *Kernel) Neighbour(ctx context.Context, name string, a netip.Addr) (plan.MAC, error) {
	l, err := k.link(ctx, name)
	if err != nil {
		return plan.MAC{}, err
	}
	if l == nil {
		return plan.MAC{}, fmt.Errorf("link %s: %w", name, unix.ENODEV)
	}
	n, err := k.neighbour(ctx, l.index, a)
	if err != nil {
		return plan.MAC{}, err
	}
	k.asked.told(n)
	if n.state&(unix.NUD_REACHABLE|unix.NUD_PERMANENT|unix.NUD_NOARP) != 0 {
		return n.mac, nil
	}
	use := message{kind: unix.RTM_NEWNEIGH, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE, body: neighbourBody(l.index, unix.NUD_NONE, unix.NTF_USE, a)}
	if _, err := k.route.request(ctx, use); err != nil {
		return n.mac, fmt.Errorf("look for %s on %s: %w", a, name, err)
	}
	return n.mac, nil
}

func (k *Kernel) neighbour(ctx context.Context, index int32, a netip.Addr) (nearby, error) {
	unknown := nearby{link: index, address: a}
	bodies, err := k.route.request(ctx, message{kind: unix.RTM_GETNEIGH, body: neighbourBody(index, 0, 0, a)})
	if errors.Is(err, unix.ENOENT) || isGone(err) {
		return unknown, nil
	}
	if err != nil {
		return unknown, fmt.Errorf("look up %s: %w", a, err)
	}
	if len(bodies) > 0 {
		if n, ok := parseNeighbour(bodies[0]); ok {
			return n, nil
		}
	}
	return unknown, nil
}

// parseNeighbour reads struct ndmsg and attributes; entries of bridges' tables have no address.
func parseNeighbour(body []byte) (n nearby, ok bool) {
	if len(body) < unix.SizeofNdMsg {
		return n, false
	}
	n.link = int32(binary.NativeEndian.Uint32(body[4:]))
	n.state = binary.NativeEndian.Uint16(body[8:])
	for kind, value := range attributes(body[unix.SizeofNdMsg:]) {
		switch kind {
		case unix.NDA_DST:
			n.address, ok = netip.AddrFromSlice(value)
		case unix.NDA_LLADDR:
			if n.state&known != 0 {
				copy(n.mac[:], value)
			}
		}
	}
	return n, ok
}

// questions are the neighbours that were asked for, and what was told of them.
type questions struct {
	mu  sync.Mutex
	mac map[nearby]plan.MAC // by link and address
}

func (q *questions) told(n nearby) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.mac == nil {
		q.mac = map[nearby]plan.MAC{}
	}
	q.mac[nearby{link: n.link, address: n.address}] = n.mac
}

// news reports whether a neighbour that was asked for is another than was told.
func (q *questions) news(n nearby) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	mac, asked := q.mac[nearby{link: n.link, address: n.address}]
	return asked && mac != n.mac
}
