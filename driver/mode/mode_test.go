package mode

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
	"github.com/dockway/dockway/driver/policy"
)

var update = flag.Bool("update", false, "write the golden files and the generated parts of docs")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s is not what is planned (go test -update ./driver/mode writes it); got:\n%s", path, got)
	}
}

func sample() (Network, []Endpoint) {
	n := Network{
		ID: "0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9", Options: Options{Mode: NAT, MTU: 1500, IfacePrefix: "eth"},
		IPv4: []Subnet{{Pool: netip.MustParsePrefix("198.18.7.0/24"), Gateway: netip.MustParseAddr("198.18.7.1")}},
		IPv6: []Subnet{{Pool: netip.MustParsePrefix("fd00:7::/64"), Gateway: netip.MustParseAddr("fd00:7::1")}},
	}
	published := func(proto policy.Protocol, host, container string) policy.Binding {
		return policy.Binding{Protocol: proto, Host: netip.MustParseAddrPort(host), Container: netip.MustParseAddrPort(container)}
	}
	return n, []Endpoint{
		{
			ID: "1111111111111111aaaa", NetworkID: n.ID, Joined: true, MAC: plan.MAC{2, 0x42, 0, 0, 0, 2},
			Address: netip.MustParsePrefix("198.18.7.2/24"), Address6: netip.MustParsePrefix("fd00:7::2/64"),
			Bindings: []policy.Binding{
				published(policy.TCP, "0.0.0.0:8080", "198.18.7.2:80"), published(policy.TCP, "[::]:8080", "[fd00:7::2]:80"),
				published(policy.UDP, "127.0.0.1:5353", "198.18.7.2:53"), published(policy.SCTP, "198.18.0.1:38412", "198.18.7.2:38412"),
			},
		},
		{
			ID: "2222222222222222bbbb", NetworkID: n.ID, Joined: true, MAC: plan.MAC{2, 0x42, 0, 0, 0, 3},
			Address:  netip.MustParsePrefix("198.18.7.3/24"),
			Bindings: []policy.Binding{published(policy.TCP, "0.0.0.0:8081", "198.18.7.3:80"), published(policy.TCP, "[::]:8081", "198.18.7.3:80")},
		},
		{ID: "3333333333333333cccc", NetworkID: n.ID, MAC: plan.MAC{2, 0x42, 0, 0, 0, 4}, Address: netip.MustParsePrefix("198.18.7.4/24")},
	}
}

// TestGolden keeps what a nat network programs readable, and every change of it visible.
func TestGolden(t *testing.T) {
	golden(t, "inet.nft", InetTable().String())
	golden(t, "bridge.nft", BridgeTable().String())
	n, endpoints := sample()
	golden(t, "nat.plan", Plan(n, endpoints).String())
	n.Internal, n.Options.DisableICC = true, true
	golden(t, "nat-internal.plan", Plan(n, endpoints[:1]).String())
	golden(t, "host.plan", Host([]string{"eth0", "br0"}).String())
	n.Internal = false
	golden(t, "host-ipv6.plan", Host([]string{"eth0"}, n).String())
}

// onTheWire is a network of an external mode and its endpoints.
func onTheWire(m Name) (Network, []Endpoint) {
	n, endpoints := sample()
	n.Options.Mode, n.Options.MTU, n.Options.Interface = m, 0, "eth1"
	n.Wire = Wire{MAC: plan.MAC{2, 0, 0, 0, 0, 1}, MTU: 1500, Gateway: plan.MAC{2, 0, 0, 0, 0, 0xfe}}
	for i := range endpoints {
		endpoints[i].External = true
		if m == Transparent {
			endpoints[i].Bindings = nil
		}
		if m == L2Tunnel {
			endpoints[i].Address6 = netip.Prefix{}
		}
	}
	if m == L2Tunnel {
		n.IPv6 = nil
		endpoints[0].Bindings = endpoints[0].Bindings[:1]
	}
	return n, endpoints
}

// TestGoldenWire does so for the external modes.
func TestGoldenWire(t *testing.T) {
	for _, m := range onWire {
		n, endpoints := onTheWire(m)
		golden(t, string(m)+".plan", Plan(n, endpoints).String())
	}
	n, endpoints := onTheWire(L2Bridge)
	n.Options.VLAN = 20
	golden(t, "l2bridge-vlan.plan", Plan(n, endpoints[:1]).String())
	n, endpoints = onTheWire(L2Tunnel)
	n.Options.VLAN = 20
	golden(t, "l2tunnel-vlan.plan", Plan(n, endpoints[:1]).String())
	n, endpoints = onTheWire(Transparent)
	n.Options.Macvlan, n.Options.HostAccess = true, true
	n.Wire.Host, n.Wire.Host6 = netip.MustParseAddr("198.18.7.200"), netip.MustParseAddr("fd00:7::200")
	golden(t, "macvlan.plan", Plan(n, endpoints[:1]).String())
	n, endpoints = onTheWire(Transparent)
	n.Wire.Foreign, n.Options.Interface = true, "br0"
	golden(t, "foreign.plan", Plan(n, endpoints[:1]).String())
}

// TestGoesByTheSwitch: where rules of the switch can change or drop TCP and UDP, or the wire is not known,
// or it was asked for, nothing goes past it.
func TestGoesByTheSwitch(t *testing.T) {
	shortcuts := func(n Network, endpoints []Endpoint) (count int) {
		for key := range Plan(n, endpoints) {
			if key.Kind == plan.KindShortcut {
				count++
			}
		}
		return count
	}
	for what, change := range map[string]func(*Network){
		"vlan":        func(n *Network) { n.Options.VLAN = 20 },
		"foreign":     func(n *Network) { n.Wire.Foreign = true },
		"macvlan":     func(n *Network) { n.Options.Macvlan = true },
		"disable_icc": func(n *Network) { n.Options.DisableICC = true },
		"fast_path":   func(n *Network) { n.Options.SlowPath = true },
		"l2bridge":    func(n *Network) { n.Options.Mode = L2Bridge },
		"mtu":         func(n *Network) { n.Options.MTU = n.Wire.MTU + 1 }, // since the uplink carries less than it did
	} {
		n, endpoints := onTheWire(Transparent)
		if got := shortcuts(n, endpoints); got != 3 {
			t.Errorf("an uplink and two ports have %d shortcuts", got)
		}
		change(&n)
		if got := shortcuts(n, endpoints); got != 0 {
			t.Errorf("%s: %d shortcuts", what, got)
		}
	}
	n, endpoints, _ := spanning()
	before := shortcuts(n, endpoints)
	n.Options.SlowPath = true
	if after := shortcuts(n, endpoints); before == 0 || after != 0 {
		t.Errorf("an overlay has %d shortcuts, and with fast_path=false %d", before, after)
	}
	if o, err := ParseOptions(map[string]string{"mode": "transparent", "interface": "eth1", "fast_path": "false"}); err != nil || !o.SlowPath {
		t.Errorf("fast_path=false: %+v, %v", o, err)
	}
}

// spanning is an overlay network, its endpoints, and those on other hosts.
func spanning() (Network, []Endpoint, []Remote) {
	n, endpoints := sample()
	n.Options.Mode, n.Options.MTU, n.Options.VSIDs = Overlay, 0, []uint32{5001}
	n.Span(netip.MustParseAddr("198.18.0.1"), 1500, 14789)
	for i := range endpoints {
		endpoints[i].Bindings = nil
	}
	other := netip.MustParseAddr("198.18.0.2")
	return n, endpoints, []Remote{
		{VSID: 5001, Address: netip.MustParseAddr("198.18.7.65"), MAC: plan.MAC{2, 0x42, 0, 0, 0, 65}, VTEP: other, Host: "two"},
		{VSID: 5001, Address: netip.MustParseAddr("fd00:7::65"), MAC: plan.MAC{2, 0x42, 0, 0, 0, 65}, VTEP: other, Host: "two"},
		{VSID: 5002, Address: netip.MustParseAddr("198.18.7.66"), MAC: plan.MAC{2, 0x42, 0, 0, 0, 66}, VTEP: other, Host: "two"},
	}
}

// TestGoldenOverlay does so for the overlay mode, in which a namespace has tables of its own.
func TestGoldenOverlay(t *testing.T) {
	for _, table := range NamespaceTables() {
		golden(t, "namespace-"+string(table.Family)+".nft", table.String())
	}
	n, endpoints, remotes := spanning()
	golden(t, "overlay.plan", Plan(n, endpoints).Merge(PlanRemotes(n, remotes), PlanPeers(n.Wire.Local, n.Wire.Port, []netip.Addr{remotes[0].VTEP})).String())
	n.Options.VSIDs, n.Options.DisableICC = []uint32{5001, 5002}, true
	n.IPv4 = append(n.IPv4, Subnet{Pool: netip.MustParsePrefix("198.18.8.0/24"), Gateway: netip.MustParseAddr("198.18.8.1")})
	n.Options.OutboundNAT, n.Options.Exceptions, n.Transit = true, []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}, 1
	golden(t, "overlay-outbound.plan", Plan(n, nil).String())
}

// TestForwarding: the host forwards for the first endpoint that leaves it, not for a network, which is there before
// an engine that starts has set the policy of FORWARD.
func TestForwarding(t *testing.T) {
	nat, endpoints := sample()
	tunnelled, _, _ := spanning()
	outbound := tunnelled
	outbound.Options.OutboundNAT, outbound.Transit = true, 1
	for name, c := range map[string]struct {
		network Network
		forward bool
	}{"nat": {nat, true}, "overlay": {tunnelled, false}, "overlay with outbound_nat": {outbound, true}} {
		forwards := func(s plan.State) bool { return s[routing4.Key()] != nil || s[routing6.Key()] != nil }
		if forwards(Plan(c.network, nil)) {
			t.Errorf("%s: a network without endpoints has the host forward", name)
		}
		if forwards(Plan(c.network, endpoints)) != c.forward {
			t.Errorf("%s: with endpoints the host forwards: %v, want %v", name, !c.forward, c.forward)
		}
	}
}

// TestOverlayRefuses what no overlay can be.
func TestOverlayRefuses(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Network)
		want   string
	}{
		{"nothing", func(*Network) {}, ""},
		{"no VSID", func(n *Network) { n.Options.VSIDs = nil }, "-o vsid=5001"},
		{"too many VSIDs", func(n *Network) { n.Options.VSIDs = []uint32{5001, 5002} }, "1 subnets of a family and 2 VXLAN identifiers"},
		{"internal with a way out", func(n *Network) { n.Internal, n.Options.OutboundNAT = true, true }, "leave one of them out"},
		{"exceptions without NAT", func(n *Network) { n.Options.Exceptions = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} }, "give both"},
		{"a way out without gateway", func(n *Network) { n.Options.OutboundNAT, n.IPv4[0].Gateway = true, netip.Addr{} }, "--gateway"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n, _, _ := spanning()
			tt.change(&n)
			if err := Validate(n); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	n, _, _ := spanning()
	n.Options.MTU = 1451
	if err := ValidateWire(n); err == nil {
		t.Error("an MTU of 1451 fits into a link of 1500, of which VXLAN takes 50")
	}
	n.Options.MTU = 1450
	if err := ValidateWire(n); err != nil {
		t.Error(err)
	}
}

// TestSegments: subnets have their VXLAN identifiers by their addresses, in whatever order an engine
// tells of them.
func TestSegments(t *testing.T) {
	n, _, _ := spanning()
	n.Options.VSIDs = []uint32{5001, 5002}
	subnet := func(pool string) Subnet { return Subnet{Pool: netip.MustParsePrefix(pool)} }
	low, high := subnet("198.18.7.0/24"), subnet("198.18.8.0/24")
	low6, high6 := subnet("fd00:7::/64"), subnet("fd00:8::/64")
	n.IPv4, n.IPv6 = []Subnet{high, low}, []Subnet{low6, high6}
	for i, want := range []segment{{5001, low, low6}, {5002, high, high6}} {
		if got := n.segments()[i]; got.VSID != want.VSID || got.IPv4.Pool != want.IPv4.Pool || got.IPv6.Pool != want.IPv6.Pool {
			t.Errorf("segment %d is %+v, want %+v", i, got, want)
		}
	}
}

// TestTransits: no two networks of a host have an address of their way out in common.
func TestTransits(t *testing.T) {
	seen := map[netip.Addr]int{}
	for n := 1; n <= MaxTransits; n++ {
		for _, ipv6 := range []bool{false, true} {
			for _, plain := range []bool{false, true} {
				host, namespace := transitPair(n, ipv6, plain)
				for _, p := range []netip.Prefix{host, namespace} {
					if other := seen[p.Addr()]; other != 0 || !(transit4.Contains(p.Addr()) || transit6.Contains(p.Addr())) || host.Masked() != namespace.Masked() {
						t.Fatalf("network %d has %s to %s; network %d has it already, or it is outside of %s and %s", n, host, namespace, other, transit4, transit6)
					}
					seen[p.Addr()] = n
				}
			}
		}
	}
}

// TestLinkNames: names of what networks share are readable where they fit, and never too long.
func TestLinkNames(t *testing.T) {
	for _, tt := range []struct {
		uplink string
		vlan   int
		want   string // empty: only that it fits
	}{
		{"eth1", 0, "dwxeth1"}, {"eth1", 20, "dwxeth1.20"}, {"enp0s31f6", 0, "dwxenp0s31f6"},
		{"enp0s31f6", 4094, ""}, {"wlx00c0caa1b2c3d", 0, ""}, {"fifteen-letters", 20, ""},
	} {
		n := Network{Options: Options{Mode: Transparent, Interface: tt.uplink, VLAN: tt.vlan}}
		if got := n.Bridge(); tt.want != "" && got != tt.want || len(got) > linkNameSize || !strings.HasPrefix(got, "dwx") {
			t.Errorf("the switch of %s, VLAN %d, is called %q", tt.uplink, tt.vlan, got)
		}
	}
}

// TestPages compares the generated parts of the modes' pages with the code.
func TestPages(t *testing.T) {
	for _, m := range every {
		t.Run(string(m), func(t *testing.T) { comparePage(t, m) })
	}
}

func comparePage(t *testing.T, m Name) {
	path := filepath.Join("..", "..", "docs", "modes", string(m)+".md")
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(page)
	for mark, part := range map[string]string{
		"options": OptionsTable(m),
		"rules":   "```\n" + rules(m) + "```\n",
	} {
		begin := strings.Index(text, "<!-- "+mark)
		end := strings.Index(text, "<!-- end of "+mark)
		if begin < 0 || end < begin {
			t.Fatalf("%s has no place for the %s", path, mark)
		}
		begin += strings.Index(text[begin:], "\n") + 1
		if text[begin:end] != part {
			if !*update {
				t.Errorf("%s: the %s are not those of the code (go test -update ./driver/mode writes them)", path, mark)
			}
			text = text[:begin] + part + text[end:]
		}
	}
	if *update {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// rules are the part of the rules that a mode's page is about.
func rules(m Name) string {
	onWire := append(slices.Clone(externalChains), published, sent)
	part := func(t *nft.Table, sets []*nft.Set, chains []*nft.Chain) string {
		t.Sets = slices.DeleteFunc(t.Sets, func(s *nft.Set) bool { return !slices.Contains(sets, s) })
		t.Chains = slices.DeleteFunc(t.Chains, func(c *nft.Chain) bool { return !slices.Contains(chains, c) })
		return t.String()
	}
	switch m {
	case NAT:
		inet := InetTable()
		inet.Sets = slices.DeleteFunc(inet.Sets, func(s *nft.Set) bool { return slices.Contains(externalInet, s) || slices.Contains(overlayInet, s) })
		inet.Chains = slices.DeleteFunc(inet.Chains, func(c *nft.Chain) bool { return slices.Contains(onWire, c) || slices.Contains(overlayChains, c) })
		return inet.String() + portTable(nil, nil).String()
	case Overlay:
		return part(InetTable(), overlayInet, append(slices.Clone(overlayChains), sent)) + namespaceInet().String()
	case Transparent:
		return part(BridgeTable(), externalSets, onWire)
	}
	return part(BridgeTable(), externalSets, onWire) + part(InetTable(), externalInet, onWire)
}

// TestPlanIsTheSumOfItsEndpoints is what lets the service converge one endpoint by itself.
func TestPlanIsTheSumOfItsEndpoints(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, endpoints := sample()
		n.Internal = rapid.Bool().Draw(t, "internal")
		chosen := endpoints[:rapid.IntRange(0, len(endpoints)).Draw(t, "endpoints")]
		sum := Plan(n, nil)
		size := len(sum)
		shared := 0
		for _, e := range chosen {
			part := PlanEndpoint(n, e)
			for key := range part {
				if key.Kind == plan.KindSysctl {
					if _, twice := sum[key]; twice {
						shared++
					}
				}
			}
			size += len(part)
			sum.Merge(part)
		}
		if got := Plan(n, chosen); got.String() != sum.String() {
			t.Fatalf("the plan is\n%s\nbut its parts are\n%s", got, sum)
		}
		if len(sum) != size-shared {
			t.Fatalf("two endpoints want the same object: %d objects of %d are left", len(sum), size-shared)
		}
	})
}

func TestParseOptions(t *testing.T) {
	tests := []struct {
		name  string
		given map[string]string
		want  string // part of the error; empty: none
	}{
		{"none", nil, ""},
		{"Windows names", map[string]string{"com.docker.network.windowsshim.networkname": "web", "com.docker.network.windowsshim.macpool": "02-00-00-00-00-00,02-00-00-00-00-ff"}, ""},
		{"engine's own", map[string]string{"com.docker.network.enable_ipv6": "true", "com.docker.network.driver.mtu": "1400"}, ""},
		{"twice, the same", map[string]string{"mtu": "1400", "com.docker.network.driver.mtu": "1400"}, ""},
		{"twice, not the same", map[string]string{"mtu": "1400", "com.docker.network.driver.mtu": "1500"}, "are the same thing with different values"},
		{"misspelled", map[string]string{"disable_ic": "true"}, `did you mean "disable_icc"?`},
		{"not in this mode", map[string]string{"vlan": "7"}, "cannot be used with mode nat"},
		{"Windows names on the wire", map[string]string{"mode": "transparent", "com.docker.network.windowsshim.interface": "eth1", "com.docker.network.windowsshim.vlanid": "20", "com.docker.network.windowsshim.disableicc": "true"}, ""},
		{"no VLAN, as HNS says it", map[string]string{"mode": "l2bridge", "interface": "eth1", "vlan": "0"}, ""},
		{"VLAN too large", map[string]string{"mode": "l2bridge", "interface": "eth1", "vlan": "4095"}, "from 1 to 4094"},
		{"several uplinks", map[string]string{"mode": "l2bridge", "interface": "eth1,eth2"}, "make a bond"},
		{"not a link's name", map[string]string{"mode": "l2bridge", "interface": "../eth1"}, "not the name of a network interface"},
		{"backend of another mode", map[string]string{"mode": "l2bridge", "interface": "eth1", "backend": "macvlan"}, "only transparent networks"},
		{"no such backend", map[string]string{"mode": "transparent", "interface": "eth1", "backend": "ipvlan"}, "use bridge or macvlan"},
		{"DNS", map[string]string{"mode": "transparent", "interface": "eth1", "dns_servers": "198.18.0.1"}, "docker run --dns"},
		{"overlay", map[string]string{"mode": "overlay", "vsid": "5001"}, ""},
		{"overlay with Windows names", map[string]string{"mode": "overlay", "com.docker.network.windowsshim.vsid": "4096,16777214"}, ""},
		{"VSID too small", map[string]string{"mode": "overlay", "vsid": "4095"}, "from 4096 to 16777214"},
		{"VSID too large", map[string]string{"mode": "overlay", "vsid": "16777215"}, "from 4096 to 16777214"},
		{"VSID twice", map[string]string{"mode": "overlay", "vsid": "5001,5001"}, "twice"},
		{"VSID in another mode", map[string]string{"vsid": "5001"}, "only overlay networks"},
		{"encrypted", map[string]string{"mode": "overlay", "vsid": "5001", "encrypted": "true"}, "does not encrypt"},
		{"not encrypted", map[string]string{"mode": "overlay", "vsid": "5001", "encrypted": "false"}, ""},
		{"exceptions", map[string]string{"mode": "overlay", "vsid": "5001", "outbound_nat": "true", "outbound_nat_exceptions": "192.0.2.0/24, fd00::/8"}, ""},
		{"exception with a host part", map[string]string{"mode": "overlay", "outbound_nat_exceptions": "192.0.2.1/24"}, "not a network prefix"},
		{"a MAC that follows from something", map[string]string{"mode": "overlay", "vsid": "5001", "mac": "stable"}, "--mac-address"},
		{"not a mode", map[string]string{"mode": "bridge"}, "not a mode: use nat"},
		{"odd pool", map[string]string{"mac_pool": "02:00:00:00:00:00"}, "pairs of start,end"},
		{"backward pool", map[string]string{"mac_pool": "02:00:00:00:00:02,02:00:00:00:00:01"}, "ends before it begins"},
		{"multicast pool", map[string]string{"mac_pool": "01:00:00:00:00:00,02:00:00:00:00:01"}, "multicast"},
		{"mtu too large", map[string]string{"mtu": "65536"}, "68 to 65535"},
		{"prefix", map[string]string{"iface_prefix": "a/b"}, "begins with a letter"},
		{"bool", map[string]string{"disable_icc": "maybe"}, "use true or false"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseOptions(tt.given)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// FuzzParseOptions: what options a network can be made with, it can be taken over with from the record.
func FuzzParseOptions(f *testing.F) {
	f.Add("nat", "mtu", "1400")
	f.Add("l2bridge", "mac_pool", "02-00-00-00-00-00,02-00-00-00-00-ff")
	f.Add("transparent", "interface", "eth1")
	f.Add("overlay", "vsid", "5001")
	f.Add("", "mode", "nat")
	f.Fuzz(func(t *testing.T, mode, key, value string) {
		given := map[string]string{}
		switch {
		case mode == "overlay":
			given["vsid"] = "5001"
		case Name(mode).External():
			given["interface"] = "eth1"
		}
		if mode != "" {
			given["mode"] = mode
		}
		given[key] = value
		o, err := ParseOptions(given)
		if err != nil {
			return
		}
		if o.MTU > maxMTU || o.MTU < minMTU && (o.MTU != 0 || o.Mode == NAT) {
			t.Errorf("%q gives %+v", given, o)
		}
		n := Network{ID: "0123456789ab", Options: o}
		for i := range max(1, len(o.VSIDs)) {
			n.IPv4 = append(n.IPv4, Subnet{Pool: netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(i)}), 24)})
		}
		if err := Validate(n); err != nil {
			return
		}
		if err := CheckNetwork(n); err != nil {
			t.Errorf("%q makes a network that is refused when it is on record: %v", given, err)
		}
	})
}

// FuzzParseEndpointOptions: a name that a link cannot have, and a key that is not known, are refused by name.
func FuzzParseEndpointOptions(f *testing.F) {
	const known = "com.docker.network.endpoint.ifname"
	f.Add(known, "eth1")
	f.Add(known, "a name")
	f.Add("com.docker.network.endpoint.sysctls", "net.ipv4.conf.IFNAME.arp_notify=1")
	f.Fuzz(func(t *testing.T, key, value string) {
		name, err := ParseEndpointOptions(map[string]string{key: value})
		switch {
		case err == nil && (key != known || name != value || !isLinkName(name) || strings.ContainsAny(name, " /")):
			t.Errorf("%s=%q gives %q", key, value, name)
		case err != nil && (name != "" || !strings.Contains(err.Error(), key) && !strings.Contains(err.Error(), strconv.Quote(key))):
			t.Errorf("%s=%q gives %q, and error %v", key, value, name, err)
		}
	})
}

// TestChooseMAC takes addresses until the pool is used up: each once, all from the pool.
func TestChooseMAC(t *testing.T) {
	o, err := ParseOptions(map[string]string{"mac_pool": "02:00:00:00:00:0e,02:00:00:00:00:0f,0a:00:00:00:00:00,0a:00:00:00:00:01"})
	if err != nil {
		t.Fatal(err)
	}
	taken := map[plan.MAC]bool{}
	for _, id := range []string{"a", "b", "c", "d"} {
		m, err := o.ChooseMAC(id, func(m plan.MAC) bool { return taken[m] })
		if err != nil || taken[m] || (m[0] != 2 && m[0] != 10) {
			t.Errorf("endpoint %s gets %s, %v", id, m, err)
		}
		taken[m] = true
	}
	if _, err := o.ChooseMAC("e", func(m plan.MAC) bool { return taken[m] }); err == nil {
		t.Error("a fifth address was taken from a pool of four")
	}
	m, err := Options{}.ChooseMAC("a", func(plan.MAC) bool { return false })
	if err != nil || m[0]&3 != 2 {
		t.Errorf("without a pool %s, %v: want a locally administered unicast address", m, err)
	}
}

// TestUnreachableRemotes: what the kernel would refuse is not asked of it, so that one host cannot keep
// others' entries from being written. What went is still found, without its host.
func TestUnreachableRemotes(t *testing.T) {
	n := Network{ID: "0123456789ab", Options: Options{Mode: Overlay, VSIDs: []uint32{5001}}, IPv4: []Subnet{{Pool: netip.MustParsePrefix("198.18.0.0/24")}}}
	n.Span(netip.MustParseAddr("198.19.0.1"), 1500, 14789)
	good := Remote{VSID: 5001, Address: netip.MustParseAddr("198.18.0.2"), MAC: plan.MAC{2, 0, 0, 0, 0, 1}, VTEP: netip.MustParseAddr("198.19.0.2")}
	for what, c := range map[string]struct {
		change  func(*Remote)
		objects int
	}{
		"good":                      {func(*Remote) {}, 2},
		"gone, of no host":          {func(r *Remote) { r.VTEP = netip.Addr{} }, 2},
		"of another network":        {func(r *Remote) { r.VSID++ }, 0},
		"without a MAC":             {func(r *Remote) { r.MAC = plan.MAC{} }, 0},
		"with a multicast MAC":      {func(r *Remote) { r.MAC[0] = 3 }, 0},
		"on a host of other family": {func(r *Remote) { r.VTEP = netip.MustParseAddr("fd00::2") }, 0},
	} {
		r := good
		c.change(&r)
		if got := PlanRemotes(n, []Remote{r}); len(got) != c.objects {
			t.Errorf("%s: planned %s, want %d objects", what, got, c.objects)
		}
	}
}
