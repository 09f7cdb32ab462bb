package main

// nat is the mode nat, with a second network beside the first.
func (w *world) nat() *mode {
	m := w.mode("nat", "web", func(h *host) string { return h.lanIP }, "10.81.0.0/24", "10.82.0.0/24")
	m.before = func(s *side) error { // somebody on the LAN knows the way to the containers
		_, err := w.outside.Run("ip", "route", "replace", s.pool, "via", s.ip)
		return err
	}
	m.with = func(s *side) [][]string {
		return [][]string{
			create("web", "--subnet", s.pool),
			create("app"),
			serving("web1", "web", "-p", "8080:80", "-p", "8080:80/udp", "-p", "127.0.0.1:8081:80", "-p", "127.0.0.1:8081:80/udp"),
			serving("web2", "web"),
			serving("app1", "app"),
		}
	}
	web1, web2, app1, outside := in("web1"), in("web2"), in("app1"), at(w.outside)
	own, published, secret := port(one, 80), port(itself, 8080), port(itself, 8081)
	m.rows = []row{
		{"container", "container, same network", "reached, as itself", w.reached(web2, own, two)},
		{"container", "container, other nat network", "refused", w.barred(app1, own)},
		{"container", "outside", "reached, as the host", w.reached(web1, port(fixed(outsideIP), 80), itself)},
		{"host", "container's own address", "reached", w.reached(onHost, own, gateway)},
		{"outside", "container's own address, with a route", "refused", w.barred(outside, own)},
		{"outside", "published port", "reached, as itself", w.reached(outside, published, fixed(outsideIP))},
		{"other host's container", "published port", "reached, as its host", w.reached(other(web2), published, otherHost)},
		{"host", "published port at its own address", "reached", w.reached(onHost, published, anybody)},
		{"host", "published port at 127.0.0.1", "reached", w.reached(onHost, port(loopback, 8080), anybody)},
		{"container", "published port at the host's address", "reached (hairpin)", w.reached(web2, published, gateway)},
		{"container, other network", "published port at the host's address", "reached", w.reached(app1, published, anybody)},
		{"container", "itself through its published port", "reached (hairpin)", w.reached(web1, published, gateway)},
		{"host", "port published on 127.0.0.1", "reached", w.reached(onHost, port(loopback, 8081), anybody)},
		{"outside", "port published on 127.0.0.1", "refused", w.barred(outside, secret)},
	}
	return m
}
