package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

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

// Neighbour gives the MAC of a neighbour on a link, as the kernel knows it, and has the kernel find
// it out, or make sure that it is still true, when it does not know. It is zero while the neighbour
// does not answer.
func (k *Kernel) Neighbour(ctx context.Context, name string, a netip.Addr) (plan.MAC, error) {
	l, err := k.link(ctx, name)
	if err != nil {
		return plan.MAC{}, err
	}
	if l == nil {
		return plan.MAC{}, fmt.Errorf("link %s: %w", name, unix.ENODEV)
	}
	mac, state, err := k.neighbour(ctx, l.index, a)
	if err != nil || state&(unix.NUD_REACHABLE|unix.NUD_PERMANENT|unix.NUD_NOARP) != 0 {
		return mac, err
	}
	use := message{kind: unix.RTM_NEWNEIGH, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE, body: neighbourBody(l.index, unix.NUD_NONE, unix.NTF_USE, a)}
	if _, err := k.route.request(ctx, use); err != nil {
		return mac, fmt.Errorf("look for %s on %s: %w", a, name, err)
	}
	return mac, nil
}

func (k *Kernel) neighbour(ctx context.Context, index int32, a netip.Addr) (mac plan.MAC, state uint16, err error) {
	bodies, err := k.route.request(ctx, message{kind: unix.RTM_GETNEIGH, body: neighbourBody(index, 0, 0, a)})
	if errors.Is(err, unix.ENOENT) || isGone(err) {
		return mac, unix.NUD_NONE, nil
	}
	if err != nil {
		return mac, 0, fmt.Errorf("look up %s: %w", a, err)
	}
	const size = unix.SizeofNdMsg
	if len(bodies) == 0 || len(bodies[0]) < size {
		return mac, unix.NUD_NONE, nil
	}
	state = binary.NativeEndian.Uint16(bodies[0][8:])
	if address, ok := attribute(bodies[0][size:], unix.NDA_LLADDR); ok && state&known != 0 {
		copy(mac[:], address)
	}
	return mac, state, nil
}
