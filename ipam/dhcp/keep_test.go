package dhcp

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

func TestKeepRenewsAtT1(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		lease := h.obtain(t)
		h.keep(t, lease)
		pass(lease.T1 * 19 / 20)
		before := len(h.received(s, dhcpv4.MessageTypeRequest))
		pass(lease.T1 / 20)
		m := h.received(s, dhcpv4.MessageTypeRequest)
		if before != 1 || len(m) != 2 {
			t.Fatalf("%d and %d requests", before, len(m))
		}
		address := lease.Prefix.Addr()
		if r := m[1]; !r.unicast || r.source != address || r.ciaddr != address || r.requested.IsValid() || r.named.IsValid() || r.broadcast {
			t.Errorf("renewal %+v", r)
		}
		n := h.reported()
		if len(n) != 1 || n[0].Kind != Renewed || !n[0].lease.Obtained.Equal(m[1].at) || !reflect.DeepEqual(n[0].Previous, lease) {
			t.Fatalf("reported %+v", n)
		}
		if kept := h.Leases(); len(kept) != 1 || !reflect.DeepEqual(kept[0], n[0].lease) {
			t.Errorf("kept %+v", kept)
		}
		pass(24 * time.Hour)
		if n := len(h.reported()); n < 48 || n > 52 {
			t.Errorf("%d renewals in a day and an hour", n)
		}
		if slices.ContainsFunc(h.kinds(), func(k Kind) bool { return k != Renewed }) {
			t.Errorf("reported %v", h.kinds())
		}
	}, s)
}

func TestKeepRepeatsALostRenewal(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		lease := h.obtain(t)
		h.keep(t, lease)
		h.change(func() { h.lose = func(m *dhcpv4.DHCPv4, n int) bool { return n == 2 } })
		pass(lease.T2 - time.Second)
		if !slices.Equal(h.kinds(), []Kind{Renewed}) {
			t.Errorf("reported %v before T2", h.kinds())
		}
	}, s)
}

// TestKeepRebindsAtT2 has the lease's server go away, and another know the lease.
func TestKeepRebindsAtT2(t *testing.T) {
	s, other := newServer(1), newServer(2)
	other.offers = false
	onWire(t, func(t *testing.T, h *host) {
		lease := h.obtain(t)
		h.keep(t, lease)
		h.change(func() {
			s.silent = true
			other.leases[container] = lease.Prefix.Addr()
		})
		pass(lease.T2 - time.Second)
		if n := h.reported(); len(n) != 0 {
			t.Fatalf("reported %+v before T2", n)
		}
		pass(2 * time.Second)
		n := h.reported()
		if len(n) != 1 || n[0].Kind != Renewed || n[0].lease.Server != other.ip || n[0].lease.ServerMAC != other.mac {
			t.Fatalf("reported %+v", n)
		}
		m := h.received(other, dhcpv4.MessageTypeRequest)
		if r := m[len(m)-1]; r.unicast || r.ciaddr != lease.Prefix.Addr() || r.named.IsValid() || r.requested.IsValid() {
			t.Errorf("rebinding %+v", r)
		}
		pass(lease.T1)
		m = h.received(other, dhcpv4.MessageTypeRequest)
		if r := m[len(m)-1]; !r.unicast || !slices.Equal(h.kinds(), []Kind{Renewed, Renewed}) {
			t.Errorf("renewal from the new server: %+v, reported %v", r, h.kinds())
		}
	}, s, other)
}

// TestKeepWithoutContainer: answers that go to the address do not arrive, since nobody answers ARP for it.
func TestKeepWithoutContainer(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		lease := h.obtain(t)
		h.keep(t, lease)
		h.change(func() { h.lose = func(m *dhcpv4.DHCPv4, n int) bool { return !m.ClientIPAddr.IsUnspecified() } })
		pass(100 * time.Hour)
		if k := h.kinds(); len(k) < 100 || slices.ContainsFunc(k, func(k Kind) bool { return k != Renewed }) {
			t.Errorf("reported %v", k)
		}
	}, s)
}

func TestKeepReportsExpiry(t *testing.T) {
	for _, same := range []bool{true, false} {
		t.Run(fmt.Sprintf("same=%t", same), func(t *testing.T) {
			s := newServer(1)
			onWire(t, func(t *testing.T, h *host) {
				lease := h.obtain(t)
				h.keep(t, lease)
				h.change(func() { s.silent = true })
				pass(time.Until(lease.Expires()) - time.Second)
				if n := h.reported(); len(n) != 0 {
					t.Fatalf("reported %+v before the end", n)
				}
				if n := len(h.received(s, dhcpv4.MessageTypeRequest)); n < 8 || n > 14 {
					t.Errorf("%d requests from T1 to the end", n)
				}
				pass(2 * time.Second)
				n := h.reported()
				if len(n) != 1 || n[0].Kind != Expired || n[0].Err == nil || !reflect.DeepEqual(n[0].lease, lease) {
					t.Fatalf("reported %+v", n)
				}
				within(t, "expiry", n[0].at.Sub(lease.Obtained), lease.Lifetime, lease.Lifetime)

				pass(10 * time.Hour)
				sent := h.received(s, dhcpv4.MessageTypeDiscover)
				if last := sent[len(sent)-1]; last.requested != lease.Prefix.Addr() || len(sent) < 500 || len(sent) > 650 {
					t.Errorf("%d messages in 10 h, the last %+v", len(sent), last)
				}
				if kept := h.Leases(); len(kept) != 1 || !reflect.DeepEqual(kept[0], lease) {
					t.Errorf("kept %+v", kept)
				}
				h.change(func() {
					s.silent = false
					if !same {
						s.leases = map[MAC]netip.Addr{}
					}
				})
				pass(2 * time.Minute)
				n = h.reported()
				switch last := n[len(n)-1]; {
				case len(n) != 2 || !reflect.DeepEqual(last.Previous, lease):
					t.Errorf("reported %+v", n)
				case same && (last.Kind != Renewed || last.lease.Prefix != lease.Prefix):
					t.Errorf("reported %+v", last)
				case !same && (last.Kind != Changed || last.lease.Prefix.Addr() != lease.Prefix.Addr().Next()):
					t.Errorf("reported %+v", last)
				}
				pass(24 * time.Hour)
				if len(h.reported()) < 48 {
					t.Error("the new lease is not kept")
				}
			}, s)
		})
	}
}

func TestKeepReportsARefusal(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		lease := h.obtain(t)
		h.keep(t, lease)
		h.change(func() { s.leases[container] = netip.MustParseAddr("198.18.1.200") })
		pass(lease.T1 + time.Second)
		n := h.reported()
		var refused *RefusedError
		if len(n) != 2 || n[0].Kind != Refused || !errors.As(n[0].Err, &refused) || n[1].Kind != Changed {
			t.Fatalf("reported %+v", n)
		}
		if n[1].lease.Prefix.Addr() != s.leases[container] || n[1].Previous.Prefix != lease.Prefix {
			t.Errorf("reported %+v", n[1])
		}
		sent := h.received(s, dhcpv4.MessageTypeDiscover)
		if len(sent) != 2 || sent[1].requested != lease.Prefix.Addr() {
			t.Errorf("asked for a new lease with %+v", sent)
		}
	}, s)
}

// TestKeepMindsOnlyItsServer has a stranger refuse a renewal that is not his.
func TestKeepMindsOnlyItsServer(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		lease := h.obtain(t)
		h.keep(t, lease)
		h.change(func() {
			s.edit = func(a *dhcpv4.DHCPv4) {
				a.UpdateOption(dhcpv4.OptServerIdentifier([]byte{198, 18, 66, 66}))
				a.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeNak))
			}
		})
		pass(lease.T2 - time.Second)
		if n := h.reported(); len(n) != 0 {
			t.Errorf("reported %+v", n)
		}
	}, s)
}

// TestKeepAmongServers has another server of the LAN, which does not know the lease, be faster to refuse it than its server is to
// say that it holds. When only the other one says something, that counts.
func TestKeepAmongServers(t *testing.T) {
	for _, c := range []struct {
		name   string
		silent bool
		want   Kind
	}{{"granted", false, Renewed}, {"only refused", true, Refused}} {
		t.Run(c.name, func(t *testing.T) {
			other, s := newServer(2), newServer(1)
			other.offers, other.refuse = false, func(dhcpv4.MessageType) bool { return true }
			onWire(t, func(t *testing.T, h *host) {
				lease := h.obtain(t)
				if err := h.Close(); err != nil {
					t.Fatal(err)
				}
				h.change(func() {
					s.silent = c.silent
					h.delay = func(m *dhcpv4.DHCPv4) time.Duration {
						if m.MessageType() == dhcpv4.MessageTypeNak {
							return 0
						}
						return otherServers / 2
					}
				})
				h.start(t)
				h.keep(t, recorded(t, lease))
				pass(restartFuzz + 2*otherServers)
				if n := h.reported(); len(n) != 1 || n[0].Kind != c.want {
					t.Errorf("reported %+v", n)
				}
			}, other, s)
		})
	}
}

func TestKeepReportsNewSettings(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		lease := h.obtain(t)
		h.keep(t, lease)
		h.change(func() {
			s.edit = func(a *dhcpv4.DHCPv4) { a.UpdateOption(dhcpv4.OptRouter([]byte{198, 18, 0, 9})) }
		})
		pass(lease.T1)
		n := h.reported()
		if len(n) != 1 || n[0].Kind != Changed || n[0].lease.Gateway != netip.MustParseAddr("198.18.0.9") {
			t.Errorf("reported %+v", n)
		}
	}, s)
}

func TestKeepForever(t *testing.T) {
	s := newServer(1)
	s.lifetime = Infinite
	onWire(t, func(t *testing.T, h *host) {
		h.keep(t, h.obtain(t))
		pass(50 * 365 * 24 * time.Hour)
		if n := len(h.received(s, dhcpv4.MessageTypeRequest)); n != 1 || len(h.reported()) != 0 {
			t.Errorf("%d requests, reported %v", n, h.kinds())
		}
	}, s)
}

// recorded is a lease that went through a record.
func recorded(t *testing.T, l Lease) (read Lease) {
	t.Helper()
	text, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &read); err != nil {
		t.Fatal(err)
	}
	return read
}

func TestKeepAfterARestart(t *testing.T) {
	const half = 30 * time.Minute
	for _, c := range []struct {
		name   string
		down   time.Duration // of the host
		change func(s *server)
		want   []Kind
		at     time.Duration // of the first, from the start
		until  time.Duration
	}{
		{"confirmed", half, func(s *server) {}, []Kind{Renewed}, 0, restartFuzz},
		{"confirmed early", time.Minute, func(s *server) {}, []Kind{Renewed}, 0, restartFuzz},
		{"refused", half, func(s *server) { s.leases[container] = netip.MustParseAddr("198.18.1.200") }, []Kind{Refused, Changed}, 0, restartFuzz},
		{"silent", half, func(s *server) { s.silent = true }, []Kind{Expired}, half, half},
		{"forgotten", half, func(s *server) { s.leases = map[MAC]netip.Addr{}; s.offers = false }, []Kind{Expired}, half, half},
		{"over", 2 * half, func(s *server) {}, []Kind{Expired, Renewed}, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(1)
			onWire(t, func(t *testing.T, h *host) {
				lease := h.obtain(t)
				if err := h.Close(); err != nil {
					t.Fatal(err)
				}
				pass(c.down - time.Since(lease.Obtained))
				h.change(func() { c.change(s) })
				h.start(t)
				started := time.Now()
				h.keep(t, recorded(t, lease))
				pass(half + time.Minute)
				n := h.reported()
				if len(n) < len(c.want) || !slices.Equal(h.kinds()[:len(c.want)], c.want) {
					t.Fatalf("reported %v, want %v", h.kinds(), c.want)
				}
				within(t, "first event", n[0].at.Sub(started), c.at, c.until)
				if c.name == "over" {
					return
				}
				m := h.received(s, dhcpv4.MessageTypeRequest)[1]
				if m.unicast || m.named.IsValid() || m.ciaddr != noAddress || m.requested != lease.Prefix.Addr() || !m.broadcast {
					t.Errorf("the lease is asked about with %+v", m)
				}
			}, s)
		})
	}
}

func TestKeepRefusesRubbish(t *testing.T) {
	onWire(t, func(t *testing.T, h *host) {
		good := h.obtain(t)
		for name, change := range map[string]func(l *Lease){
			"nothing":       func(l *Lease) { *l = Lease{} },
			"no MAC":        func(l *Lease) { l.MAC = MAC{} },
			"no address":    func(l *Lease) { l.Prefix = netip.Prefix{} },
			"no server":     func(l *Lease) { l.Server = netip.Addr{} },
			"T1 after T2":   func(l *Lease) { l.T1, l.T2 = l.T2, l.T1 },
			"negative":      func(l *Lease) { l.T1 = -1 },
			"over infinite": func(l *Lease) { l.Lifetime = 2 * Infinite },
		} {
			bad := good
			change(&bad)
			if h.Keep(bad) == nil || len(h.Leases()) != 0 {
				t.Errorf("%s: kept", name)
			}
		}
	}, newServer(1))
}

// TestKeepAgain replaces a lease that is kept, as a container's second start does.
func TestKeepAgain(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		for range 5 {
			h.keep(t, h.obtain(t))
		}
		if len(h.Leases()) != 1 {
			t.Errorf("%d leases are kept", len(h.Leases()))
		}
		before := len(h.received(s, dhcpv4.MessageTypeRequest))
		pass(30 * time.Minute)
		if n := len(h.received(s, dhcpv4.MessageTypeRequest)) - before; n != 1 {
			t.Errorf("%d renewals", n)
		}
	}, s)
}

func TestRelease(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		lease := h.obtain(t)
		h.keep(t, lease)
		pass(lease.T1)
		if err := h.Release(t.Context(), lease); err != nil {
			t.Fatal(err)
		}
		m := h.received(s, dhcpv4.MessageTypeRelease)
		if len(m) != 1 || !m[0].unicast || m[0].ciaddr != lease.Prefix.Addr() || m[0].source != lease.Prefix.Addr() || m[0].named != s.ip || m[0].requested.IsValid() {
			t.Errorf("release %+v", m)
		}
		if len(s.leases) != 0 || len(h.Leases()) != 0 {
			t.Errorf("server has %v, client keeps %v", s.leases, h.Leases())
		}
		before := len(h.reported())
		pass(24 * time.Hour)
		if len(h.reported()) != before || len(h.received(s, dhcpv4.MessageTypeRequest)) != 2 {
			t.Errorf("reported %v", h.kinds())
		}
		if h.listening() != 0 {
			t.Error("the link is still listened on")
		}
	}, s)
}

// TestReleaseAfterARestart releases a lease that is not kept, and one whose time is over.
func TestReleaseAfterARestart(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		lease := recorded(t, h.obtain(t))
		h.Close()
		h.start(t)
		if err := h.Release(t.Context(), lease); err != nil || len(h.received(s, dhcpv4.MessageTypeRelease)) != 1 {
			t.Errorf("release: %v", err)
		}
		pass(lease.Lifetime)
		if err := h.Release(t.Context(), lease); err != nil || len(h.received(s, dhcpv4.MessageTypeRelease)) != 1 {
			t.Errorf("release of what is over: %v", err)
		}
	}, s)
}

func TestClose(t *testing.T) {
	s := newServer(1)
	onWire(t, func(t *testing.T, h *host) {
		lease := h.obtain(t)
		h.keep(t, lease)
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		pass(24 * time.Hour)
		if len(s.leases) != 1 || len(h.reported()) != 0 || h.listening() != 0 {
			t.Errorf("server has %v, reported %v, %d listen", s.leases, h.kinds(), h.listening())
		}
		if err := h.Keep(lease); err == nil {
			t.Error("kept after Close")
		}
		if _, err := h.Obtain(t.Context(), lease.Request); err == nil {
			t.Error("leased after Close")
		}
	}, s)
}

// TestCloseEndsObtain closes the client while a container waits for its address.
func TestCloseEndsObtain(t *testing.T) {
	s := newServer(1)
	s.silent = true
	onWire(t, func(t *testing.T, h *host) {
		failed := make(chan error, 1)
		begin := time.Now()
		go func() {
			_, err := h.Obtain(t.Context(), Request{Link: link, MAC: container})
			failed <- err
		}()
		pass(2 * time.Second)
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-failed; err == nil || errors.Is(err, ErrNoServer) {
			t.Errorf("error: %v", err)
		}
		within(t, "error", time.Since(begin), 2*time.Second, 2*time.Second)
		pass(time.Minute)
		if n := h.listening(); n != 0 {
			t.Errorf("%d transports listen", n)
		}
	}, s)
}

// TestKeepThousands is about cost: a goroutine for each lease, no transport, and renewals that are not all at once.
func TestKeepThousands(t *testing.T) {
	const leases = 3000
	s := newServer(1)
	s.next = netip.MustParseAddr("198.18.16.1")
	onWire(t, func(t *testing.T, h *host) {
		h.probe = -1
		before := runtime.NumGoroutine()
		for i := range leases {
			lease, err := h.Obtain(t.Context(), Request{Link: link, MAC: MAC{2, 0, 0, 1, byte(i >> 8), byte(i)}})
			if err != nil {
				t.Fatal(err)
			}
			h.keep(t, lease)
		}
		pass(linger + time.Second)
		if n := runtime.NumGoroutine() - before; n > leases+10 || h.listening() != 0 {
			t.Errorf("%d goroutines and %d transports for %d leases", n, h.listening(), leases)
		}
		pass(30 * time.Minute)
		seconds := map[int64]int{}
		for _, n := range h.reported() {
			seconds[n.at.Unix()]++
		}
		if n := len(h.reported()); n != leases {
			t.Errorf("%d renewals", n)
		}
		for at, n := range seconds {
			if n > leases/20 {
				t.Errorf("%d renewals in the second %d", n, at)
			}
		}
	}, s)
}
