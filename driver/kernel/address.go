package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// addressBody is struct ifaddrmsg and attributes.
func addressBody(family byte, bits int, index int32, a attrs) []byte {
	b := []byte{family, byte(bits), 0, unix.RT_SCOPE_UNIVERSE}
	b = append(b, native32(uint32(index))...)
	return append(b, a...)
}

var errHostsAddress = errors.New("addresses on a switch are the host's, and no plan may name them")

// putAddress adds an address; one that is there is fine.
func (k *Kernel) putAddress(ctx context.Context, a plan.Address) error {
	l, err := k.mine(ctx, a.Link)
	if err != nil {
		return err
	}
	if l == nil {
		return fmt.Errorf("link %s: %w", a.Link, unix.ENODEV)
	}
	if isSwitch(l.name) {
		return errHostsAddress
	}
	_, err = k.route.request(ctx, message{kind: unix.RTM_NEWADDR, flags: unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_REPLACE, body: addressOf(l.index, a.Prefix)})
	return err
}

// deleteAddress removes an address; one that is not there is fine.
func (k *Kernel) deleteAddress(ctx context.Context, a plan.Address) error {
	l, err := k.mine(ctx, a.Link)
	if err != nil || l == nil {
		return err
	}
	if isSwitch(l.name) {
		return errHostsAddress
	}
	_, err = k.route.request(ctx, message{kind: unix.RTM_DELADDR, flags: unix.NLM_F_ACK, body: addressOf(l.index, a.Prefix)})
	if isGone(err) {
		return nil
	}
	return err
}

func addressOf(index int32, p netip.Prefix) []byte {
	address := p.Addr().AsSlice()
	a := attrs{}.put(unix.IFA_LOCAL, address).put(unix.IFA_ADDRESS, address)
	if p.Addr().Is4() {
		return addressBody(unix.AF_INET, p.Bits(), index, a)
	}
	// Nobody else can have an address on a switch of ours: no duplicate address detection, which
	// would keep it from being used for a second.
	return addressBody(unix.AF_INET6, p.Bits(), index, a.u32(unix.IFA_FLAGS, unix.IFA_F_NODAD))
}

// observeAddresses lists the addresses of links of ours: of one when index is not 0, else of all.
func (k *Kernel) observeAddresses(ctx context.Context, index int32, names map[int32]string, out plan.State) error {
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		bodies, err := k.route.dump(ctx, unix.RTM_GETADDR, addressBody(family, 0, index, nil))
		if isGone(err) || errors.Is(err, unix.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for _, body := range bodies {
			index, prefix, ok := parseAddress(body)
			if name := names[index]; ok && name != "" {
				out.Add(plan.Address{Link: name, Prefix: prefix})
			}
		}
	}
	return nil
}

func parseAddress(body []byte) (index int32, p netip.Prefix, ok bool) {
	const size = unix.SizeofIfAddrmsg
	if len(body) < size {
		return 0, p, false
	}
	value, found := attribute(body[size:], unix.IFA_LOCAL)
	if !found {
		value, _ = attribute(body[size:], unix.IFA_ADDRESS)
	}
	a, _ := netip.AddrFromSlice(value)
	p = netip.PrefixFrom(a, int(body[1]))
	return int32(binary.NativeEndian.Uint32(body[4:])), p, p.IsValid()
}

// observeAddressKeys looks addresses up that are named by link and prefix.
func (k *Kernel) observeAddressKeys(ctx context.Context, keys []plan.Key, out plan.State) error {
	wanted := map[string]bool{}
	var names []string
	for _, key := range keys {
		name, _, ok := strings.Cut(key.Name, " ")
		if !ok {
			return fmt.Errorf("%s: not of the form link prefix", key)
		}
		if !wanted[name] {
			wanted[name] = true
			names = append(names, name)
		}
	}
	links, err := k.links(ctx, names...)
	if err != nil {
		return err
	}
	found := plan.State{}
	for _, l := range links {
		if l == nil || !l.ours() || isSwitch(l.name) {
			continue
		}
		if err := k.observeAddresses(ctx, l.index, map[int32]string{l.index: l.name}, found); err != nil {
			return err
		}
	}
	for _, key := range keys {
		if o, ok := found[key]; ok {
			out.Add(o)
		}
	}
	return nil
}
