package integration

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

// station is somebody on the wire: where frames come from and go to.
type station struct {
	what    string
	mac     string // as the sender's neighbours know it
	v4, v6  string
	watches func(t *testing.T) *watcher // what comes in there
	sends   from
	link    string
}

// wireStations are two containers of a network on the wire, the host and the machine outside.
func wireStations(t *testing.T, w *wire, h *host, network string) (a, b, outside, itself station) {
	t.Helper()
	h.client(network+"-a", network)
	h.client(network+"-b", network)
	container := func(name string) station {
		return station{"another container", h.mac(name, network), h.address(name, network), h.address6(name, network),
			func(t *testing.T) *watcher { t.Helper(); return h.watchIn(name, "eth0", "the end") }, h.in(name), "eth0"}
	}
	a, b = container(network+"-a"), container(network+"-b")
	outside = station{"the machine outside", mac(t, w.outside.Run, "eth0"), outside4, outside6,
		func(t *testing.T) *watcher { t.Helper(); return watchOn(t, w.outside, "eth0", "the end") }, on(w.outside), "eth0"}
	itself = station{"the host", mac(t, h.Run, externalSwitch), h.wire4, h.wire6,
		func(t *testing.T) *watcher { t.Helper(); return watchOn(t, h.Machine, externalSwitch, "the end") }, on(h.Machine), externalSwitch}
	return a, b, outside, itself
}

// eachWireMode runs a test on a network of each mode, with IPv6 where the mode has it.
func eachWireMode(t *testing.T, test func(t *testing.T, mode string, w *wire, h *host)) {
	for _, mode := range wireModes {
		t.Run(mode, func(t *testing.T) {
			onWire(t, func(t *testing.T, w *wire, h, _ *host) { test(t, mode, w, h) })
		})
	}
}

// without are strings but for some.
func without(all []string, some ...string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(some, s) })
}

// TestWirePortSecurity: a container cannot speak as somebody else, nor as a router, a DHCP server or
// a switch: not to the wire, not to another container and not to the host.
func TestWirePortSecurity(t *testing.T) {
	eachWireMode(t, func(t *testing.T, mode string, w *wire, h *host) {
		h.wired("forge", mode)
		a, b, outside, itself := wireStations(t, w, h, "forge")
		wire := h.Capture(t, containerUplink)
		for _, to := range []station{b, outside, itself} {
			six := a.v6 != ""
			s := speaker{
				mac: a.mac, v4: a.v4, v6: a.v6, toMAC: to.mac, to4: to.v4, to6: to.v6,
				gateway4: wireGateway, gateway6: wireGateway6, foreign4: "198.18.64.99", foreign6: "fd00:64::99",
			}
			frames, honest := marked(six, s.honest()...)
			forged, marks := marked(six, s.forged()...)
			const split = "router advertisement in fragments"
			if six {
				forged, marks = append(forged, s.split(split)...), append(marks, split)
			}
			want := honest
			switch {
			case mode == "l2bridge" && to.what == outside.what:
				// Their first option is none that could be read: what it hides cannot be replaced.
				want = without(honest, "neighbour advertisement for itself.", "neighbour solicitation.")
			case mode == "l2tunnel" && to.what == b.what:
				want = []string{"its own IPv4 address."} // and nothing that does not pass the gateway
			case mode == "l2tunnel":
				want = without(honest, "an ARP request.") // the gateway answers
			}
			seen := to.watches(t)
			sendFrames(t, a.sends, a.link, append(frames, forged...)...)
			sendFrames(t, a.sends, a.link, udp(to.mac, a.mac, a.v4, 7, to.v4, 7, "the end"))
			same(t, "from a container to "+to.what, seen.said(append(marks, honest...)...), want)
			for _, mark := range marks {
				if left := wire.Frames(lab.Frames().Sent().Carrying(mark)); len(left) > 0 {
					t.Errorf("from a container to %s: %q is on the wire: %s", to.what, mark, left[0])
				}
			}
		}
	})
}

// TestWireDefaultFirewall: of unasked packets only certain protocols come in, whoever sends them;
// everything goes out, and answers come back.
func TestWireDefaultFirewall(t *testing.T) {
	eachWireMode(t, func(t *testing.T, mode string, w *wire, h *host) {
		h.wired("sweep", mode)
		a, b, outside, itself := wireStations(t, w, h, "sweep")
		seenAs := a.mac // by the wire
		if mode != "transparent" {
			seenAs = itself.mac
		}
		message := func(text string) []byte { return append(make([]byte, 8), text...) }
		end := func(to string) []byte { return udp(to, outside.mac, outside.v4, 1, a.v4, 1, "the end") }

		// Answers to flows that the container has opened.
		asked := [][]byte{ipFrame(outside.mac, a.mac, 253, a.v4, outside.v4, message("?")), ipFrame(outside.mac, a.mac, 47, a.v4, outside.v4, message("?"))}
		answers := [][]byte{
			ipFrame(seenAs, outside.mac, 253, outside.v4, a.v4, message("answer of 253 over IPv4")), ipFrame(seenAs, outside.mac, 47, outside.v4, a.v4, message("answer of 47")),
			ipFrame(seenAs, outside.mac, 254, outside.v4, a.v4, message("unasked of 254")),
		}
		want := []string{"answer of 253 over IPv4", "answer of 47"}
		if a.v6 != "" {
			asked = append(asked, ipFrame(outside.mac, a.mac, 253, a.v6, outside.v6, message("?")))
			answers = append(answers, ipFrame(seenAs, outside.mac, 253, outside.v6, a.v6, message("answer of 253 over IPv6")), ipFrame(seenAs, outside.mac, 254, outside.v6, a.v6, message("unasked of 254")))
			want = append(want, "answer of 253 over IPv6")
		}
		seen := a.watches(t)
		sendFrames(t, a.sends, a.link, asked...)
		sendFrames(t, outside.sends, outside.link, append(answers, end(seenAs))...)
		same(t, "answers from outside to a container that has asked", seen.said(append(want, "unasked of 254")...), want)

		allowed4, allowed6 := []byte{1, 2, 6, 17}, []byte{6, 17, 58}
		arrived := func(what string, all [][]byte) {
			t.Helper()
			same(t, what+" to a container, IPv4", swept(all, a.v4), allowed4)
			if a.v6 != "" {
				same(t, what+" to a container, IPv6", swept(all, a.v6), allowed6)
			}
		}
		from := func(s station, to string) [][]byte {
			frames := sweep(to, s.mac, s.v4, a.v4)
			if a.v6 != "" {
				frames = append(frames, sweep(to, s.mac, s.v6, a.v6)...)
			}
			return append(frames, udp(to, s.mac, s.v4, 1, a.v4, 1, "the end"))
		}
		stranger := outside // whom the container has not asked
		stranger.v4, stranger.v6 = unasked4, unasked6
		seen = a.watches(t)
		sendFrames(t, outside.sends, outside.link, from(stranger, seenAs)...)
		arrived("the LAN", seen.frames())

		seen = a.watches(t)
		sendFrames(t, b.sends, b.link, from(b, a.mac)...)
		arrived("another container", seen.frames())

		seen = a.watches(t)
		sendPackets(t, itself.sends, a.v4, sweep(a.mac, itself.mac, itself.v4, a.v4)...)
		if a.v6 != "" {
			sendPackets(t, itself.sends, a.v6, sweep(a.mac, itself.mac, itself.v6, a.v6)...)
		}
		sendPackets(t, itself.sends, a.v4, udp(a.mac, itself.mac, itself.v4, 1, a.v4, 1, "the end"))
		arrived("the host", seen.frames())

		// A lone fragment (44) leaves as the whole that it is. The next mode's container has the same
		// address, and must not hear answers to this one.
		seen = outside.watches(t)
		sendFrames(t, a.sends, a.link, sweep(outside.mac, a.mac, a.v4, stranger.v4)...)
		if a.v6 != "" {
			sendFrames(t, a.sends, a.link, sweep(outside.mac, a.mac, a.v6, stranger.v6)...)
		}
		sendFrames(t, a.sends, a.link, udp(outside.mac, a.mac, a.v4, 1, outside.v4, 1, "the end"))
		all := seen.frames()
		same(t, "a container to the outside, IPv4", swept(all, stranger.v4), allBut())
		if a.v6 != "" {
			same(t, "a container to the outside, IPv6", swept(all, stranger.v6), allBut(44))
		}
	})
}

// TestWireWithoutIPv6: on a network without IPv6 a container has none at all, not even if it or the
// LAN tries.
func TestWireWithoutIPv6(t *testing.T) {
	eachWireMode(t, func(t *testing.T, mode string, w *wire, h *host) {
		h.network("six", "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine], "-o", "mode="+mode, "-o", "interface="+containerUplink)
		a, b, outside, itself := wireStations(t, w, h, "six")
		if out := h.docker("exec", "six-a", "ip", "-6", "address", "show", "dev", "eth0"); out != "" {
			t.Errorf("a container of a network without IPv6 has an IPv6 address: %s", out)
		}
		own, wire := linkLocal(a.mac), h.Capture(t, containerUplink)
		for _, to := range []station{b, outside, itself} {
			to6 := to.v6
			if to6 == "" {
				to6 = linkLocal(to.mac)
			}
			seen := to.watches(t)
			sendFrames(t, a.sends, a.link,
				udp(to.mac, a.mac, own, 7, to6, 7, "IPv6 from a container to one"),
				udp(allNodesMAC, a.mac, own, 7, allNodes, 7, "IPv6 from a container to all"),
				ipFrame(allNodesMAC, a.mac, 58, own, allNodes, advert(own, allNodes, "IPv6 from a container as router")),
				udp(to.mac, a.mac, a.v4, 7, to.v4, 7, "IPv4"),
				udp(to.mac, a.mac, a.v4, 7, to.v4, 7, "the end"))
			same(t, "from a container without IPv6 to "+to.what, seen.said("IPv6 from a container", "IPv4"), []string{"IPv4"})
		}
		if left := wire.Frames(lab.Frames().Sent().Carrying("IPv6 from a container")); len(left) > 0 {
			t.Errorf("a container without IPv6 has sent it to the wire: %s", left[0])
		}
		seenAs := a.mac
		if mode != "transparent" {
			seenAs = itself.mac
		}
		seen := a.watches(t)
		theirs := linkLocal(outside.mac)
		sendFrames(t, outside.sends, outside.link,
			udp(a.mac, outside.mac, theirs, 7, own, 7, "IPv6 to the container's MAC"),
			udp(seenAs, outside.mac, theirs, 7, own, 7, "IPv6 to where the container is"),
			udp(allNodesMAC, outside.mac, theirs, 7, allNodes, 7, "IPv6 to all"),
			udp(seenAs, outside.mac, outside.v4, 7, a.v4, 7, "IPv4"),
			udp(seenAs, outside.mac, outside.v4, 7, a.v4, 7, "the end"))
		same(t, "from the LAN to a container without IPv6", seen.said("IPv6 to", "IPv4"), []string{"IPv4"})
	})
}

// TestWireRouters: a container has the addresses and routes that it was given, and hears no advertisements of the
// LAN's routers, which would give it others. With slaac=true it hears them.
func TestWireRouters(t *testing.T) {
	hears := func(t *testing.T, w *wire, h *host, network, mode string, want ...string) {
		a, _, outside, itself := wireStations(t, w, h, network)
		seenAs := a.mac
		if mode != "transparent" {
			seenAs = itself.mac
		}
		router, own := linkLocal(outside.mac), linkLocal(a.mac)
		seen := a.watches(t)
		sendFrames(t, outside.sends, outside.link,
			ipFrame(allNodesMAC, outside.mac, 58, router, allNodes, advert(router, allNodes, "a router to all")),
			ipFrame(a.mac, outside.mac, 58, router, own, advert(router, own, "a router to one")),
			udp(seenAs, outside.mac, outside.v4, 7, a.v4, 7, "the end"))
		same(t, "from a router of the LAN to a container", seen.said("a router to all", "a router to one"), want)
	}
	eachWireMode(t, func(t *testing.T, mode string, w *wire, h *host) {
		h.wired("routers", mode)
		hears(t, w, h, "routers", mode)
	})
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		h.network("heeds", "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine], "-o", "mode=transparent", "-o", "interface="+containerUplink, "-o", "slaac=true")
		hears(t, w, h, "heeds", "transparent", "a router to all", "a router to one")
	})
}

// TestWireTags: what comes from the wire with a VLAN tag is for nobody on an untagged network.
func TestWireTags(t *testing.T) {
	eachWireMode(t, func(t *testing.T, mode string, w *wire, h *host) {
		h.wired("tags", mode)
		a, _, outside, itself := wireStations(t, w, h, "tags")
		seenAs := a.mac
		if mode != "transparent" {
			seenAs = itself.mac
		}
		plain := func(to, text string) []byte { return udp(to, outside.mac, outside.v4, 7, a.v4, 7, text) }
		var frames [][]byte
		for _, to := range []string{a.mac, seenAs, floodedMAC} {
			frames = append(frames,
				tagged(0x8100, plain(to, "of a VLAN")),
				priority(0x8100, plain(to, "of VLAN 0")),
				tagged(0x88a8, plain(to, "of a provider's VLAN")),
				tagged(0x88a8, tagged(0x8100, plain(to, "of a VLAN within a provider's"))),
				tagged(0x8100, tagged(0x8100, plain(to, "of a VLAN within a VLAN"))))
		}
		frames = append(frames,
			tagged(0x8100, arp(floodedMAC, outside.mac, 1, outside.mac, outside.v4, a.v4, "ARP of a VLAN")),
			plain(seenAs, "untagged"), plain(seenAs, "the end"))
		seen := a.watches(t)
		sendFrames(t, outside.sends, outside.link, frames...)
		same(t, "from the wire with tags", seen.said("of a VLAN", "of VLAN 0", "of a provider's VLAN", "untagged"), []string{"untagged"})
	})
}

// priority puts a tag of VLAN 0 into a frame, which has a priority only (IEEE 802.1Q, 6.9.3).
func priority(kind uint16, frame []byte) []byte {
	return slices.Concat(frame[:12], binary.BigEndian.AppendUint16(nil, kind), []byte{0xe0, 0}, frame[12:])
}

// TestL2BridgeHidesMAC: wherever in ARP and neighbour discovery a container tells its MAC, the wire
// does not hear it. What it may tell arrives with the host's.
func TestL2BridgeHidesMAC(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		h.wired("hides", "l2bridge")
		a, _, outside, itself := wireStations(t, w, h, "hides")
		link, unasked := linkLocal(a.mac), option("of nobody")
		source, target := linkLayer(1, a.mac), linkLayer(2, a.mac)
		solicits := func(options ...[]byte) []byte {
			return ndOf(outside.mac, a.mac, 135, a.v6, outside.v6, outside.v6, options...)
		}
		advertises := func(options ...[]byte) []byte {
			return ndOf(allNodesMAC, a.mac, 136, a.v6, allNodes, a.v6, options...)
		}
		looks := func(options ...[]byte) []byte {
			return ndOf("33:33:00:00:00:02", a.mac, 133, link, "ff02::2", "", options...)
		}
		behind := func(frame []byte) []byte { // destination options
			b := slices.Concat(frame[:54], []byte{58, 0, 1, 4, 0, 0, 0, 0}, frame[54:])
			b[14+6] = 60
			binary.BigEndian.PutUint16(b[14+4:], uint16(len(b)-54))
			return b
		}
		hidden := map[string][]byte{
			"solicits, nonce first":                       solicits(nonce(), source),
			"solicits, twice":                             solicits(source, source),
			"solicits, another option first":              solicits(unasked, source),
			"solicits, a target's first":                  solicits(target),
			"solicits, a target's second":                 solicits(source, target),
			"solicits, third":                             solicits(source, nonce(), source),
			"solicits, behind options of the packet":      behind(solicits(source)),
			"solicits, second, behind options of it":      behind(solicits(nonce(), source)),
			"advertises, nonce first":                     advertises(nonce(), target),
			"advertises, twice":                           advertises(target, target),
			"advertises, a source's second":               advertises(target, source),
			"advertises, another option first":            advertises(unasked, target),
			"looks for routers, nonce first":              looks(nonce(), source),
			"looks for routers, twice":                    looks(source, source),
			"looks for routers, another option first":     looks(unasked, source),
			"looks for routers, a target's second":        looks(source, target),
			"ARP request with itself as target":           slices.Concat(arp(floodedMAC, a.mac, 1, a.mac, a.v4, outside.v4, "")[:32], hardware(a.mac), arp(floodedMAC, a.mac, 1, a.mac, a.v4, outside.v4, "")[38:]),
			"gratuitous ARP answer with itself as target": slices.Concat(arp(floodedMAC, a.mac, 2, a.mac, a.v4, a.v4, "")[:32], hardware(a.mac), arp(floodedMAC, a.mac, 2, a.mac, a.v4, a.v4, "")[38:]),
		}
		wire := h.Capture(t, containerUplink)
		seen := outside.watches(t)
		for what, frame := range hidden {
			sendFrames(t, a.sends, a.link, frame, udp(outside.mac, a.mac, a.v4, 7, outside.v4, 7, "after: "+what))
		}
		sendFrames(t, a.sends, a.link, udp(outside.mac, a.mac, a.v4, 7, outside.v4, 7, "the end"))
		seen.frames()
		for _, told := range wire.Frames(lab.Frames().Sent().Mentioning(a.mac)) {
			t.Errorf("the wire hears the container's MAC: %s", told)
		}
		if n := wire.Count(lab.Frames().Sent().Carrying("after: ")); n != len(hidden) {
			t.Errorf("%d frames were tried, want %d", n, len(hidden))
		}
		for _, c := range []struct {
			what  string
			frame []byte
			heard lab.Match
		}{
			{"solicits", solicits(source), lab.NeighbourSolicitation().From(a.v6).About(outside.v6).LinkLayer(itself.mac)},
			{"solicits without its MAC", solicits(), lab.NeighbourSolicitation().From(a.v6).About(outside.v6)},
			{"proves an address", ndOf("33:33:ff:00:00:77", a.mac, 135, "::", "ff02::1:ff00:77", "fd00:64::77", nonce()), lab.NeighbourSolicitation().From("::").About("fd00:64::77")},
			{"proves an address without a nonce", ndOf("33:33:ff:00:00:78", a.mac, 135, "::", "ff02::1:ff00:78", "fd00:64::78"), lab.NeighbourSolicitation().From("::").About("fd00:64::78")},
			{"advertises", advertises(target), lab.NeighbourAdvertisement().From(a.v6).About(a.v6).LinkLayer(itself.mac)},
			{"advertises without its MAC", advertises(), lab.NeighbourAdvertisement().From(a.v6).About(a.v6)},
			{"looks for routers", looks(source), lab.ICMPv6Type(133).From(link).Mentioning(itself.mac)},
			{"looks for routers without its MAC", looks(), lab.ICMPv6Type(133).From(link)},
			{"asks with ARP", arp(floodedMAC, a.mac, 1, a.mac, a.v4, outside.v4, "asks"), lab.ARPRequest().From(a.v4).SenderMAC(itself.mac).Carrying("asks")},
			{"announces itself with ARP", arp(floodedMAC, a.mac, 2, a.mac, a.v4, a.v4, "announces"), lab.ARPReply().From(a.v4).SenderMAC(itself.mac).Carrying("announces")},
		} {
			wire.Forget() // the kernel may have said the same
			sendFrames(t, a.sends, a.link, c.frame)
			wire.Saw(t, c.heard.Sent().SourceMAC(itself.mac))
			if told := wire.Frames(lab.Frames().Sent().Mentioning(a.mac)); len(told) > 0 {
				t.Errorf("the wire hears the container's MAC when it %s: %s", c.what, told[0])
			}
		}
	})
}
