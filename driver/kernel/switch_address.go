package kernel

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A hostAddress is an address as the kernel lists it: struct ifaddrmsg and attributes. It is copied
// with every attribute, known here or not.
type hostAddress []byte

// hostAddresses lists the addresses of a link, in an order in which they can be added: IPv4 as listed,
// where secondaries follow their primary, and IPv6 the other way round, because the kernel puts an
// address before others of its scope.
func (k *Kernel) hostAddresses(ctx context.Context, l *link) ([]hostAddress, error) {
	var out []hostAddress
	for _, family := range k.families() {
		bodies, err := k.route.dump(ctx, unix.RTM_GETADDR, addressBody(family, 0, l.index, nil))
		if isGone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", l.name, err)
		}
		if family == unix.AF_INET6 {
			slices.Reverse(bodies)
		}
		for _, body := range bodies {
			if index, _, ok := parseAddress(body); ok && index == l.index {
				out = append(out, body)
			}
		}
	}
	return out, nil
}

func (a hostAddress) six() bool { return a[0] == unix.AF_INET6 }

func (a hostAddress) prefix() netip.Prefix {
	_, p, _ := parseAddress(a)
	return p
}

func (a hostAddress) linkLocal() bool { return a.six() && a.prefix().Addr().IsLinkLocalUnicast() }

func (a hostAddress) flags() uint32 {
	if flags, ok := attribute(a[unix.SizeofIfAddrmsg:], unix.IFA_FLAGS); ok {
		return number32(flags)
	}
	return uint32(a[2])
}

// same reports whether a link can have only one of the two.
func (a hostAddress) same(b hostAddress) bool {
	if a[0] != b[0] {
		return false
	}
	if a.six() {
		return a.prefix().Addr() == b.prefix().Addr()
	}
	peer := func(a hostAddress) string {
		value, _ := attribute(a[unix.SizeofIfAddrmsg:], unix.IFA_ADDRESS)
		return string(value)
	}
	return a.prefix() == b.prefix() && peer(a) == peer(b)
}

// on is the address on another link.
func (a hostAddress) on(from, to *link, flags uint32) []byte {
	body := slices.Clone(a[:unix.SizeofIfAddrmsg])
	body[2] = byte(flags)
	binary.NativeEndian.PutUint32(body[4:], uint32(to.index))
	var list attrs
	for kind, value := range rawAttributes(a[unix.SizeofIfAddrmsg:]) {
		switch kindOf(kind) {
		case unix.IFA_FLAGS:
			continue
		case unix.IFA_LABEL:
			list = list.str(kind, relabel(text(value), from.name, to.name))
			continue
		case unix.IFA_CACHEINFO:
			value = slices.Clone(value)
			if len(value) >= 8 && number32(value[4:]) == 0 { // ifa_valid
				binary.NativeEndian.PutUint32(value[4:], 1) // in its last second; none is refused
			}
		}
		list = list.put(kind, value)
	}
	return append(body, list.u32(unix.IFA_FLAGS, flags)...)
}

// relabel changes a link's name at the beginning of a label ("eth1", "eth1:0") to another's, if there
// is room.
func relabel(label, from, to string) string {
	rest, ok := strings.CutPrefix(label, from)
	if !ok || rest != "" && rest[0] != ':' || len(to)+len(rest) >= unix.IFNAMSIZ {
		return label
	}
	return to + rest
}

// addAddresses adds addresses to a link, as far as they are not there.
func addAddresses(addresses, there []hostAddress, from, to *link) []message {
	var out []message
	for _, a := range addresses {
		put := func(mode uint16, flags uint32) {
			out = append(out, message{
				kind: unix.RTM_NEWADDR, flags: unix.NLM_F_ACK | mode, body: a.on(from, to, flags),
				about: fmt.Sprintf("add %s to %s", a.prefix(), to.name),
			})
		}
		flags := a.flags()
		now := slices.IndexFunc(there, a.same)
		if !a.six() {
			if now < 0 {
				put(unix.NLM_F_CREATE, flags)
			}
			continue
		}
		// What was found to be nobody else's need not be proved again, which takes a second. The mark
		// for it stays on the address: it is taken off afterwards.
		proved := flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0
		if now >= 0 && proved && there[now].flags()&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == unix.IFA_F_TENTATIVE {
			out = append(out, removeAddresses(there[now:now+1])...) // the kernel has made it anew, and is proving it
			now = -1
		}
		if now < 0 {
			if proved {
				flags |= unix.IFA_F_NODAD
			}
			put(unix.NLM_F_CREATE, flags)
		} else {
			flags = there[now].flags()
		}
		if proved && flags&^a.flags()&unix.IFA_F_NODAD != 0 {
			put(unix.NLM_F_REPLACE, a.flags())
		}
	}
	return out
}

func removeAddresses(addresses []hostAddress) []message {
	var out []message
	for _, a := range addresses {
		out = append(out, message{kind: unix.RTM_DELADDR, flags: unix.NLM_F_ACK, body: a, about: fmt.Sprintf("remove %s", a.prefix())})
	}
	return out
}

// outdated removes the link-local address that the kernel made of the MAC that a switch had, when its
// uplink returns with another MAC and the address that goes with it. Whoever gets the card that is
// gone has that address.
func (k *Kernel) outdated(ctx context.Context, uplink, bridge *link) ([]message, error) {
	if uplink.mac == bridge.mac {
		return nil, nil
	}
	brought, err := k.hostAddresses(ctx, uplink)
	if err != nil || !slices.ContainsFunc(brought, hostAddress.linkLocal) {
		return nil, err
	}
	m := bridge.mac
	made := netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]}) // RFC 4291, appendix A
	there, err := k.hostAddresses(ctx, bridge)
	if err != nil {
		return nil, err
	}
	return removeAddresses(slices.DeleteFunc(there, func(a hostAddress) bool { return a.prefix().Addr() != made })), nil
}

// dropAddresses removes all addresses of a link.
func (k *Kernel) dropAddresses(ctx context.Context, l *link) error {
	addresses, err := k.hostAddresses(ctx, l)
	if err != nil {
		return err
	}
	slices.Reverse(addresses)
	return k.change(ctx, isGone, removeAddresses(addresses)...)
}
