package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dockway/dockway/ipam/dhcp"
)

// lan is a LAN whose DHCP server gives 198.18.0.100 and up, but to whom it has reserved another.
type lan struct {
	mu       sync.Mutex // of Release, which is called side by side
	next     byte
	reserved map[dhcp.MAC]netip.Addr
	leases   map[dhcp.MAC]dhcp.Lease // that the server has given
	leases6  map[dhcp.MAC]dhcp.Lease // of IPv6, from fd00:18::100 up
	kept     []dhcp.MAC
	silent   bool
	released func(dhcp.Lease) // before it is given back
}

func newLAN() *lan {
	return &lan{next: 100, reserved: map[dhcp.MAC]netip.Addr{}, leases: map[dhcp.MAC]dhcp.Lease{}, leases6: map[dhcp.MAC]dhcp.Lease{}}
}

var errSilent = errors.New("no DHCP server answers")

func (l *lan) Obtain(_ context.Context, r dhcp.Request) (dhcp.Lease, error) {
	if l.silent {
		return dhcp.Lease{}, errSilent
	}
	if r.IPv6 {
		if _, known := l.leases6[r.MAC]; known {
			return dhcp.Lease{}, fmt.Errorf("the server has a lease of %s already", r.MAC)
		}
		lease := dhcp.Lease{Request: r, Prefix: netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x18, 15: l.next}), 64)}
		l.next++
		l.leases6[r.MAC] = lease
		return lease, nil
	}
	a, ok := l.reserved[r.MAC]
	switch {
	case ok && r.Address.IsValid() && r.Address != a:
		return dhcp.Lease{}, fmt.Errorf("the server offers %s", a)
	case !ok && r.Address.IsValid():
		a = r.Address
	case !ok:
		a = netip.AddrFrom4([4]byte{198, 18, 0, l.next})
		l.next++
	}
	for mac, lease := range l.leases {
		if lease.Prefix.Addr() == a && mac != r.MAC {
			return dhcp.Lease{}, fmt.Errorf("the server has leased %s to %s", a, mac)
		}
	}
	lease := dhcp.Lease{Request: r, Prefix: netip.PrefixFrom(a, 24), Gateway: netip.MustParseAddr("198.18.0.254")}
	l.leases[r.MAC] = lease
	return lease, nil
}

func (l *lan) Keep(lease dhcp.Lease) error {
	l.kept = append(l.kept, lease.MAC)
	return nil
}

func (l *lan) Release(_ context.Context, lease dhcp.Lease) error {
	if l.released != nil {
		l.released(lease)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if lease.IPv6 {
		delete(l.leases6, lease.MAC)
	} else {
		delete(l.leases, lease.MAC)
	}
	return nil
}

// onLAN is a manager whose pool is leased on a LAN.
func onLAN(t *testing.T, s *memory, l *lan, r PoolRequest) (*Manager, PoolReply) {
	t.Helper()
	m := leasing(t, s, l)
	r.Space = string(Local)
	reply, err := m.RequestPool(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return m, reply
}

// leased is a manager that has leased container a's address on a LAN.
func leased(t *testing.T, s *memory, l *lan) (*Manager, PoolReply, netip.Prefix) {
	t.Helper()
	m, pool := onLAN(t, s, l, PoolRequest{})
	if _, err := m.LeaseFrom(pool.Pool, "eth1"); err != nil {
		t.Fatal(err)
	}
	got, err := m.RequestAddress(t.Context(), named(pool.ID, "a", ""))
	if err != nil {
		t.Fatal(err)
	}
	return m, pool, got
}

func leasing(t *testing.T, s *memory, l *lan) *Manager {
	t.Helper()
	m, err := New(s, nil, Config{Seed: "host", Leaser: l, MAC: func(_ netip.Prefix, name string) (dhcp.MAC, error) {
		return dhcp.MAC{2, 0, 0, 0, 0, name[0]}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (l *lan) leased() string { return fmt.Sprint(slices.Sorted(maps.Keys(l.addresses()))) }

func (l *lan) addresses() map[string]bool {
	out := map[string]bool{}
	for _, lease := range l.leases {
		out[lease.Prefix.Addr().String()] = true
	}
	return out
}

func named(pool, name, address string) AddressRequest {
	return AddressRequest{PoolID: pool, Address: address, Options: map[string]string{optionName: name}}
}

// TestLeased: from the network's making on, a pool that was requested without a subnet gives the
// addresses of the LAN's server, over restarts, until they are released.
func TestLeased(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool := onLAN(t, s, l, PoolRequest{})
	if leased, err := m.LeaseFrom(pool.Pool, "eth1"); err != nil || !leased {
		t.Fatalf("not leased: %v", err)
	}
	got, err := m.RequestAddress(t.Context(), named(pool.ID, "a", ""))
	if err != nil || got.String() != "198.18.0.100/24" {
		t.Fatalf("got %s, %v", got, err)
	}
	if lease := l.leases[dhcp.MAC{2, 0, 0, 0, 0, 'a'}]; lease.Link != "eth1" || lease.Hostname != "a" {
		t.Errorf("the server was asked by %+v", lease.Request)
	}
	l.kept = nil
	m = leasing(t, s, l)
	if len(l.kept) != 1 {
		t.Errorf("a restart keeps %d leases, want 1", len(l.kept))
	}
	lease, err := m.Lease(t.Context(), pool.Pool, got.Addr(), dhcp.MAC{})
	if err != nil || lease.Gateway.String() != "198.18.0.254" || lease.MAC != (dhcp.MAC{2, 0, 0, 0, 0, 'a'}) {
		t.Errorf("the lease is %v, %v", lease, err)
	}
	if name := m.Name(pool.Pool, got.Addr()); name != "a" {
		t.Errorf("%s is %q's", got, name)
	}
	if err := m.ReleaseAddress(t.Context(), pool.ID, got.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if l.leased() != "[]" || len(m.Held(pool.ID)) != 0 {
		t.Errorf("after the release the server has leased %s, the pool holds %v", l.leased(), m.Held(pool.ID))
	}
}

// TestLeaseForMAC: an address that the user gave is leased when the container's MAC is known, and one
// that was leased for another MAC is leased anew.
func TestLeaseForMAC(t *testing.T) {
	s, l := &memory{}, newLAN()
	given, reserved := dhcp.MAC{2, 0, 0, 0, 1, 1}, netip.MustParseAddr("198.18.0.30")
	l.reserved[given] = reserved
	m, pool := onLAN(t, s, l, PoolRequest{Pool: "198.18.0.0/24", Options: map[string]string{"dhcp": "true"}})
	if leased, err := m.LeaseFrom(pool.Pool, "eth1"); err != nil || !leased {
		t.Fatalf("not leased: %v", err)
	}
	if _, err := m.RequestAddress(t.Context(), named(pool.ID, "b", reserved.String())); err != nil || l.leased() != "[]" {
		t.Fatalf("%v; leased before the MAC is known: %s", err, l.leased())
	}
	if _, err := m.Lease(t.Context(), pool.Pool, reserved, given); err != nil || l.leased() != "[198.18.0.30]" {
		t.Errorf("%v; leased: %s", err, l.leased())
	}
	other, err := m.RequestAddress(t.Context(), named(pool.ID, "c", ""))
	if err != nil {
		t.Fatal(err)
	}
	again := dhcp.MAC{2, 0, 0, 0, 1, 2}
	if lease, err := m.Lease(t.Context(), pool.Pool, other.Addr(), again); err != nil || lease.MAC != again || lease.Prefix != other {
		t.Errorf("leased anew: %v, %v", lease, err)
	}
	if len(l.leases) != 2 {
		t.Errorf("the server has %d leases, want 2", len(l.leases))
	}
	s.full = true
	if _, err := m.RequestAddress(t.Context(), named(pool.ID, "d", "")); !errors.Is(err, errFull) || len(l.leases) != 2 {
		t.Errorf("with a full disk: %v, and %d leases", err, len(l.leases))
	}
	if _, err := m.Lease(t.Context(), pool.Pool, netip.MustParseAddr("198.18.0.99"), again); err == nil {
		t.Error("an address that nobody requested has a lease")
	}
}

// TestNotLeased: pools with a subnet of their own, and those that no network leases from, are as ever.
func TestNotLeased(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool := onLAN(t, s, l, PoolRequest{Pool: "10.1.0.0/24"})
	if leased, err := m.LeaseFrom(pool.Pool, "eth1"); err != nil || leased {
		t.Errorf("leased: %v, %v", leased, err)
	}
	if got, err := m.RequestAddress(t.Context(), named(pool.ID, "a", "")); err != nil || got.String() != "10.1.0.1/24" {
		t.Errorf("got %s, %v", got, err)
	}
	chosen, err := m.RequestPool(t.Context(), PoolRequest{Space: string(Local)})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := m.RequestAddress(t.Context(), named(chosen.ID, "a", "")); err != nil || !chosen.Pool.Contains(got.Addr()) {
		t.Errorf("got %s of %s, %v", got, chosen.Pool, err)
	}
	if _, err := m.RequestPool(t.Context(), PoolRequest{Space: string(Local), Options: map[string]string{"dhcp": "maybe"}}); !IsInvalid(err) {
		t.Errorf("dhcp=maybe: %v", err)
	}
}

// TestLeaseServerSilent: no server, no address, and the error says so.
func TestLeaseServerSilent(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool := onLAN(t, s, l, PoolRequest{})
	if _, err := m.LeaseFrom(pool.Pool, "eth1"); err != nil {
		t.Fatal(err)
	}
	l.silent = true
	if _, err := m.RequestAddress(t.Context(), named(pool.ID, "a", "")); !errors.Is(err, errSilent) || !strings.Contains(err.Error(), "eth1") {
		t.Errorf("got %v", err)
	}
	if held := m.Held(pool.ID); len(held) != 0 {
		t.Errorf("held: %v", held)
	}
}

// TestLeaseRefused: what the server grants in place of an address is told, and that it grants nothing, until it does again.
func TestLeaseRefused(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool, got := leased(t, s, l)
	lease := l.leases[dhcp.MAC{2, 0, 0, 0, 0, 'a'}]
	m.Refused(lease, errSilent)
	if _, err := m.Granted(pool.Pool, got.Addr()); !errors.Is(err, errSilent) || !strings.Contains(err.Error(), got.Addr().String()) {
		t.Errorf("refused: %v", err)
	}
	lease.Prefix = netip.MustParsePrefix("198.18.0.222/24")
	if _, _, err := m.Leased(lease); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again after a restart
		if now, err := m.Granted(pool.Pool, got.Addr()); err != nil || now.Prefix != lease.Prefix {
			t.Errorf("in place of %s the server is said to grant %s, %v", got, now.Prefix, err)
		}
		m = leasing(t, s, l)
	}
	if _, err := m.Granted(pool.Pool, netip.MustParseAddr("198.18.0.99")); err == nil {
		t.Error("an address that nobody requested is granted")
	}
}

// TestLeaseRenewed: what the server says later is on record.
func TestLeaseRenewed(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool, got := leased(t, s, l)
	renewed := l.leases[dhcp.MAC{2, 0, 0, 0, 0, 'a'}]
	renewed.MTU = 1400
	if holder, held, err := m.Leased(renewed); err != nil || !held || !strings.Contains(holder, `"a"`) {
		t.Errorf("%q, %v, %v", holder, held, err)
	}
	stranger := renewed
	stranger.MAC = dhcp.MAC{2, 9}
	if _, held, err := m.Leased(stranger); err != nil || held {
		t.Errorf("a lease of nobody's: %v, %v", held, err)
	}
	m = leasing(t, s, l)
	if lease, err := m.Lease(t.Context(), pool.Pool, got.Addr(), dhcp.MAC{}); err != nil || lease.MTU != 1400 {
		t.Errorf("after a restart the lease is %+v, %v", lease, err)
	}
}

// TestLeased6: a pool for IPv6 is leased from as one for IPv4 is, by the same client where the container is known by its name; what
// becomes of one lease is not taken for the other's.
func TestLeased6(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool := onLAN(t, s, l, PoolRequest{})
	pool6, err := m.RequestPool(t.Context(), PoolRequest{Space: string(Local), Pool: "fd00:18::/64", V6: true, Options: map[string]string{"dhcp": "ipv6"}})
	if err != nil {
		t.Fatal(err)
	}
	again, err := m.RequestPool(t.Context(), PoolRequest{Space: string(Local), V6: true}) // of another network there
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []PoolReply{pool, pool6, again} {
		if leased, err := m.LeaseFrom(p.Pool, "eth1"); err != nil || !leased {
			t.Fatalf("%s is not leased from: %v", p.Pool, err)
		}
	}
	chosen := dhcp.MAC{2, 0, 0, 0, 9, 9}
	if _, err := m.RequestAddress(t.Context(), AddressRequest{PoolID: pool.ID, Endpoint: true, Options: map[string]string{optionName: "a", optionMAC: chosen.String()}}); err != nil {
		t.Fatal(err)
	}
	got, err := m.RequestAddress(t.Context(), named(pool6.ID, "a", ""))
	if lease := l.leases6[chosen]; err != nil || lease.Prefix != got || lease.Subnet != pool6.Pool || got.Bits() != 64 {
		t.Errorf("got %s, %v; the lease is %+v", got, err, lease)
	}
	if other, err := m.RequestAddress(t.Context(), named(again.ID, "a", "")); err != nil || other == got {
		t.Errorf("on another network of the LAN, got %s, %v", other, err)
	}
	m = leasing(t, s, l)
	lease := l.leases6[chosen]
	lease.MTU = 1400
	if _, held, err := m.Leased(lease); err != nil || !held {
		t.Errorf("%v, %v", held, err)
	}
	if now, err := m.Granted(pool6.Pool, got.Addr()); err != nil || now.MTU != 1400 || now.Prefix != got {
		t.Errorf("granted %+v, %v", now, err)
	}
	m.Refused(l.leases[chosen], errSilent)
	if _, err := m.Granted(pool6.Pool, got.Addr()); err != nil {
		t.Errorf("the refusal of the IPv4 address is taken for that of %s: %v", got, err)
	}
	if err := m.ReleaseAddress(t.Context(), pool6.ID, got.Addr().String()); err != nil || len(l.leases6) != 1 || len(l.leases) != 1 {
		t.Errorf("%v; after the release the server has %v and %v", err, l.leases, l.leases6)
	}
}

// TestLeasedFamily: with subnets, DHCP can be asked for one family.
func TestLeasedFamily(t *testing.T) {
	for option, want := range map[string][2]bool{"true": {true, true}, "false": {false, false}, "ipv4": {true, false}, "ipv6": {false, true}} {
		l := newLAN()
		m, pool := onLAN(t, &memory{}, l, PoolRequest{Pool: "198.18.0.0/24", Options: map[string]string{"dhcp": option}})
		length, err := m.RequestPool(t.Context(), PoolRequest{Space: string(Local), Pool: "::/64", V6: true, Options: map[string]string{"dhcp": option}})
		if err != nil {
			t.Fatal(err)
		}
		for i, p := range []PoolReply{pool, length} {
			if leased, err := m.LeaseFrom(p.Pool, "eth1"); err != nil || leased != want[i] {
				t.Errorf("dhcp=%s: %s is leased from: %v, %v", option, p.Pool, leased, err)
			}
		}
	}
}

// TestLeaseRenewedWhileReleased: who keeps a lease waits to tell that it is renewed, and who gives it back waits until that is
// told. Neither must wait for the other, nor an address manager that others ask too.
func TestLeaseRenewedWhileReleased(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool := onLAN(t, s, l, PoolRequest{})
	if _, err := m.LeaseFrom(pool.Pool, "eth1"); err != nil {
		t.Fatal(err)
	}
	l.released = func(lease dhcp.Lease) {
		told := make(chan error, 1)
		go func() {
			_, _, err := m.Leased(lease)
			told <- err
		}()
		select {
		case err := <-told:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Error("what is told of a lease waits for its release")
		}
	}
	got, err := m.RequestAddress(t.Context(), named(pool.ID, "a", ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.ReleaseAddress(t.Context(), pool.ID, got.Addr().String()); err != nil || l.leased() != "[]" {
		t.Errorf("%v; after the release the server has leased %s", err, l.leased())
	}
	s.full = true
	if _, err := m.RequestAddress(t.Context(), named(pool.ID, "b", "")); !errors.Is(err, errFull) || l.leased() != "[]" {
		t.Errorf("with a full disk: %v, and the server has leased %s", err, l.leased())
	}
}

// TestLeaseNotRecordedAsReleased: an address that could not be freed keeps its lease.
func TestLeaseNotRecordedAsReleased(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool, got := leased(t, s, l)
	s.full = true
	if err := m.ReleaseAddress(t.Context(), pool.ID, got.Addr().String()); !errors.Is(err, errFull) || l.leased() != "[198.18.0.100]" {
		t.Errorf("with a full disk: %v, and the server has leased %s", err, l.leased())
	}
}

// TestLeaseOfOneMACTwice: a container with the MAC of another is that client to the server. It gets nothing, and the other keeps
// what it has.
func TestLeaseOfOneMACTwice(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool := onLAN(t, s, l, PoolRequest{})
	if _, err := m.LeaseFrom(pool.Pool, "eth1"); err != nil {
		t.Fatal(err)
	}
	mac := dhcp.MAC{2, 0, 0, 0, 7, 7}
	l.reserved[mac] = netip.MustParseAddr("198.18.0.30")
	for _, name := range []string{"a", "b"} {
		got, err := m.RequestAddress(t.Context(), AddressRequest{PoolID: pool.ID, Options: map[string]string{optionName: name, optionMAC: mac.String()}})
		if name == "a" && err != nil || name == "b" && !IsTaken(err) {
			t.Errorf("%s got %s, %v", name, got, err)
		}
	}
	if l.leased() != "[198.18.0.30]" {
		t.Errorf("the server has leased %s", l.leased())
	}
}

// TestLeaseOfReleasedPool: what an engine forgot to release before the pool is given back too, and not renewed for ever.
func TestLeaseOfReleasedPool(t *testing.T) {
	s, l := &memory{}, newLAN()
	m, pool := onLAN(t, s, l, PoolRequest{})
	if _, err := m.LeaseFrom(pool.Pool, "eth1"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if _, err := m.RequestAddress(t.Context(), named(pool.ID, name, "")); err != nil {
			t.Fatal(err)
		}
	}
	l.released = func(lease dhcp.Lease) {
		if _, held, err := m.Leased(lease); held || err != nil {
			t.Errorf("%s is held: %v, %v", lease.Prefix, held, err)
		}
	}
	s.full = true
	if err := m.ReleasePool(t.Context(), pool.ID); !errors.Is(err, errFull) || len(l.leases) != 2 {
		t.Errorf("with a full disk: %v, and the server has leased %s", err, l.leased())
	}
	s.full = false
	if err := m.ReleasePool(t.Context(), pool.ID); err != nil || len(l.leases) != 0 {
		t.Errorf("%v; after the release the server has leased %s", err, l.leased())
	}
}
