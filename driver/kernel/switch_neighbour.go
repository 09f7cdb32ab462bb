package kernel

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

const sizeofNDMsg = 12 // struct ndmsg

// A neighbour is an entry of the neighbour table as the kernel lists it: struct ndmsg and attributes.
type neighbour []byte

func (n neighbour) state() uint16 { return binary.NativeEndian.Uint16(n[8:]) }
func (n neighbour) proxy() bool   { return n[10]&unix.NTF_PROXY != 0 }

// set reports whether somebody has set the entry; others are found out anew.
func (n neighbour) set() bool { return n.proxy() || n.state()&unix.NUD_PERMANENT != 0 }

// neighbours lists the neighbours on a link whose MAC is known, and what the host answers for there.
func (k *Kernel) neighbours(ctx context.Context, l *link) ([]neighbour, error) {
	const known = unix.NUD_PERMANENT | unix.NUD_REACHABLE | unix.NUD_STALE | unix.NUD_DELAY | unix.NUD_PROBE
	var out []neighbour
	for _, family := range k.families() {
		for _, flags := range []byte{0, unix.NTF_PROXY} {
			request := make([]byte, sizeofNDMsg)
			request[0], request[10] = family, flags
			if flags == 0 {
				request = append(request, attrs{}.u32(unix.NDA_IFINDEX, uint32(l.index))...)
			}
			bodies, err := k.route.dump(ctx, unix.RTM_GETNEIGH, request)
			if isGone(err) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list neighbours on %s: %w", l.name, err)
			}
			for _, body := range bodies {
				if len(body) < sizeofNDMsg || body[0] != family || binary.NativeEndian.Uint32(body[4:]) != uint32(l.index) {
					continue
				}
				if n := neighbour(body); n.proxy() || n.state()&known != 0 {
					out = append(out, n)
				}
			}
		}
	}
	return out, nil
}

// copyNeighbours tells a link which neighbours another knows, so that no packet has to wait.
func copyNeighbours(list []neighbour, to *link) []message {
	var out []message
	for _, n := range list {
		body := slices.Clone(n[:sizeofNDMsg])
		binary.NativeEndian.PutUint32(body[4:], uint32(to.index))
		switch {
		case n.proxy(): // the state of those is not listed; any other goes when carrier does
			binary.NativeEndian.PutUint16(body[8:], unix.NUD_PERMANENT)
		case !n.set():
			binary.NativeEndian.PutUint16(body[8:], unix.NUD_STALE) // to be used, and soon to be checked
		}
		var list attrs
		for kind, value := range rawAttributes(n[sizeofNDMsg:]) {
			if k := kindOf(kind); k != unix.NDA_CACHEINFO && k != unix.NDA_PROBES {
				list = list.put(kind, value)
			}
		}
		out = append(out, message{kind: unix.RTM_NEWNEIGH, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_EXCL, body: append(body, list...), about: "neighbour on " + to.name})
	}
	return out
}

// dropNeighbours removes what somebody has set on a link.
func dropNeighbours(list []neighbour) []message {
	var out []message
	for _, n := range list {
		if !n.set() {
			continue
		}
		body := slices.Clone(n[:sizeofNDMsg])
		if address, ok := attribute(n[sizeofNDMsg:], unix.NDA_DST); ok {
			body = append(body, attrs{}.put(unix.NDA_DST, address)...)
		}
		out = append(out, message{kind: unix.RTM_DELNEIGH, flags: unix.NLM_F_ACK, body: body, about: "remove neighbour"})
	}
	return out
}
