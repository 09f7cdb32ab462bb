package dhcp

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	server6Net = "fd00:18::1/64"
	duid       = "00:03:00:01:02:42:00:00:00:01" // container's
)

var pool6 = netip.MustParsePrefix("fd00:18::1:0/112")

// makeLab6 is the lab with IPv6 on the LAN.
func makeLab6(t *testing.T) *lab {
	b := makeLab(t)
	b.ip(t, b.lan, "address add "+server6Net+" dev lan0 nodad")
	eventually(t, "the server's link-local address", func() bool {
		out := b.ip(t, b.lan, "-6 address show dev lan0 scope link")
		return strings.Contains(out, "fe80::") && !strings.Contains(out, "tentative")
	})
	return b
}

// router is the link-local address of the server.
func (b *lab) router(t *testing.T) netip.Addr {
	fields := strings.Fields(b.ip(t, b.lan, "-6 -o address show dev lan0 scope link"))
	return netip.MustParsePrefix(fields[slices.Index(fields, "inet6")+1]).Addr()
}

const dnsmasqRange6 = "--dhcp-range=fd00:18::1:0,fd00:18::1:ffff,64,1h"

// dnsmasq6 serves pool6, unless the options say something else. With --enable-ra it is a router too.
func (b *lab) dnsmasq6(t *testing.T, options ...string) *process {
	t.Helper()
	if !strings.Contains(strings.Join(options, " "), "--dhcp-range") {
		options = append(options, dnsmasqRange6)
	}
	// Otherwise it makes itself a DUID of the time, and another when it has no leases.
	return b.dnsmasq(t, append(options, "--dhcp-duid=2495,01:02:03:04")...)
}

// kea6 serves pool6, with changes to the subnet of its configuration. It is no router.
func (b *lab) kea6(t *testing.T, subnet map[string]any) *process {
	t.Helper()
	s := map[string]any{
		"subnet":             "fd00:18::/64",
		"interface":          "lan0",
		"pools":              []any{map[string]any{"pool": pool6.String()}},
		"valid-lifetime":     3600,
		"preferred-lifetime": 3000,
	}
	for k, v := range subnet {
		s[k] = v
	}
	config, err := json.Marshal(map[string]any{"Dhcp6": map[string]any{
		"interfaces-config": map[string]any{"interfaces": []string{"lan0"}},
		"lease-database":    map[string]any{"type": "memfile", "persist": true, "name": b.file("kea6.leases"), "lfc-interval": 0},
		"server-id":         map[string]any{"type": "EN", "enterprise-id": 2495, "identifier": "0123456789", "persist": false},
		"subnet6":           []any{s},
		"loggers": []any{map[string]any{
			"name": "kea-dhcp6", "severity": "DEBUG", "debuglevel": 45,
			"output_options": []any{map[string]any{"output": "stdout", "flush": true}},
		}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.file("kea6.json"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := program(t, "kea-dhcp6", "-c", b.file("kea6.json"))
	cmd.Env = append(cmd.Env, "KEA_PIDFILE_DIR="+b.dir, "KEA_LOCKFILE_DIR="+b.dir)
	return b.serve(t, "DHCP6_STARTED", cmd)
}

func TestDnsmasq6(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	b.dnsmasq6(t, "--enable-ra", "--ra-param=lan0,mtu:1400,10,300", "--dhcp-option=option6:dns-server,[fd00:18::53]", "--dhcp-option=option6:domain-search,lan.example,corp.example")
	lease := b.obtain(t, Request{IPv6: true, Hostname: "web"})
	if !pool6.Contains(lease.Prefix.Addr()) || lease.Prefix.Bits() != 64 || lease.Gateway != b.router(t) || lease.MTU != 1400 || lease.Lifetime != time.Hour ||
		!slices.Equal(lease.DNS, []netip.Addr{address("fd00:18::53")}) || !slices.Equal(lease.Search, []string{"lan.example", "corp.example"}) {
		t.Errorf("%+v", lease)
	}
	if got, want := b.read(t, "dnsmasq.leases"), lease.Prefix.Addr().String()+" web "+duid; !strings.Contains(got, want) {
		t.Errorf("the server has\n%swant %s", got, want)
	}
	if again := b.obtain(t, Request{IPv6: true, Hostname: "web"}); again.Prefix != lease.Prefix {
		t.Errorf("leased %s at first, %s now", lease.Prefix, again.Prefix)
	}

	asked := b.obtain(t, Request{IPv6: true, MAC: MAC{2, 0x42, 0, 0, 0, 7}, Address: address("fd00:18::1:77")})
	if asked.Prefix != netip.MustParsePrefix("fd00:18::1:77/64") {
		t.Errorf("leased %s", asked.Prefix)
	}
	for _, other := range []string{"fd00:18::1:77", "fd00:18::7"} {
		_, err := b.Obtain(t.Context(), Request{IPv6: true, Link: uplink, MAC: MAC{2, 0x42, 0, 0, 0, 8}, Address: address(other)})
		var offered *OfferedError
		if !errors.As(err, &offered) || !pool6.Contains(offered.Offered) {
			t.Errorf("asked for %s: %v", other, err)
		}
	}

	if err := b.Release(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server has forgotten the lease", func() bool {
		text := b.read(t, "dnsmasq.leases")
		return !strings.Contains(text, duid) && strings.Contains(text, "fd00:18::1:77")
	})
}

// TestDnsmasq6Both has leases of both protocols for one container.
func TestDnsmasq6Both(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	b.dnsmasq6(t, "--dhcp-range=198.18.1.10,198.18.1.250,255.255.0.0,1h", dnsmasqRange6)
	for _, ipv6 := range []bool{false, true} {
		if err := b.Keep(b.obtain(t, Request{IPv6: ipv6})); err != nil {
			t.Fatal(err)
		}
	}
	leases := b.Leases()
	if len(leases) != 2 || !pool.Contains(leases[0].Prefix.Addr()) || !pool6.Contains(leases[1].Prefix.Addr()) {
		t.Errorf("kept %v", leases)
	}
}

// TestDnsmasq6WithoutRouter: the subnet is known only if the caller knows it.
func TestDnsmasq6WithoutRouter(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	b.dnsmasq6(t, "--dhcp-host="+container.String()+",[fd00:18::42]")
	begin := time.Now()
	lease := b.obtain(t, Request{IPv6: true})
	within(t, "lease", time.Since(begin), routersTime, routersTime+3*time.Second)
	if lease.Prefix != netip.MustParsePrefix("fd00:18::42/128") || lease.Gateway.IsValid() {
		t.Errorf("leased %s, gateway %s", lease.Prefix, lease.Gateway)
	}
	lease = b.obtain(t, Request{IPv6: true, Subnet: netip.MustParsePrefix("fd00:18::/64")})
	if lease.Prefix != netip.MustParsePrefix("fd00:18::42/64") {
		t.Errorf("leased %s", lease.Prefix)
	}
}

// TestDnsmasq6AfterARestart resumes a recorded lease.
func TestDnsmasq6AfterARestart(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	server := b.dnsmasq6(t, "--enable-ra")
	lease := b.obtain(t, Request{IPv6: true})
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b.start(t)
	if err := b.Keep(recorded(t, lease)); err != nil {
		t.Fatal(err)
	}
	renewed := b.await(t, Renewed)
	if renewed.lease.Prefix != lease.Prefix || renewed.lease.Gateway != lease.Gateway || !renewed.lease.Obtained.After(lease.Obtained) {
		t.Errorf("renewed %+v", renewed.lease)
	}
	if n := strings.Count(server.out.String(), "DHCPSOLICIT("); n != 1 {
		t.Errorf("%d solicitations, want none after the first lease", n)
	}
}

// TestDnsmasq6Reconfigured renews from a server that serves other addresses meanwhile.
func TestDnsmasq6Reconfigured(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	before := b.dnsmasq6(t, "--enable-ra")
	lease := b.obtain(t, Request{IPv6: true})
	lease.T1 = 2 * time.Second
	before.stop()
	if err := os.Remove(b.file("dnsmasq.leases")); err != nil {
		t.Fatal(err)
	}
	b.dnsmasq6(t, "--enable-ra", "--dhcp-range=fd00:18::3:0,fd00:18::3:ffff,64,1h")
	if err := b.Keep(lease); err != nil {
		t.Fatal(err)
	}
	changed := b.await(t, Changed)
	if !netip.MustParsePrefix("fd00:18::3:0/112").Contains(changed.lease.Prefix.Addr()) || changed.lease.Prefix.Bits() != 64 {
		t.Errorf("changed from %s to %s", lease.Prefix, changed.lease.Prefix)
	}
}

// TestAddressInUse6 has a host on the LAN that took an address by itself.
func TestAddressInUse6(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	server := b.kea6(t, nil)
	b.ip(t, b.lan, "address add fd00:18::1:55/64 dev lan0 nodad")
	_, err := b.Obtain(t.Context(), Request{IPv6: true, Link: uplink, MAC: container, Address: address("fd00:18::1:55")})
	var taken *TakenError
	if !errors.As(err, &taken) || taken.Address != address("fd00:18::1:55") {
		t.Errorf("error: %v", err)
	}
	eventually(t, "the server is told", func() bool { return strings.Contains(server.out.String(), "DHCP6_DECLINE_LEASE") })
}

func TestKea6(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	server := b.kea6(t, map[string]any{
		"renew-timer": 2, "rebind-timer": 60,
		"option-data": []any{
			map[string]any{"name": "dns-servers", "data": "fd00:18::53"},
			map[string]any{"name": "domain-search", "data": "lan.example, deep.lan.example"},
			map[string]any{"name": "unicast", "data": "fd00:18::1"},
		},
		"reservations": []any{map[string]any{"hw-address": container.String(), "ip-addresses": []string{"fd00:18::42"}}},
	})
	lease := b.obtain(t, Request{IPv6: true, Hostname: "web"})
	if lease.Prefix.Addr() != address("fd00:18::42") || !slices.Equal(lease.Search, []string{"lan.example", "deep.lan.example"}) ||
		lease.T1 != 2*time.Second || lease.T2 != time.Minute || lease.Lifetime != time.Hour {
		t.Errorf("%+v", lease)
	}
	if got := b.read(t, "kea6.leases"); !strings.Contains(got, "fd00:18::42,"+duid+",3600,") || !strings.Contains(got, "web") {
		t.Errorf("the server has\n%s", got)
	}
	if err := b.Keep(lease); err != nil {
		t.Fatal(err)
	}
	renewed := b.await(t, Renewed)
	if took := renewed.lease.Obtained.Sub(lease.Obtained); took < 1900*time.Millisecond || took > 10*time.Second {
		t.Errorf("renewed after %s", took)
	}
	if got := server.out.String(); !strings.Contains(got, "RENEW") || strings.Contains(got, "to fd00:18::1:547") {
		t.Errorf("the renewal did not come to all servers")
	}
	if err := b.Release(t.Context(), lease); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server has the lease released", func() bool { return strings.Contains(server.out.String(), "DHCP6_RELEASE_NA") })
}

// TestKea6Rebinds has another server instead of the one that gave the lease.
func TestKea6Rebinds(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	b.kea6(t, map[string]any{"renew-timer": 1, "rebind-timer": 3, "valid-lifetime": 40, "preferred-lifetime": 30})
	lease := b.obtain(t, Request{IPv6: true})
	lease.ServerID = []byte{0, 3, 0, 1, 2, 9, 9, 9, 9, 9}
	if err := b.Keep(lease); err != nil {
		t.Fatal(err)
	}
	if renewed := b.await(t, Renewed); renewed.lease.Prefix != lease.Prefix || slices.Equal(renewed.lease.ServerID, lease.ServerID) {
		t.Errorf("rebound %+v, was %+v", renewed.lease, lease)
	}
}

// TestKea6Moves has a server that has reserved the address for somebody else when the lease is to be renewed.
func TestKea6Moves(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	subnet := map[string]any{"renew-timer": 2, "rebind-timer": 20, "valid-lifetime": 40, "preferred-lifetime": 30}
	server := b.kea6(t, subnet)
	lease := b.obtain(t, Request{IPv6: true})
	server.stop()
	subnet["reservations"] = []any{map[string]any{"hw-address": "02:42:00:00:00:99", "ip-addresses": []string{lease.Prefix.Addr().String()}}}
	b.kea6(t, subnet)
	if err := b.Keep(lease); err != nil {
		t.Fatal(err)
	}
	changed := b.await(t, Changed)
	if !pool6.Contains(changed.lease.Prefix.Addr()) || changed.lease.Prefix == lease.Prefix || changed.Previous.Prefix != lease.Prefix {
		t.Errorf("changed from %s to %s", changed.Previous.Prefix, changed.lease.Prefix)
	}
}

// TestKea6HasNone asks a server whose pool is empty.
func TestKea6HasNone(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	b.kea6(t, map[string]any{"pools": []any{map[string]any{"pool": "fd00:18::1:0 - fd00:18::1:0"}}})
	b.obtain(t, Request{IPv6: true})
	_, err := b.Obtain(t.Context(), Request{IPv6: true, Link: uplink, MAC: MAC{2, 0x42, 0, 0, 0, 9}})
	if err == nil || !strings.Contains(err.Error(), "NoAddrsAvail") {
		t.Errorf("error: %v", err)
	}
}

func TestNoServer6(t *testing.T) {
	t.Parallel()
	b := makeLab6(t)
	begin := time.Now()
	_, err := b.Obtain(t.Context(), Request{IPv6: true, Link: uplink, MAC: container})
	if !errors.Is(err, ErrNoServer) || !strings.Contains(err.Error(), "on eth1 for 02:42:00:00:00:01: no DHCP server answered over IPv6 within 15s: check") {
		t.Errorf("error: %v", err)
	}
	within(t, "error", time.Since(begin), 15*time.Second, 17*time.Second)
}

// TestSnooping6 has a switch that sends multicast only to those who have said that they listen to it, as soon as it has asked.
func TestSnooping6(t *testing.T) {
	t.Parallel()
	b := makeLab(t)
	for _, args := range []string{
		"link set lan0 down", "link set lan0 name port0", "link add lan0 type bridge mcast_snooping 1 mcast_query_response_interval 100",
		"link set port0 master lan0", "link set port0 up", "link set lan0 up", "address add " + server6Net + " dev lan0 nodad",
	} {
		b.ip(t, b.lan, args)
	}
	eventually(t, "the switch's link-local address", func() bool {
		out := b.ip(t, b.lan, "-6 address show dev lan0 scope link")
		return strings.Contains(out, "fe80::") && !strings.Contains(out, "tentative")
	})
	b.ip(t, b.lan, "link set lan0 type bridge mcast_querier 1")
	asked := time.Now() // it waits a second for reports before it minds them
	eventually(t, "the switch knows who listens", func() bool { return time.Since(asked) > 1100*time.Millisecond })
	b.dnsmasq6(t, "--enable-ra")
	lease := b.obtain(t, Request{IPv6: true, MAC: MAC{2, 0x42, 0, 0, 7, 7}}) // who is not there yet, as the lab's container is
	if !pool6.Contains(lease.Prefix.Addr()) {
		t.Errorf("leased %s", lease.Prefix)
	}
}
