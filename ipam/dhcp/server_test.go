package dhcp

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

var pool = netip.MustParsePrefix("198.18.1.0/24")

func TestDnsmasq(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	b.dnsmasq(t,
		"--dhcp-option=option:router,198.18.0.1",
		"--dhcp-option=option:dns-server,198.18.0.1,198.18.0.2",
		"--dhcp-option=26,1400",
		"--domain=lan.example",
		"--dhcp-option=option:domain-search,lan.example,corp.example",
	)
	lease := b.obtain(t, Request{Hostname: "web"})
	if !pool.Contains(lease.Prefix.Addr()) || lease.Prefix.Bits() != 16 || lease.Gateway != address("198.18.0.1") || lease.MTU != 1400 ||
		!slices.Equal(lease.DNS, []netip.Addr{address("198.18.0.1"), address("198.18.0.2")}) || lease.Domain != "lan.example" ||
		!slices.Equal(lease.Search, []string{"lan.example", "corp.example"}) || lease.Lifetime != time.Hour {
		t.Errorf("%+v", lease)
	}
	line := container.String() + " " + lease.Prefix.Addr().String() + " web 01:" + container.String()
	if got := b.read(t, "dnsmasq.leases"); !strings.Contains(got, line) {
		t.Errorf("the server has\n%swant %s", got, line)
	}
	if again := b.obtain(t, Request{Hostname: "web"}); again.Prefix != lease.Prefix {
		t.Errorf("leased %s at first, %s now", lease.Prefix, again.Prefix)
	}

	asked := b.obtain(t, Request{MAC: MAC{2, 0x42, 0, 0, 0, 7}, Address: address("198.18.1.77"), ClientID: []byte{0, 'w', 'e', 'b'}})
	if asked.Prefix.Addr() != address("198.18.1.77") {
		t.Errorf("leased %s", asked.Prefix)
	}
	if got := b.read(t, "dnsmasq.leases"); !strings.Contains(got, " 198.18.1.77 * 00:77:65:62") {
		t.Errorf("the server has\n%s", got)
	}

	for _, other := range []string{"198.18.1.77", "198.18.200.1"} {
		_, err := b.Obtain(t.Context(), Request{Link: uplink, MAC: MAC{2, 0x42, 0, 0, 0, 8}, Address: address(other)})
		var offered *OfferedError
		if !errors.As(err, &offered) || !pool.Contains(offered.Offered) {
			t.Errorf("asked for %s: %v", other, err)
		}
	}

	if err := b.Release(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server has forgotten the lease", func() bool {
		text := b.read(t, "dnsmasq.leases")
		return !strings.Contains(text, container.String()) && strings.Contains(text, "198.18.1.77")
	})
}

func TestDnsmasqReservation(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	b.dnsmasq(t, "--dhcp-host="+container.String()+",198.18.1.42", "--dhcp-option=121,10.0.0.0/8,198.18.0.9,0.0.0.0/0,198.18.0.8")
	lease := b.obtain(t, Request{})
	if lease.Prefix.Addr() != address("198.18.1.42") {
		t.Errorf("leased %s", lease.Prefix)
	}
	want := []Route{{netip.MustParsePrefix("10.0.0.0/8"), address("198.18.0.9")}}
	if lease.Gateway != address("198.18.0.8") || !slices.Equal(lease.Routes, want) {
		t.Errorf("gateway %s, routes %v", lease.Gateway, lease.Routes)
	}
}

// TestDnsmasqReconfigured renews from a server that serves other addresses meanwhile.
func TestDnsmasqReconfigured(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	before := b.dnsmasq(t)
	lease := b.obtain(t, Request{})
	lease.T1 = 2 * time.Second
	b.ip(t, b.container, "address add "+lease.Prefix.String()+" dev eth0")
	before.stop()
	b.dnsmasq(t, "--dhcp-range=198.18.3.10,198.18.3.250,255.255.0.0,1h", "--dhcp-authoritative")
	if err := b.Keep(lease); err != nil {
		t.Fatal(err)
	}
	refused := b.await(t, Refused)
	var reason *RefusedError
	if !errors.As(refused.Err, &reason) || reason.Server != address("198.18.0.1") {
		t.Errorf("refused: %v", refused.Err)
	}
	changed := b.await(t, Changed)
	if !netip.MustParsePrefix("198.18.3.0/24").Contains(changed.lease.Prefix.Addr()) || changed.Previous.Prefix != lease.Prefix {
		t.Errorf("changed from %s to %s", changed.Previous.Prefix, changed.lease.Prefix)
	}
}

// TestDnsmasqAfterARestart resumes a recorded lease.
func TestDnsmasqAfterARestart(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	server := b.dnsmasq(t)
	lease := b.obtain(t, Request{})
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b.start(t)
	if err := b.Keep(recorded(t, lease)); err != nil {
		t.Fatal(err)
	}
	renewed := b.await(t, Renewed)
	if renewed.lease.Prefix != lease.Prefix || !renewed.lease.Obtained.After(lease.Obtained) {
		t.Errorf("renewed %+v", renewed.lease)
	}
	if n := strings.Count(server.out.String(), "DHCPDISCOVER("); n != 1 {
		t.Errorf("%d discoveries, want none after the first lease", n)
	}
}

// TestAddressInUse has a host on the LAN that took an address by itself.
func TestAddressInUse(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	server := b.dnsmasq(t)
	b.ip(t, b.lan, "address add 198.18.1.55/16 dev lan0")
	_, err := b.Obtain(t.Context(), Request{Link: uplink, MAC: container, Address: address("198.18.1.55")})
	var taken *TakenError
	var offered *OfferedError
	switch {
	case errors.As(err, &offered): // dnsmasq does not lease an address of its own
		t.Fatalf("the test is wrong: %v", err)
	case !errors.As(err, &taken) || taken.Address != address("198.18.1.55"):
		t.Errorf("error: %v", err)
	}
	eventually(t, "the server is told", func() bool { return strings.Contains(server.out.String(), "DHCPDECLINE(lan0) 198.18.1.55") })
}

func TestKea(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	server := b.kea(t, map[string]any{
		"renew-timer": 2, "rebind-timer": 60,
		"option-data": []any{
			map[string]any{"name": "routers", "data": "198.18.0.1"},
			map[string]any{"name": "domain-name-servers", "data": "198.18.0.1"},
			map[string]any{"name": "domain-name", "data": "lan.example"},
			map[string]any{"name": "domain-search", "data": "lan.example, deep.lan.example"},
			map[string]any{"name": "interface-mtu", "data": "1450"},
		},
		"reservations": []any{map[string]any{"hw-address": container.String(), "ip-address": "198.18.1.42"}},
	})
	lease := b.obtain(t, Request{Hostname: "web"})
	if lease.Prefix != netip.MustParsePrefix("198.18.1.42/16") || lease.Gateway != address("198.18.0.1") || lease.MTU != 1450 || lease.Domain != "lan.example" ||
		!slices.Equal(lease.Search, []string{"lan.example", "deep.lan.example"}) || lease.T1 != 2*time.Second || lease.T2 != time.Minute {
		t.Errorf("%+v", lease)
	}
	if got := b.read(t, "kea.leases"); !strings.Contains(got, "198.18.1.42,"+container.String()+",01:"+container.String()+",3600,") || !strings.Contains(got, ",web,") {
		t.Errorf("the server has\n%s", got)
	}

	// The container answers ARP, so the renewal's answer comes as unicast to its MAC.
	b.ip(t, b.container, "address add "+lease.Prefix.String()+" dev eth0")
	if err := b.Keep(lease); err != nil {
		t.Fatal(err)
	}
	renewed := b.await(t, Renewed)
	if took := renewed.lease.Obtained.Sub(lease.Obtained); took < 1900*time.Millisecond || took > 10*time.Second {
		t.Errorf("renewed after %s", took)
	}
	if got := server.out.String(); !strings.Contains(got, "received buffer from 198.18.1.42:68 to 198.18.0.1:67 over interface lan0") {
		t.Errorf("the renewal did not come as unicast")
	}

	if err := b.Release(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server has the lease released", func() bool {
		lines := strings.Split(strings.TrimSpace(b.read(t, "kea.leases")), "\n")
		fields := strings.Split(lines[len(lines)-1], ",")
		return fields[0] == "198.18.1.42" && fields[3] == "0" // its lifetime
	})
}

// TestKeaWithoutContainer renews a lease whose address answers no ARP, as that of a stopped container.
func TestKeaWithoutContainer(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	b.kea(t, map[string]any{"renew-timer": 1, "rebind-timer": 3, "valid-lifetime": 40})
	lease := b.obtain(t, Request{})
	if err := b.Keep(lease); err != nil {
		t.Fatal(err)
	}
	if renewed := b.await(t, Renewed); renewed.lease.Prefix != lease.Prefix {
		t.Errorf("renewed %s, was %s", renewed.lease.Prefix, lease.Prefix)
	}
}

// TestKeaRefuses has a server that has reserved the address for somebody else when the lease is to be renewed. (Of addresses
// outside its pools Kea 2.2 says nothing at all.)
func TestKeaRefuses(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	subnet := map[string]any{"renew-timer": 2, "rebind-timer": 20, "valid-lifetime": 40}
	server := b.kea(t, subnet)
	lease := b.obtain(t, Request{})
	server.stop()
	subnet["reservations"] = []any{map[string]any{"hw-address": "02:42:00:00:00:99", "ip-address": lease.Prefix.Addr().String()}}
	b.kea(t, subnet)
	if err := b.Keep(lease); err != nil {
		t.Fatal(err)
	}
	b.await(t, Refused)
	changed := b.await(t, Changed)
	if !pool.Contains(changed.lease.Prefix.Addr()) || changed.lease.Prefix == lease.Prefix || changed.Previous.Prefix != lease.Prefix {
		t.Errorf("changed from %s to %s", changed.Previous.Prefix, changed.lease.Prefix)
	}
}

func TestNoServer(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	begin := time.Now()
	_, err := b.Obtain(t.Context(), Request{Link: uplink, MAC: container})
	if !errors.Is(err, ErrNoServer) || !strings.Contains(err.Error(), "lease an address on eth1 for 02:42:00:00:00:01: no DHCP server answered within 15s: check") {
		t.Errorf("error: %v", err)
	}
	within(t, "error", time.Since(begin), 15*time.Second, 17*time.Second)
}

func TestBadLink(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	b.ip(t, b.host, "link set port0 down")
	for link, want := range map[string]string{
		"nowhere": "there is no link nowhere",
		"lo":      "link lo is not Ethernet",
		"port0":   "link port0 is down",
	} {
		if _, err := b.Obtain(t.Context(), Request{Link: link, MAC: container}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", link, err)
		}
	}
}
