package ipam

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// PoolRequest is Docker's IpamDriver.RequestPool.
type PoolRequest struct {
	Space   string            // Local or Global
	Pool    string            // --subnet: a prefix, or empty to choose one, or 0.0.0.0/26 to choose one of that length
	SubPool string            // --ip-range: a prefix in Pool, or empty
	Options map[string]string // --ipam-opt, and on a swarm's leader more of the engine's own
	V6      bool              // which family to choose; a swarm's leader leaves it unset for given IPv6 pools too
}

// AddressRequest is Docker's IpamDriver.RequestAddress.
type AddressRequest struct {
	PoolID  string
	Address string            // --ip, --gateway or --aux-address, or empty to choose one
	Options map[string]string // what the address is for
	// Endpoint says that the caller knows the address to be a container's, which engines before 29 do not tell of a
	// given one.
	Endpoint bool
}

// The options that engines send along with requests (Docker's contract; none of them is the user's).
const (
	engineOptions = "com.docker.network."

	optionType   = "RequestAddressType"
	typeGateway  = engineOptions + "gateway"
	optionMAC    = engineOptions + "endpoint.macaddress"
	optionName   = engineOptions + "endpoint.name"
	optionSerial = engineOptions + "ipam.serial" // a swarm's leader, for everything
)

// Kind is what an address is for.
type Kind string

const (
	// Gateway is the address of the network itself.
	Gateway Kind = "gateway"
	// Auxiliary is an address set apart with --aux-address, for a machine that is none of Docker's.
	Auxiliary Kind = "auxiliary"
	// Endpoint is a container's address, or a service's.
	Endpoint Kind = "endpoint"
)

// kind tells what an address is requested for. A given address without any word on whom it is for is an auxiliary one: for an
// endpoint, engines send its MAC address when the driver wants it (RequiresMACAddress), and its name from 29 on.
func (r AddressRequest) kind() Kind {
	if r.Options[optionType] == typeGateway {
		return Gateway
	}
	if r.Endpoint {
		return Endpoint
	}
	for _, o := range []string{optionMAC, optionName, optionSerial} {
		if r.Options[o] != "" {
			return Endpoint
		}
	}
	if r.Address == "" {
		return Endpoint
	}
	return Auxiliary
}

// wanted is a pool request that makes sense.
type wanted struct {
	space         Space
	subnet, inner netip.Prefix // invalid: to be chosen
	v6            bool         // which family to choose
	size          int          // prefix length to choose, 0: as configured
	open          bool         // its addresses can be leased
}

func parsePoolRequest(r PoolRequest) (wanted, error) {
	w := wanted{space: Space(r.Space), v6: r.V6}
	if w.space != Local && w.space != Global {
		return wanted{}, fmt.Errorf("address space %q is %w: it must be %s or %s", r.Space, invalid, Local, Global)
	}
	for _, key := range slices.Sorted(maps.Keys(r.Options)) {
		switch {
		case key == optionType, strings.HasPrefix(key, engineOptions):
		case key != optionDHCP:
			return wanted{}, fmt.Errorf("ipam option %q is %w: the only one is dhcp=true; for all else use --subnet, --ip-range, --gateway and --aux-address", key, invalid)
		case !slices.Contains([]string{"true", "false", "ipv4", "ipv6"}, r.Options[key]):
			return wanted{}, fmt.Errorf("ipam option dhcp=%q is %w: use true, false, ipv4 or ipv6", r.Options[key], invalid)
		}
	}
	w.open = r.Pool == "" || r.leases(r.V6)
	if r.Pool == "" {
		return w, w.noRange(r.SubPool)
	}
	subnet, err := netip.ParsePrefix(r.Pool)
	if err != nil {
		return wanted{}, fmt.Errorf("subnet %q is %w: write it as 10.80.0.0/24 or fd00:80::/64", r.Pool, invalid)
	}
	if r.V6 && subnet.Addr().Is4() {
		return wanted{}, fmt.Errorf("subnet %s is %w: an IPv6 subnet is requested", subnet, invalid)
	}
	if subnet.Addr().IsUnspecified() {
		w.v6, w.size = subnet.Addr().Is6(), subnet.Bits()
		return w, w.noRange(r.SubPool)
	}
	w.open = r.leases(subnet.Addr().Is6())
	w.subnet = subnet.Masked()
	if err := checkSubnet(w.subnet); err != nil {
		return wanted{}, err
	}
	w.inner = w.subnet
	if r.SubPool != "" {
		inner, err := netip.ParsePrefix(r.SubPool)
		if err != nil {
			return wanted{}, fmt.Errorf("range %q is %w: write it as 10.80.0.128/25 or fd00:80::8000/113", r.SubPool, invalid)
		}
		w.inner = inner.Masked()
		if w.inner.Bits() < w.subnet.Bits() || !w.subnet.Contains(w.inner.Addr()) {
			return wanted{}, fmt.Errorf("range %s is %w: it is not inside the subnet %s", inner, invalid, w.subnet)
		}
	}
	if first, last := bounds(w.subnet, w.inner); first.Compare(last) > 0 {
		return wanted{}, fmt.Errorf("range %s is %w: it has no address that a container could have", w.inner, invalid)
	}
	return w, nil
}

// leases says whether the addresses of a family are asked for by DHCP, though there is a subnet.
func (r PoolRequest) leases(v6 bool) bool {
	family := "ipv4"
	if v6 {
		family = "ipv6"
	}
	return r.Options[optionDHCP] == "true" || r.Options[optionDHCP] == family
}

func (w wanted) noRange(subPool string) error {
	if subPool != "" {
		return fmt.Errorf("range %q is %w without a subnet that it is inside of", subPool, invalid)
	}
	return nil
}

// parseAddress reads an address; the empty string is the invalid one.
func parseAddress(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return netip.Addr{}, fmt.Errorf("address %q is %w: write it as 10.80.0.2 or fd00:80::2", s, invalid)
	case a.Is4In6():
		return netip.Addr{}, fmt.Errorf("address %q is %w: write it as %s", s, invalid, a.Unmap())
	case a.Zone() != "":
		return netip.Addr{}, fmt.Errorf("address %q is %w: it must not name an interface", s, invalid)
	}
	return a, nil
}

// bounds returns the first and the last address of a range that a container can have. In IPv4 the subnet's first and last
// address are the network's and the broadcast address, except in a /31 (RFC 3021) and a /32; in IPv6 the first one is the
// routers' anycast address (RFC 4291, section 2.6.1), except in a /127 (RFC 6164) and a /128.
func bounds(subnet, inner netip.Prefix) (first, last netip.Addr) {
	first, last = inner.Addr(), lastAddr(inner)
	if subnet.Bits() >= subnet.Addr().BitLen()-1 {
		return first, last
	}
	if first == subnet.Addr() {
		first = first.Next()
	}
	if last.Is4() && last == lastAddr(subnet) {
		last = last.Prev()
	}
	return first, last
}

// checkAddress refuses a given address that no container or gateway in the subnet can have.
func checkAddress(subnet netip.Prefix, a netip.Addr) error {
	if !subnet.Contains(a) {
		return fmt.Errorf("address %s is %w: it is not in the subnet %s", a, invalid, subnet)
	}
	first, last := bounds(subnet, subnet)
	switch {
	case a.Compare(first) < 0 && a.Is4():
		return fmt.Errorf("address %s is %w: it is the network address of %s", a, invalid, subnet)
	case a.Compare(first) < 0:
		return fmt.Errorf("address %s is %w: it is the routers' anycast address of %s", a, invalid, subnet)
	case a.Compare(last) > 0:
		return fmt.Errorf("address %s is %w: it is the broadcast address of %s", a, invalid, subnet)
	}
	return nil
}
