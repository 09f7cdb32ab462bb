package main

import (
	"errors"
	"fmt"
)

// onTheWire are the modes that put containers on the physical network. They are shown one after the
// other, on the same uplink of each host.
func (w *world) onTheWire() []*mode { return []*mode{w.transparent(), w.l2bridge(), w.l2tunnel()} }

func (w *world) transparent() *mode {
	m := w.wireMode("transparent", "lan", "198.18.64.16/28", "198.18.64.32/28")
	m.rows = append(m.rows,
		row{"anybody", "published port", "refused", w.unpublishable("lan")},
		row{"the wire", "frames of a container", "the container's MAC", w.carries("lan1", false)},
		row{"the wire", "who has its address (ARP)?", "the container's MAC", w.foundAt("lan1", false)},
		w.removed("lan"))
	return m
}

func (w *world) l2bridge() *mode {
	m := w.wireMode("l2bridge", "pods", "198.18.64.48/28", "198.18.64.64/28", "-p", "8090:80", "-p", "8090:80/udp")
	pods1, published := in("pods1"), port(itself, 8090)
	m.rows = append(m.rows,
		row{"machine on the LAN", "published port", "reached, as itself", w.reached(at(w.desk), published, fixed(deskIP))},
		row{"another subnet", "published port", "reached, as itself", w.reached(at(w.far), published, fixed(farIP))},
		row{"other host's container", "published port", "reached, as itself", w.reached(other(pods1), published, otherOne)},
		row{"host", "published port at 127.0.0.1", "reached", w.reached(onHost, port(loopback, 8090), anybody)},
		row{"container", "published port at the host's address", "reached (hairpin)", w.reached(pods1, published, anybody)},
		row{"the wire", "frames of a container", "the host's MAC", w.carries("pods1", true)},
		row{"the wire", "who has its address (ARP)?", "the host's MAC", w.foundAt("pods1", true)},
		row{"the switch", "frames between containers of a host", "their own MACs", w.bridged("pods1", "pods2")},
		w.removed("pods"))
	return m
}

func (w *world) l2tunnel() *mode {
	m := w.wireMode("l2tunnel", "tenant", "198.18.64.80/28", "198.18.64.96/28", "-p", "8090:80", "-p", "8090:80/udp")
	blocked := w.barred(in("tenant2"), port(one, 80))
	m.rows = append(m.rows,
		row{"machine on the LAN", "published port", "reached, as the host", w.reached(at(w.desk), port(itself, 8090), itself)},
		row{"host", "published port at 127.0.0.1", "reached", w.reached(onHost, port(loopback, 8090), anybody)},
		row{"the wire", "frames of a container", "the host's MAC", w.carries("tenant1", true)},
		row{"the wire", "frames between containers of a host", "to gateway and back", w.returns()},
		row{"container", "container; the gateway forbids it", "refused", blocked.while(w.forbidden(m))},
		row{"container", "container; the gateway is dead", "refused", blocked.while(w.dead)},
		w.removed("tenant"))
	return m
}

// wireMode is what the modes on the wire have in common. Container NETWORK2 may publish ports.
func (w *world) wireMode(name, network, pool, otherPool string, publish ...string) *mode {
	m := w.mode(name, network, func(h *host) string { return h.wireIP }, pool, otherPool)
	m.before = w.watch
	m.with = func(s *side) [][]string {
		return [][]string{
			create(network, "--subnet", wire, "--gateway", gatewayIP, "--ip-range", s.pool, "-o", "mode="+name, "-o", "interface="+uplink),
			serving(network+"1", network),
			serving(network+"2", network, publish...),
		}
	}
	tunnel := name == "l2tunnel"
	within, beyond := "reached, as itself", "through the router"
	if tunnel {
		within, beyond = "through the gateway", "through the gateway"
	}
	reached := func(where func(*side) place, server, client text) trial {
		return w.counted(w.reached(where, port(server, 80), client), client, server, func(s *side, from, to string) bool {
			if tunnel && (from == s.ip || from == s.one || from == s.two || from == s.other.one) {
				return true
			}
			return from == farIP || to == farIP
		})
	}
	c1, c2, desk, far := in(network+"1"), in(network+"2"), fixed(deskIP), fixed(farIP)
	m.rows = []row{
		{"container", "container, same host", within, reached(c2, one, two)},
		{"container", "container, other host", within, reached(c1, otherOne, one)},
		{"container", "machine on the LAN", within, reached(c1, desk, one)},
		{"container", "another subnet", beyond, reached(c1, far, one)},
		{"machine on the LAN", "container", "reached, as itself", reached(at(w.desk), one, desk)},
		{"another subnet", "container", beyond, reached(at(w.far), one, far)},
		{"host", "container", within, reached(onHost, one, itself)},
		{"container", "host", within, reached(c1, itself, one)},
		{"other host", "container", "reached, as itself", reached(other(onHost), one, otherHost)},
	}
	return m
}

// counted adds to a trial whether the router passes the packets that it is to pass, and no others.
func (w *world) counted(t trial, client, server text, passes func(s *side, from, to string) bool) trial {
	return trial{on: func(s *side) cell {
		from, to := client(s), server(s)
		there, back := w.counter(from, to), w.counter(to, from)
		c := t.on(s)
		n, err := there()
		m, err2 := back()
		passed := fmt.Sprintf("the router passed %d packets there and %d back", n, m)
		if n+m == 0 {
			passed = "not by the router"
		}
		c.told += ", " + passed
		if err := errors.Join(err, err2); err != nil || c.err != nil {
			c.err = errors.Join(c.err, err)
		} else if (n > 0) != passes(s, from, to) || (m > 0) != passes(s, to, from) {
			c.err = errors.New(passed)
		}
		return c
	}}
}

// counter counts what the router passes from now on.
func (w *world) counter(from, to string) func() (int, error) {
	before, err := w.router.Forwarded(from, to)
	return func() (int, error) {
		if err != nil {
			return 0, err
		}
		after, err := w.router.Forwarded(from, to)
		return after - before, err
	}
}

// forbidden makes the router drop what containers of one host send each other.
func (w *world) forbidden(m *mode) condition {
	return func() (func() error, error) {
		a, b := m.sides[0], m.sides[1]
		rule, err := w.router.Drop(fmt.Sprintf("ip saddr . ip daddr { %s . %s, %s . %s }", a.two, a.one, b.two, b.one))
		if err != nil {
			return nil, err
		}
		return rule.Remove, nil
	}
}

// dead makes the router silent.
func (w *world) dead() (func() error, error) { return w.router.Revive, w.router.Die() }
