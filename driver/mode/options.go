package mode

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/dockway/dockway/driver/plan"
)

// Name is the name of a mode.
type Name string

// The modes, by HNS's names.
const (
	NAT         Name = "nat"
	Transparent Name = "transparent"
	Overlay     Name = "overlay"
	L2Bridge    Name = "l2bridge"
	L2Tunnel    Name = "l2tunnel"
)

// Options are a network's options, parsed.
type Options struct {
	Mode        Name       `json:"mode"`
	Interface   string     `json:"interface,omitempty"`    // the uplink, or a bridge of the host's
	VLAN        int        `json:"vlan,omitempty"`         // 1 to 4094; 0: untagged
	Macvlan     bool       `json:"macvlan,omitempty"`      // backend=macvlan: no switch, the host's uplink stays as it is
	HostAccess  bool       `json:"host_access,omitempty"`  // of backend macvlan: the host reaches its containers
	Name        string     `json:"name,omitempty"`         // network_name
	MTU         int        `json:"mtu"`                    // bytes, without the Ethernet header; 0: the uplink's
	DisableICC  bool       `json:"disable_icc,omitempty"`  // endpoints of the network cannot reach each other
	MACPool     []MACRange `json:"mac_pool,omitempty"`     // empty: locally administered addresses
	SLAAC       bool       `json:"slaac,omitempty"`        // containers make IPv6 addresses of their own from the LAN's router advertisements
	StableMAC   bool       `json:"stable_mac,omitempty"`   // a container of the same name has the same MAC
	IfacePrefix string     `json:"iface_prefix,omitempty"` // of the link in the container; the engine adds a number
	SlowPath    bool       `json:"slow_path,omitempty"`    // fast_path=false: all frames go by the bridge and its rules

	VSIDs       []uint32       `json:"vsids,omitempty"`                   // VXLAN network identifiers, one for each subnet of a family, in their order
	OutboundNAT bool           `json:"outbound_nat,omitempty"`            // the network leads outside, with the host's address
	Exceptions  []netip.Prefix `json:"outbound_nat_exceptions,omitempty"` // destinations that see the container's address
}

// MACRange is a range of Ethernet addresses, both ends included (HNS: MacPool.Ranges).
type MACRange struct {
	Start plan.MAC `json:"start"`
	End   plan.MAC `json:"end"`
}

// option is one -o option: where it is defined, it is documented.
type option struct {
	name    string
	aliases []string // accepted for the same thing
	modes   []Name   // where it applies
	value   string   // what it takes, for people
	doc     string
	set     func(*Options, string) error
	engines bool // for the engine itself, which leaves it among the driver's
}

const (
	windows = "com.docker.network.windowsshim."
	engine  = "com.docker.network."
)

// The size of an IPv4 datagram that every host must accept (RFC 791), and of an IPv6 link (RFC 8200).
const (
	minMTU  = 68
	minMTU6 = 1280
	maxMTU  = 65535

	defaultMTU = 1500
)

// The highest VLAN identifier that is not reserved (IEEE 802.1Q, table 9-2).
const maxVLAN = 4094

// The VXLAN network identifiers that HNS allows: those below are for VLANs.
const (
	minVSID = 4096
	maxVSID = 16777214
)

// Where options apply.
var (
	every     = []Name{NAT, Transparent, Overlay, L2Bridge, L2Tunnel}
	onWire    = []Name{Transparent, L2Bridge, L2Tunnel}
	tunnelled = []Name{Overlay}
)

var (
	linkName  = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_.-]{0,11}$`) // with room for a number
	wholeName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_.-]{0,14}$`) // IFNAMSIZ
)

// options lists every option of every mode. An option without modes is known, so that it is
// refused with a reason rather than as a misspelling.
var options = []option{
	{name: "mode", modes: every, value: "`nat`, `transparent`, `overlay`, `l2bridge` or `l2tunnel`", doc: "How the network reaches the outside. `nat` unless given.", set: func(o *Options, v string) error {
		switch m := Name(v); m {
		case NAT, Transparent, Overlay, L2Bridge, L2Tunnel:
			o.Mode = m
			return nil
		}
		return errors.New("not a mode: use nat, transparent, overlay, l2bridge or l2tunnel")
	}},
	{name: "interface", aliases: []string{windows + "interface"}, modes: onWire, value: "a link's name", doc: "The uplink: a network interface of the host, whose addresses and routes move to the switch; or a bridge of the host's, which is used as it is. Required.", set: func(o *Options, v string) error {
		if strings.Contains(v, ",") {
			return errors.New("this version takes one interface: for several, make a bond and name it")
		}
		if !isLinkName(v) {
			return fmt.Errorf("not the name of a network interface: that has 1 to %d characters, as `ip link` shows it", linkNameSize)
		}
		o.Interface = v
		return nil
	}},
	{name: "vlan", aliases: []string{windows + "vlanid"}, modes: onWire, value: "1 to 4094", doc: "VLAN on the uplink (IEEE 802.1Q): frames leave with this tag, and only frames with it come in. Untagged unless given.", set: func(o *Options, v string) error {
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 || n > maxVLAN {
			return fmt.Errorf("not a VLAN identifier from 1 to %d", maxVLAN)
		}
		o.VLAN = n // 0 is HNS's way to say none
		return nil
	}},
	{name: "backend", modes: []Name{Transparent}, value: "`bridge` or `macvlan`", doc: "How containers share the uplink: by a switch, which takes the uplink's addresses, or as macvlan links of it, which leave the host as it is but cannot be firewalled. `bridge` unless given.", set: func(o *Options, v string) error {
		if v != "bridge" && v != "macvlan" {
			return errors.New("use bridge or macvlan")
		}
		o.Macvlan = v == "macvlan"
		return nil
	}},
	{name: "host_access", modes: []Name{Transparent}, value: "`true` or `false`", doc: "With `backend=macvlan`, lets the host reach its containers, and them it, by a macvlan link of its own. With `backend=bridge` they always can, but in a VLAN.", set: func(o *Options, v string) (err error) {
		o.HostAccess, err = parseBool(v)
		return err
	}},
	{name: "slaac", modes: []Name{Transparent}, value: "`true` or `false`", doc: "Containers may make IPv6 addresses of their own from the router advertisements of the LAN (RFC 4862), and ask its DHCPv6 server. What they send is then bound to their Ethernet address only. Engines from 28 on switch IPv6 off in containers without an address from them: set `disable_ipv6` as below.", set: func(o *Options, v string) (err error) {
		o.SLAAC, err = parseBool(v)
		return err
	}},
	{name: "fast_path", modes: []Name{Transparent, Overlay}, value: "`true` or `false`", doc: "TCP and UDP go past the bridge and its rules where these change nothing, by eBPF. With `false` every frame goes by the bridge, where rules of your own see it. `true` unless given.", set: func(o *Options, v string) error {
		fast, err := parseBool(v)
		o.SlowPath = !fast
		return err
	}},
	{name: "mtu", aliases: []string{engine + "driver.mtu"}, modes: every, value: "68 to 65535, from 1280 with IPv6", doc: "Largest packet in bytes in the containers, and on a nat network's bridge. Unless given, 1500 with nat, the uplink's with modes on the wire, and with overlay that of the link between the hosts less the encapsulation.", set: func(o *Options, v string) error {
		n, err := strconv.Atoi(v)
		if err != nil || n < minMTU || n > maxMTU {
			return fmt.Errorf("not a number of bytes from %d to %d", minMTU, maxMTU)
		}
		o.MTU = n
		return nil
	}},
	{name: "disable_icc", aliases: []string{windows + "disableicc"}, modes: every, value: "`true` or `false`", doc: "Containers of the network cannot reach each other, except through published ports.", set: func(o *Options, v string) (err error) {
		o.DisableICC, err = parseBool(v)
		return err
	}},
	{name: "mac_pool", aliases: []string{windows + "macpool"}, modes: every, value: "`start,end[,start,end…]`", doc: "Ranges that containers' Ethernet addresses are taken from. Locally administered addresses unless given.", set: func(o *Options, v string) (err error) {
		o.MACPool, err = parseMACPool(v)
		return err
	}},
	{name: "mac", modes: []Name{NAT, Transparent, L2Bridge, L2Tunnel}, value: "`address` or `stable`", doc: "What a container's Ethernet address follows from: its IP address (where a DHCP server gives that, it is random); or, with `stable`, its name, so that a container that is made again keeps a DHCP server's reservation. Engines tell the name from version 29 on, and only `--ipam-driver dockway:latest`. `address` unless given.", set: func(o *Options, v string) error {
		if v != "address" && v != "stable" {
			return errors.New("use address or stable")
		}
		o.StableMAC = v == "stable"
		return nil
	}},
	{name: "network_name", aliases: []string{windows + "networkname"}, modes: every, value: "1 to 128 characters", doc: "A name for messages, the log and `dockway networks --json`; the engine does not tell drivers its own.", set: func(o *Options, v string) error {
		if v == "" || len(v) > 128 || strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return errors.New("a name has 1 to 128 printable characters")
		}
		o.Name = v
		return nil
	}},
	{name: "iface_prefix", aliases: []string{engine + "container_iface_prefix"}, modes: every, value: "up to 12 letters, digits, `_`, `-` and `.`, a letter first", doc: "What the container's link is called before its number. `eth` unless given.", set: func(o *Options, v string) error {
		if !linkName.MatchString(v) {
			return errors.New("a link's name begins with a letter and has up to 12 letters, digits, '_', '-' or '.'")
		}
		o.IfacePrefix = v
		return nil
	}},
	{name: "dns_servers", aliases: []string{windows + "dnsservers"}},
	{name: "dns_suffix", aliases: []string{windows + "dnssuffix"}},
	{name: "vsid", aliases: []string{windows + "vsid"}, modes: tunnelled, value: "4096 to 16777214[,…]", doc: "VXLAN network identifier: networks of the same identifier are one network, on all hosts. With several subnets, one for each, in the order of the subnets' addresses. Required.", set: func(o *Options, v string) error {
		for part := range strings.SplitSeq(v, ",") {
			n, err := strconv.ParseUint(strings.TrimSpace(part), 10, 32)
			if err != nil || n < minVSID || n > maxVSID {
				return fmt.Errorf("%q is not a VXLAN network identifier from %d to %d", part, minVSID, maxVSID)
			}
			if slices.Contains(o.VSIDs, uint32(n)) {
				return fmt.Errorf("%d is there twice: each subnet has its own", n)
			}
			o.VSIDs = append(o.VSIDs, uint32(n))
		}
		return nil
	}},
	{name: "outbound_nat", aliases: []string{windows + "enable_outboundnat"}, modes: tunnelled, value: "`true` or `false`", doc: "The network itself leads outside, by its gateway and with the address of the host that the container is on; the engine's gateway network is not used, and ports cannot be published. `false` unless given.", set: func(o *Options, v string) (err error) {
		o.OutboundNAT, err = parseBool(v)
		return err
	}},
	{name: "outbound_nat_exceptions", aliases: []string{windows + "outboundnat_exceptions"}, modes: tunnelled, value: "`prefix[,prefix…]`", doc: "With `outbound_nat`, destinations that see the container's own address. They need a route back to it by this host.", set: func(o *Options, v string) error {
		for part := range strings.SplitSeq(v, ",") {
			p, err := netip.ParsePrefix(strings.TrimSpace(part))
			if err != nil || p != p.Masked() {
				return fmt.Errorf("%q is not a network prefix such as 192.0.2.0/24", part)
			}
			o.Exceptions = append(o.Exceptions, p)
		}
		return nil
	}},
	{name: "encrypted", modes: tunnelled, value: "`false`", doc: "Whether what goes from host to host is encrypted. This version cannot, and refuses `true`.", set: func(_ *Options, v string) error {
		if on, err := parseBool(v); err != nil || !on {
			return err
		}
		return errors.New("this version does not encrypt what goes from host to host: leave it out and keep the link between the hosts private, or encrypt that link")
	}},
	// What engines leave among a driver's options though it is theirs.
	{name: engine + "enable_ipv4", engines: true},
	{name: engine + "enable_ipv6", engines: true},
	{name: engine + "advertise_addr_nmsgs", engines: true},
	{name: engine + "advertise_addr_ms", engines: true},
}

// refused says why a known option cannot be had with a mode.
func refused(name string, m Name) string {
	switch name {
	case "dns_servers":
		return "the engine writes a container's resolv.conf, not its network driver: use docker run --dns"
	case "dns_suffix":
		return "the engine writes a container's resolv.conf, not its network driver: use docker run --dns-search"
	case "interface":
		if m == Overlay {
			return "the hosts of a cluster reach each other at the address that ADVERTISE sets (docker plugin set), for all overlay networks"
		}
		return "a nat network has no uplink of its own: it leaves by the host's routes"
	case "vlan":
		return fmt.Sprintf("a network of mode %s is not on the wire, so it has no VLAN", m)
	case "mac":
		return "an Ethernet address that an address, or a name, always leads to could be on two hosts at once: give docker run --mac-address"
	case "encrypted":
		return "only overlay networks have a link between hosts to encrypt"
	case "vsid":
		return "only overlay networks have a VXLAN identifier"
	case "outbound_nat", "outbound_nat_exceptions":
		if m == NAT {
			return "a nat network always translates what leaves it"
		}
		return "this version leaves the container's address as it is"
	case "backend", "host_access":
		return "only transparent networks have a choice of backend"
	}
	return "it is not for this mode"
}

// ParseOptions reads a network's -o options. The error names the option and says what to do.
func ParseOptions(given map[string]string) (Options, error) {
	o := Options{Mode: NAT, IfacePrefix: "eth"}
	seen := map[string]string{}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		opt, ok := findOption(key)
		if !ok {
			return Options{}, fmt.Errorf("option %q is not known: did you mean %q?", key, nearest(key))
		}
		if other, twice := seen[opt.name]; twice && given[other] != given[key] {
			return Options{}, fmt.Errorf("options %q and %q are the same thing with different values: give one", other, key)
		}
		seen[opt.name] = key
		if opt.set == nil {
			continue
		}
		if err := opt.set(&o, given[key]); err != nil {
			return Options{}, fmt.Errorf("option %s=%q: %w", key, given[key], err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(seen)) {
		if opt, _ := findOption(name); !opt.engines && !slices.Contains(opt.modes, o.Mode) {
			return Options{}, fmt.Errorf("option %q cannot be used with mode %s: %s", seen[name], o.Mode, refused(name, o.Mode))
		}
	}
	if o.Mode == NAT && o.MTU == 0 {
		o.MTU = defaultMTU
	}
	return o, nil
}

// ParseEndpointOptions reads an endpoint's options (docker run --network name=…,driver-opt=K=V): the name of its
// link in the container, if it is to have one.
func ParseEndpointOptions(given map[string]string) (ifName string, err error) {
	const ifNameKey = engine + "endpoint.ifname"
	for _, key := range slices.Sorted(maps.Keys(given)) {
		if key != ifNameKey {
			return "", fmt.Errorf("endpoint option %q is not known: there is %s alone", key, ifNameKey)
		}
		if ifName = given[key]; !wholeName.MatchString(ifName) {
			return "", fmt.Errorf("endpoint option %s=%q: a link's name begins with a letter and has up to 15 letters, digits, '_', '-' or '.'", key, ifName)
		}
	}
	return ifName, nil
}

// OptionsTable prints the options of a mode as a Markdown table, for its page in docs.
func OptionsTable(mode Name) string {
	var b strings.Builder
	b.WriteString("| option | also accepted as | value | meaning |\n| --- | --- | --- | --- |\n")
	for _, o := range options {
		if !slices.Contains(o.modes, mode) {
			continue
		}
		aliases := make([]string, len(o.aliases))
		for i, a := range o.aliases {
			aliases[i] = "`" + a + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", o.name, strings.Join(aliases, ", "), o.value, o.doc)
	}
	return b.String()
}

func findOption(key string) (option, bool) {
	for _, o := range options {
		if o.name == key || slices.Contains(o.aliases, key) {
			return o, true
		}
	}
	return option{}, false
}

// nearest is the valid option whose spelling is closest to key.
func nearest(key string) string {
	best, least := "", 1<<30
	for _, o := range options {
		if o.set == nil {
			continue // no good advice
		}
		for _, name := range append([]string{o.name}, o.aliases...) {
			if d := distance(strings.ToLower(key), name); d < least {
				best, least = name, d
			}
		}
	}
	return best
}

// distance is the Levenshtein distance of a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// isLinkName reports whether v can be the name of a link of the host's.
func isLinkName(v string) bool {
	return v != "" && len(v) <= linkNameSize && v != "." && v != ".." && !strings.ContainsAny(v, "/:%\"") &&
		!strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

func parseBool(v string) (bool, error) {
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, errors.New("use true or false")
	}
	return b, nil
}

func parseMACPool(v string) ([]MACRange, error) {
	parts := strings.Split(v, ",")
	if len(parts)%2 != 0 {
		return nil, errors.New("give pairs of start,end")
	}
	var pool []MACRange
	for i := 0; i < len(parts); i += 2 {
		start, err := ParseMAC(strings.TrimSpace(parts[i]))
		if err != nil {
			return nil, err
		}
		end, err := ParseMAC(strings.TrimSpace(parts[i+1]))
		if err != nil {
			return nil, err
		}
		if macNumber(end) < macNumber(start) {
			return nil, fmt.Errorf("range %s to %s ends before it begins", start, end)
		}
		pool = append(pool, MACRange{start, end})
	}
	return pool, nil
}

// ParseMAC reads a unicast Ethernet address, with colons or dashes.
func ParseMAC(s string) (plan.MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return plan.MAC{}, fmt.Errorf("%q is not an Ethernet address such as 02:42:ac:11:00:02", s)
	}
	m := plan.MAC(hw)
	if m[0]&1 != 0 {
		return plan.MAC{}, fmt.Errorf("%s is a multicast address, a container needs a unicast one (even first byte)", m)
	}
	return m, nil
}

// ChooseMAC gives an endpoint an Ethernet address: from the pool, or a locally administered one.
// It is the same for the same seed unless taken says that somebody has it. The error says
// that the pool is used up.
func (o Options) ChooseMAC(seed string, taken func(plan.MAC) bool) (plan.MAC, error) {
	sum := sha256.Sum256([]byte("mac " + seed))
	number := binary.BigEndian.Uint64(sum[:8])
	if len(o.MACPool) == 0 {
		for ; ; number++ {
			m := macOf(number)
			m[0] = m[0]&^1 | 2 // unicast, locally administered (IEEE 802, section 8.4)
			if !taken(m) {
				return m, nil
			}
		}
	}
	var size uint64
	for _, r := range o.MACPool {
		size += macNumber(r.End) - macNumber(r.Start) + 1
	}
	for i := range size {
		at := (number%size + i) % size
		for _, r := range o.MACPool {
			n := macNumber(r.End) - macNumber(r.Start) + 1
			if at >= n {
				at -= n
				continue
			}
			if m := macOf(macNumber(r.Start) + at); m[0]&1 == 0 && !taken(m) {
				return m, nil
			}
			break
		}
		if i > maxEndpoints { // more addresses tried than endpoints can hold
			break
		}
	}
	return plan.MAC{}, errors.New("every Ethernet address of mac_pool is taken: enlarge the pool")
}

func macNumber(m plan.MAC) uint64 {
	return binary.BigEndian.Uint64(append([]byte{0, 0}, m[:]...))
}

func macOf(n uint64) (m plan.MAC) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n)
	copy(m[:], b[2:])
	return m
}
