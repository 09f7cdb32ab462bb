package integration

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

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

// TestPublishedOnLoopback: a port published on 127.0.0.1 is for the host alone. Linux lets packets
// to 127.0.0.1 in where somebody has set route_localnet, and then it is dockway that drops them.
func TestPublishedOnLoopback(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("local", "--subnet", "198.19.24.0/24", "--ipv6", "--subnet", "fd00:19:24::/64")
		h.server("local-a", "local", slices.Concat(publish("127.0.0.1:8204:80"), publish("[::1]:8205:80"), publish("8206:80"))...)
		for _, transport := range transports {
			reaches(t, "the host", on(h.Machine), transport, "127.0.0.1:8204", "198.19.24.1")
			reaches(t, "the host", on(h.Machine), transport, "[::1]:8205", "fd00:19:24::1")
			barred(t, "another machine", on(shared.peer), transport, h.ip+":8204")
			barred(t, "another machine", on(shared.peer), transport, "["+host6[h.Engine]+"]:8205")
			barred(t, "the host at its LAN address", on(h.Machine), transport, h.ip+":8204")
			barred(t, "the container itself", h.in("local-a"), transport, h.ip+":8204")
		}

		serve := h.Command(t.Context(), shared.probe, "serve", "udp", "127.0.0.1:8298")
		if err := serve.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = h.Run("pkill", "-f", "serve udp 127.0.0.1:8298"); _ = serve.Wait() })
		reaches(t, "a process of the host", on(h.Machine), "udp", "127.0.0.1:8298", "127.0.0.1")

		peerMAC, hostMAC := mac(t, shared.peer.Run, "eth0"), mac(t, h.Run, "eth0")
		frame := func(fromPort uint16, to string, toPort uint16, text string) []byte {
			return udp(hostMAC, peerMAC, peer4, fromPort, to, toPort, text)
		}
		for _, lets := range []string{"0", "1"} {
			if _, err := h.Run("sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet="+lets); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _, _ = h.Run("sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet=0") })
			container := h.watchIn("local-a", "eth0", "the end")
			sendFrames(t, on(shared.peer), "eth0", frame(4241, "127.0.0.1", 8204, "by way of localhost"))
			if lets == "1" { // else the test could not fail
				answered := watchOn(t, shared.peer, "eth0", peer4+":4242") // what the process answers
				sendFrames(t, on(shared.peer), "eth0", frame(4242, "127.0.0.1", 8298, "?"))
				answered.frames()
			}
			sendFrames(t, on(shared.peer), "eth0", frame(4243, h.ip, 8206, "the end"))
			if said := container.said("by way of localhost"); said != nil {
				t.Errorf("route_localnet=%s: another machine reaches a port published on 127.0.0.1 with a frame for that address", lets)
			}
		}
	})
}

// TestPublishedSCTP: an association's first packet arrives translated, and its answer comes back,
// though this kernel need not have SCTP itself.
func TestPublishedSCTP(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("sctp", "--subnet", "198.19.25.0/24", "--ipv6", "--subnet", "fd00:19:25::/64")
		h.client("sctp-a", "sctp", "-p", "8207:9000/sctp", "-p", "8206:80/udp")
		h.client("sctp-b", "sctp")
		peerMAC, hostMAC := mac(t, shared.peer.Run, "eth0"), mac(t, h.Run, "eth0")
		aMAC, bMAC := mac(t, h.exec("sctp-a"), "eth0"), mac(t, h.exec("sctp-b"), "eth0")
		a4, a6, b4 := h.address("sctp-a", "sctp"), h.address6("sctp-a", "sctp"), h.address("sctp-b", "sctp")
		ip6 := host6[h.Engine]

		seen := h.watchIn("sctp-a", "eth0", "the end")
		sendFrames(t, on(shared.peer), "eth0",
			ipFrame(hostMAC, peerMAC, 132, peer4, h.ip, initChunk(5001, 8207)),
			ipFrame(hostMAC, peerMAC, 132, peer6, ip6, initChunk(5002, 8207)),
			ipFrame(hostMAC, peerMAC, 132, peer4, h.ip, initChunk(5003, 8208)), // not published
			ipFrame(hostMAC, peerMAC, 132, peer4, h.ip, initChunk(5004, 9000))) // the container's port
		sendFrames(t, h.in("sctp-b"), "eth0",
			ipFrame(aMAC, bMAC, 132, b4, a4, initChunk(5005, 9000)),
			ipFrame(aMAC, bMAC, 132, b4, a4, initChunk(5006, 9001)), // not published
			ipFrame(mac(t, h.Run, h.linkWith("198.19.25.1")), bMAC, 132, b4, h.ip, initChunk(5007, 8207)))
		sendFrames(t, on(shared.peer), "eth0", udp(hostMAC, peerMAC, peer4, 4243, h.ip, 8206, "the end"))
		var got []string
		for _, f := range seen.frames() {
			if c, ok := parse(f); ok && c.protocol == 132 {
				got = append(got, fmt.Sprintf("%s:%d to %s:%d", c.from, binary.BigEndian.Uint16(c.payload), c.to, binary.BigEndian.Uint16(c.payload[2:])))
				if !crcRight(c.payload) {
					t.Errorf("%s: the checksum is wrong", got[len(got)-1])
				}
			}
		}
		want := []string{
			peer4 + ":5001 to " + a4 + ":9000",
			peer6 + ":5002 to " + a6 + ":9000",
			b4 + ":5005 to " + a4 + ":9000",
			"198.19.25.1:5007 to " + a4 + ":9000",
		}
		if !slices.Equal(got, want) {
			t.Errorf("of SCTP the container got\n%q, want\n%q", got, want)
		}
	})
}

// initChunk is the packet that asks for an SCTP association (RFC 9260, 3.3.2).
func initChunk(from, to uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)              // no tag yet; the checksum
	b = append(b, 1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0) // INIT, tag, window
	b = append(b, 0, 1, 0, 1, 0, 0, 0, 1)              // streams, first number
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

func crcRight(packet []byte) bool {
	b := slices.Clone(packet)
	sum := binary.LittleEndian.Uint32(b[8:])
	copy(b[8:12], []byte{0, 0, 0, 0})
	return sum == crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
}

// ports is what dockway ports says of a container's port: the host ports by protocol.
func (h *host) ports(containerIP string, containerPort int) map[string][]int {
	h.t.Helper()
	out, err := h.Dockway("ports", "--json")
	if err != nil {
		h.t.Fatal(err)
	}
	var all []struct {
		Protocol      string `json:"proto"`
		HostPort      int    `json:"host_port"`
		ContainerIP   string `json:"container_ip"`
		ContainerPort int    `json:"container_port"`
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		h.t.Fatal(err)
	}
	found := map[string][]int{}
	for _, p := range all {
		if p.ContainerIP == containerIP && p.ContainerPort == containerPort && !slices.Contains(found[p.Protocol], p.HostPort) {
			found[p.Protocol] = append(found[p.Protocol], p.HostPort)
		}
	}
	return found
}

// TestPublishedRanges: a range of ports each to each, the first free one of a range, and any.
func TestPublishedRanges(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("ranges", "--subnet", "198.19.26.0/24")
		h.start("ranges-a", "ranges", []string{"-p", "8100-8103:8100-8103"}, "sh", "-c", "for p in 8100 8101 8102; do /probe serve tcp :$p & done; exec /probe serve tcp :8103")
		for _, port := range []string{"8100", "8101", "8102", "8103"} {
			reaches(t, "each port of a range", on(shared.peer), "tcp", h.ip+":"+port, peer4)
		}
		for i, want := range []int{8110, 8111, 8112} {
			name := fmt.Sprintf("ranges-first-%d", i)
			h.server(name, "ranges", "-p", "8110-8112:80")
			if got := h.ports(h.address(name, "ranges"), 80); !slices.Equal(got["tcp"], []int{want}) {
				t.Errorf("container %d with 8110-8112:80 has %v, want port %d", i, got, want)
			}
			reaches(t, "the first free port of a range", on(shared.peer), "tcp", fmt.Sprintf("%s:%d", h.ip, want), peer4)
		}
		h.refused("published by endpoint", "run", "--rm", "--network", "ranges", "-p", "8110-8112:80", lab.Image, "true")
		h.docker("rm", "-f", "ranges-first-1")
		h.server("ranges-again", "ranges", "-p", "8110-8112:80")
		reaches(t, "a port of the range that has become free", on(shared.peer), "tcp", h.ip+":8111", peer4)

		h.server("ranges-any", "ranges", publish("80")...)
		any := h.ports(h.address("ranges-any", "ranges"), 80)
		for _, transport := range transports {
			if len(any[transport]) != 1 || any[transport][0] < 32768 || any[transport][0] > 60999 {
				t.Errorf("for -p 80 over %s dockway chose %v, want one port from 32768 to 60999", transport, any[transport])
				continue
			}
			at := fmt.Sprint(any[transport][0])
			reaches(t, "a port of dockway's choice", on(shared.peer), transport, h.ip+":"+at, peer4)
			reaches(t, "a port of dockway's choice over IPv6", on(shared.peer), transport, "["+host6[h.Engine]+"]:"+at, "")
		}
	})
}

// TestPortTaken: a host port that somebody has is refused, with who has it, and nothing of the
// refused container stays.
func TestPortTaken(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("taken", "--subnet", "198.19.27.0/24", "-o", "network_name=taken")
		h.server("taken-ours", "taken", append(publish("8120:80"), "-p", h.ip+":8121:80")...)
		h.start("taken-theirs", "bridge", publish("8122:80"), "sleep", "1000")
		for _, network := range transports {
			address := h.ip + ":8123"
			cmd := h.Command(t.Context(), shared.probe, "serve", network, address)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _, _ = h.Run("pkill", "-f", "serve "+network+" "+address); _ = cmd.Wait() })
			reaches(t, "a process of the host", on(h.Machine), network, address, h.ip)
		}
		before, err := h.Dockway("ports", "--json")
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ spec, says string }{
			{"8120:80", "host port 0.0.0.0:8120/tcp is published by endpoint"},
			{"8120:80", "(198.19.27.2) of network taken"},
			{"8120:80/udp", "host port 0.0.0.0:8120/udp is published by endpoint"},
			{h.ip + ":8120:80", "host port 0.0.0.0:8120/tcp is published by endpoint"},
			{"8121:80", "host port " + h.ip + ":8121/tcp is published by endpoint"},
			{"8122:80", "8122/tcp is in use by another process of this host (uid 0"}, // Docker's proxy
			{"8122:80/udp", "8122/udp is in use by another process of this host (uid 0"},
			{"8123:80", "8123/tcp is in use by another process of this host (uid 0"},
			{"8123:80/udp", "8123/udp is in use by another process of this host (uid 0"},
		} {
			h.refused(c.says, "run", "--rm", "--network", "taken", "-p", "8124:80", "-p", c.spec, lab.Image, "true")
		}
		if after, err := h.Dockway("ports", "--json"); err != nil || after != before {
			t.Errorf("ports after containers were refused: %s, %v; before: %s", after, err, before)
		}
		h.docker("run", "--rm", "--network", "taken", "-p", "8124:80", lab.Image, "true")
		barred(t, "the port again", on(shared.peer), "tcp", h.ip+":8124")
	})
}

// TestPortFreed: a port is free at once when its container stops, is removed or leaves the network.
func TestPortFreed(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		h.network("freed", "--subnet", "198.19.28.0/24")
		h.server("freed-0", "freed", publish("8130:80")...)
		for i, free := range [][]string{{"stop", "-t", "0"}, {"kill"}, {"rm", "-f"}, {"network", "disconnect", "freed"}, {"network", "disconnect", "-f", "freed"}} {
			reaches(t, "the holder", on(shared.peer), "tcp", h.ip+":8130", peer4)
			h.docker(append(free, fmt.Sprintf("freed-%d", i))...)
			barred(t, "the port after docker "+strings.Join(free, " "), on(shared.peer), "tcp", h.ip+":8130")
			barred(t, "the port after docker "+strings.Join(free, " "), on(h.Machine), "udp", "127.0.0.1:8130")
			h.server(fmt.Sprintf("freed-%d", i+1), "freed", publish("8130:80")...)
			reaches(t, "the next holder, after docker "+strings.Join(free, " "), on(shared.peer), "udp", h.ip+":8130", peer4)
		}
	})
}

// TestPortsLeaveHost: ports need neither route_localnet nor a process beside the plugin.
func TestPortsLeaveHost(t *testing.T) {
	eachEngine(t, func(t *testing.T, h *host) {
		processes := func() string {
			out, err := h.Script("ps -eo comm= | grep -Ev '^(ps|grep|sh|sort|uniq|nsenter|docker|containerd-shim)$' | sort | uniq")
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
		before := processes()
		h.network("light", "--subnet", "198.19.29.0/24", "--ipv6", "--subnet", "fd00:19:29::/64")
		h.start("light-a", "light", slices.Concat(publish("8140:80"), publish("127.0.0.1:8141:80"), publish("["+host6[h.Engine]+"]:8142:80")),
			"sh", "-c", "exec /probe serve tcp :80")
		reaches(t, "from outside", on(shared.peer), "tcp", h.ip+":8140", peer4)
		reaches(t, "from localhost", on(h.Machine), "tcp", "127.0.0.1:8141", "")
		if after := processes(); after != before+"\nprobe" && after != before {
			t.Errorf("programs after ports were published:\n%s\nbefore:\n%s", after, before)
		}
		out, err := h.Script("grep -L '^0$' /proc/sys/net/ipv4/conf/*/route_localnet; grep -l '^0$' /proc/sys/net/ipv4/conf/dwb*/route_localnet >/dev/null")
		if err != nil || out != "" {
			t.Errorf("route_localnet is set: %s, %v", out, err)
		}
	})
}
