package integration

import "testing"

var transports = []string{"tcp", "udp"}

// publish gives the flags that publish a port over TCP and UDP.
func publish(spec string) []string {
	return []string{"-p", spec, "-p", spec + "/udp"}
}

// TestPublishedEverywhere: a port published without an address is reached at every address of the
// host, from everywhere.
func TestPublishedEverywhere(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("every", "--subnet", "198.19.20.0/24", "--ipv6", "--subnet", "fd00:19:20::/64")
		h.network("beside", "--subnet", "198.19.21.0/24", "--ipv6", "--subnet", "fd00:19:21::/64")
		h.server("every-a", "every", publish("8200:80")...)
		h.client("every-b", "every")
		h.client("beside-c", "beside")
		ip4, ip6 := h.ip+":8200", "["+host6[h.Engine]+"]:8200"
		const gateway4, gateway6 = "198.19.20.1", "fd00:19:20::1"
		for _, c := range []struct {
			what     string
			from     from
			at, seen string
		}{
			{"another machine", on(shared.peer), ip4, peer4},
			{"another machine", on(shared.peer), ip6, peer6},
			{"the host at its own address", on(h.Machine), ip4, ""},
			{"the host at its own address", on(h.Machine), ip6, ""},
			{"the host at localhost", on(h.Machine), "127.0.0.1:8200", gateway4},
			{"the host at localhost", on(h.Machine), "[::1]:8200", gateway6},
			{"a container of the network", h.in("every-b"), ip4, gateway4},
			{"a container of the network", h.in("every-b"), ip6, gateway6},
			{"a container of another network", h.in("beside-c"), ip4, gateway4},
			{"a container of another network", h.in("beside-c"), ip6, gateway6},
			{"a container at another network's gateway", h.in("beside-c"), gateway4 + ":8200", gateway4},
			{"the container itself", h.in("every-a"), ip4, gateway4},
			{"the container itself", h.in("every-a"), ip6, gateway6},
		} {
			for _, transport := range transports {
				reaches(t, c.what, c.from, transport, c.at, c.seen)
			}
		}
		barred(t, "the container's port on the host", on(shared.peer), "tcp", h.ip+":80")
	})
}

// TestPublishedOnOneAddress: a port published on one address of the host is reached there only.
func TestPublishedOnOneAddress(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("narrow", "--subnet", "198.19.22.0/24", "--ipv6", "--subnet", "fd00:19:22::/64")
		ip4, ip6 := h.ip, "["+host6[h.Engine]+"]"
		h.server("narrow-4", "narrow", publish(ip4+":8201:80")...)
		h.server("narrow-6", "narrow", publish(ip6+":8202:80")...)
		for _, transport := range transports {
			reaches(t, "another machine, published on IPv4", on(shared.peer), transport, ip4+":8201", peer4)
			reaches(t, "the host, published on IPv4", on(h.Machine), transport, ip4+":8201", "")
			barred(t, "another machine, published on IPv4", on(shared.peer), transport, ip6+":8201")
			barred(t, "localhost, published on the LAN's address", on(h.Machine), transport, "127.0.0.1:8201")
			reaches(t, "another machine, published on IPv6", on(shared.peer), transport, ip6+":8202", peer6)
			reaches(t, "the host, published on IPv6", on(h.Machine), transport, ip6+":8202", "")
			reaches(t, "hairpin, published on IPv6", h.in("narrow-6"), transport, ip6+":8202", "fd00:19:22::1")
			barred(t, "another machine, published on IPv6", on(shared.peer), transport, ip4+":8202")
			barred(t, "localhost, published on the LAN's address", on(h.Machine), transport, "[::1]:8202")
		}
	})
}

// TestPublishedForIPv6Clients: a container without IPv6 is reached by IPv6 clients, by a relay.
func TestPublishedForIPv6Clients(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("four", "--subnet", "198.19.23.0/24")
		h.server("four-a", "four", publish("8203:80")...)
		for _, transport := range transports {
			reaches(t, "an IPv6 client outside", on(shared.peer), transport, "["+host6[h.Engine]+"]:8203", "198.19.23.1")
			reaches(t, "an IPv6 client on the host", on(h.Machine), transport, "[::1]:8203", "198.19.23.1")
			reaches(t, "an IPv4 client outside", on(shared.peer), transport, h.ip+":8203", peer4)
		}
	})
}
