package integration

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// The modes that take an uplink.
var wireModes = []string{"transparent", "l2bridge", "l2tunnel"}

const (
	// externalSwitch is the switch that dockway makes of the uplink.
	externalSwitch = "dwx" + containerUplink
	// hostServing is where a host is asked whether it can be reached.
	hostServing = 91
)

// Survivors are on the wire too, for the tests that do more to a host than others would bear.
var (
	survivorWire4 = map[lab.Engine]string{lab.Debian: "198.18.64.3", lab.Moby: "198.18.64.4"}
	survivorWire6 = map[lab.Engine]string{lab.Debian: "fd00:64::3", lab.Moby: "fd00:64::4"}

	plugSurvivors sync.Once
)

// eachWiredSurvivor is eachSurvivor with the hosts on the wire: what the host has on its uplink has
// to be the same before and after, too.
func eachWiredSurvivor(t *testing.T, test func(t *testing.T, w *wire, h *host), flags ...tolerance) {
	w, err := theWire()
	if err != nil {
		t.Fatal(err)
	}
	eachSurvivor(t, func(t *testing.T, h *host) {
		plugSurvivors.Do(func() {
			for engine, s := range survivors.hosts {
				err = errors.Join(err, s.Plug(w.lan, containerUplink, survivorWire4[engine]+"/24", survivorWire6[engine]+"/64"))
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		h.wire4, h.wire6 = survivorWire4[h.Engine], survivorWire6[h.Engine]
		w.forget(t)
		var before string
		settled(t, "the uplink's addresses are checked", func() bool {
			before = h.uplink()
			return !strings.Contains(before, "tentative")
		})
		t.Cleanup(func() {
			h.restored("at the test's end", before)
		})
		test(t, w, h)
	}, flags...)
}

// restored fails the test unless the uplink soon is as it was.
func (h *host) restored(what, before string) {
	h.t.Helper()
	after := ""
	if err := lab.WaitFor(soon, "the uplink to be as it was", func() (bool, error) {
		after = h.uplink()
		return after == before, nil
	}); err != nil {
		h.t.Errorf("%s: %v: it was\n%s\nand is\n%s", what, err, before, after)
	}
}

var (
	lifetime = regexp.MustCompile(`(valid_lft|preferred_lft|expires) (\d+)sec`)
	// What a link has by itself.
	ownRoutes = regexp.MustCompile(`(?m)^(anycast|multicast) .*\n?`)
)

// onLink is what the host has on a link, whatever the link is called: MAC, MTU, addresses in their
// order, routes of all tables. Times that run out are not told.
func (h *host) onLink(link string) string {
	h.t.Helper()
	return h.anonymous(h.must(strings.ReplaceAll(allOwn, "LINK", link)), link)
}

const (
	// allOwn is all that onLink lists.
	allOwn = `cat /sys/class/net/LINK/address /sys/class/net/LINK/mtu; ` + hostsOwn
	// hostsOwn lists addresses and routes.
	hostsOwn = `ip -o address show dev LINK | sed 's/^[0-9]*: *//'; (ip -4 route show table all dev LINK; ip -6 route show table all dev LINK) | sort`
)

func (h *host) anonymous(out, link string) string {
	out = ownRoutes.ReplaceAllString(out+"\n", "")
	return strings.ReplaceAll(lifetime.ReplaceAllString(out, "$1 limited"), link, "LINK")
}

// moved fails the test unless all that was on a link is on the switch now, and nothing on the link.
func (h *host) moved(what, before string) {
	h.t.Helper()
	on, left := "", ""
	if err := lab.WaitFor(soon, "the move", func() (bool, error) {
		on = h.onLink(externalSwitch)
		left = h.anonymous(h.must(strings.ReplaceAll(hostsOwn, "LINK", containerUplink)), containerUplink)
		return on == before && strings.TrimSpace(left) == "", nil
	}); err != nil {
		h.t.Errorf("%s: not all has moved: the uplink had\n%s\nthe switch has\n%s\nand the uplink still\n%s", what, before, on, left)
	}
}

// addressLives is how long an address is valid yet, in seconds.
func (h *host) addressLives(link, address string) (valid, preferred int) {
	h.t.Helper()
	out := h.must("ip -o address show dev " + link + " to " + address)
	for _, m := range lifetime.FindAllStringSubmatch(out, -1) {
		n, err := strconv.Atoi(m[2])
		if err != nil {
			h.t.Fatal(err)
		}
		if m[1] == "valid_lft" {
			valid = n
		} else {
			preferred = n
		}
	}
	return valid, preferred
}

// serves starts servers on the host itself, for TCP and UDP.
func (h *host) serves() {
	h.t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		p, err := h.Start("", shared.probe, "serve", network, ":"+strconv.Itoa(hostServing))
		if err != nil {
			h.t.Fatal(err)
		}
		h.t.Cleanup(func() { _ = p.Stop() })
	}
}

// reached fails the test unless the outside reaches the host itself.
func (h *host) reached(what string, w *wire) {
	h.t.Helper()
	reaches(h.t, what+": the host itself", on(w.outside), "tcp", fmt.Sprintf("%s:%d", h.wire4, hostServing), outside4)
	reaches(h.t, what+": the host itself, IPv6", on(w.outside), "tcp", fmt.Sprintf("[%s]:%d", h.wire6, hostServing), outside6)
}

// TestUplinkMoves: with the first network all that the host has on the uplink moves to the switch,
// with the last it moves back, and connections of the host do not notice.
func TestUplinkMoves(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		add := `ip address add 198.18.64.201/24 dev eth1
ip address add 198.18.64.202/24 dev eth1 label eth1:web
ip address add 198.18.64.203/24 dev eth1 valid_lft 3600 preferred_lft 1800
ip address add 198.18.67.1/32 dev eth1 scope link
ip address add 198.18.68.1 peer 198.18.68.2/32 dev eth1
ip address add 198.18.69.1/24 dev eth1 noprefixroute
ip address add fd00:64::201/64 dev eth1 nodad
ip address add fd00:64::203/64 dev eth1 nodad valid_lft 3600 preferred_lft 1800
ip address add fd00:69::1/64 dev eth1 nodad noprefixroute
ip route add default via ` + wireGateway + ` dev eth1 metric 700
ip route add 198.19.200.0/24 via ` + wireGateway + ` table 100 proto 201
ip route add 198.19.201.0/24 dev eth1 scope link src 198.18.64.201 mtu 1400
ip route add 198.19.202.0/24 nexthop via ` + wireGateway + ` nexthop via ` + outside4 + `
ip -6 route add default via ` + wireGateway6 + ` dev eth1 metric 701 pref high
ip -6 route add fd00:200::/64 via ` + wireGateway6 + ` dev eth1 table 100 proto 201
`
		undo := `ip route delete default metric 700; ip route delete 198.19.200.0/24 table 100; ip route delete 198.19.201.0/24; ip route delete 198.19.202.0/24
ip -6 route delete default metric 701; ip -6 route delete fd00:200::/64 table 100
ip address delete 198.18.68.1 peer 198.18.68.2/32 dev eth1; for a in 198.18.64.201/24 198.18.64.202/24 198.18.64.203/24 198.18.67.1/32 198.18.69.1/24 fd00:64::201/64 fd00:64::203/64 fd00:69::1/64; do ip address delete $a dev eth1; done`
		t.Cleanup(func() { h.must(undo) })
		h.must(add)
		before, multipath := h.onLink(containerUplink), h.must("ip route show 198.19.202.0/24")
		for _, want := range []string{"secondary LINK:web", "scope link LINK", "peer 198.18.68.2", "metric 700", "proto 201", "metric 701", "valid_lft limited"} {
			if !strings.Contains(before, want) {
				t.Fatalf("the host lacks %q before the move: %s", want, before)
			}
		}
		valid, preferred := h.addressLives(containerUplink, "198.18.64.203")
		valid6, preferred6 := h.addressLives(containerUplink, "fd00:64::203")
		lives := func(what, link string) {
			t.Helper()
			for address, want := range map[string][2]int{"198.18.64.203": {valid, preferred}, "fd00:64::203": {valid6, preferred6}} {
				v, p := h.addressLives(link, address)
				for i, now := range []int{v, p} {
					if now > want[i] || now < want[i]-120 {
						t.Errorf("%s: %s lives for another %d s of %d s", what, address, now, want[i])
					}
				}
			}
		}
		type stream struct {
			what string
			*lab.Stream
		}
		var streams []stream
		for i, s := range []struct {
			what     string
			from, to *lab.Machine
			address  string
		}{
			{"outside to host", w.outside, h.Machine, h.wire4},
			{"outside to host, IPv6", w.outside, h.Machine, "[" + h.wire6 + "]"},
			{"host to another subnet", h.Machine, w.far, far4},
			{"host to another subnet, IPv6", h.Machine, w.far, "[" + far6 + "]"},
		} {
			opened, err := shared.lab.Stream(s.from, s.to, fmt.Sprintf("%s:%d", s.address, 9000+i))
			if err != nil {
				t.Fatal(err)
			}
			streams = append(streams, stream{s.what, opened})
		}
		for _, mode := range wireModes {
			name := "moves-" + mode
			h.wired(name, mode)
			h.moved(mode, before)
			lives(mode+", moved", externalSwitch)
			if now := h.must("ip route show 198.19.202.0/24"); now != strings.ReplaceAll(multipath, containerUplink, externalSwitch) {
				t.Errorf("%s: the route with several next hops was\n%s\nand is\n%s", mode, multipath, now)
			}
			h.docker("network", "rm", name)
			settled(t, mode+": all is back", func() bool { return h.onLink(containerUplink) == before })
			if now := h.onLink(containerUplink); now != before {
				t.Errorf("%s: before the network the uplink had\n%s\nand after it\n%s", mode, before, now)
			}
			lives(mode+", back", containerUplink)
			if now := h.must("ip route show 198.19.202.0/24"); now != multipath {
				t.Errorf("%s: the route with several next hops was\n%s\nand is\n%s", mode, multipath, now)
			}
		}
		for _, s := range streams {
			report, err := s.End()
			if err != nil {
				t.Errorf("%s, through three networks that came and went: %v", s.what, err)
			}
			t.Logf("%s: %d bytes there, %d back, none for at most %s", s.what, report.There, report.Back, report.Longest)
		}
	})
}

// changes starts to list what changes about the host's links, addresses and routes.
const changes = "ip monitor link address route"

// pluginGrown waits until the plugin has run for long enough: half a second after it has started one
// the engine looks whether it answers, and disables one that has died meanwhile.
func (h *host) pluginGrown() (pid string) {
	h.t.Helper()
	if err := lab.WaitFor(soon, "the plugin to be 0.7 s old", func() (_ bool, err error) {
		if pid, err = h.PluginPID(); err != nil {
			return false, err
		}
		out, err := h.Script("set -- $(cat /proc/" + pid + "/stat); echo ${22}; cat /proc/uptime; getconf CLK_TCK")
		if err != nil {
			return false, err
		}
		f := strings.Fields(out)
		began, err1 := strconv.ParseFloat(f[0], 64)
		now, err2 := strconv.ParseFloat(f[1], 64)
		tick, err3 := strconv.ParseFloat(f[len(f)-1], 64)
		return now-began/tick > 0.7, errors.Join(err1, err2, err3)
	}); err != nil {
		h.t.Fatal(err)
	}
	return pid
}

// collectsAfter has the plugin collect sooner or later what no engine knows any more.
func (h *host) collectsAfter(d time.Duration) {
	h.t.Helper()
	set := func(value string) {
		h.t.Helper()
		h.docker("plugin", "disable", "-f", lab.Plugin)
		h.docker("plugin", "set", lab.Plugin, "COLLECT_AFTER="+value)
		h.docker("plugin", "enable", lab.Plugin)
	}
	env := h.docker("plugin", "inspect", "-f", "{{.Settings.Env}}", lab.Plugin)
	was := regexp.MustCompile(`COLLECT_AFTER=(\w+)`).FindStringSubmatch(env)
	if was == nil {
		h.t.Fatalf("the plugin's settings do not tell COLLECT_AFTER: %s", env)
	}
	set(d.String())
	h.t.Cleanup(func() { set(was[1]) })
}

// TestUplinkMoveKilled: the plugin dies at many points of the move and of the way back. When it runs
// again all has moved and the network is on record, or all is as it was; never is the host lost.
func TestUplinkMoveKilled(t *testing.T) {
	const rounds = 6
	eachWiredSurvivor(t, func(t *testing.T, w *wire, h *host) {
		t.Parallel() // mostly it waits for plugins to get older
		h.collectsAfter(time.Second)
		h.serves()
		var streams []*lab.Stream
		for i, address := range []string{h.wire4, "[" + h.wire6 + "]"} {
			s, err := shared.lab.Stream(w.outside, h.Machine, fmt.Sprintf("%s:%d", address, 9010+i))
			if err != nil {
				t.Fatal(err)
			}
			streams = append(streams, s)
		}
		before, had := h.uplink(), h.onLink(containerUplink)
		create := func() (string, error) {
			return h.Docker("network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine],
				"-o", "mode=transparent", "-o", "interface="+containerUplink, "move")
		}
		remove := func() (string, error) { return h.Docker("network", "rm", "move") }
		t.Cleanup(func() { _, _ = remove() })

		// How many changes there are to be killed at.
		count := func(what string, do func() (string, error)) int {
			t.Helper()
			list, err := h.Start("", append([]string{"stdbuf", "-oL"}, strings.Fields(changes)...)...)
			if err != nil {
				t.Fatal(err)
			}
			if out, err := do(); err != nil {
				t.Fatalf("%s: %v: %s", what, err, out)
			}
			n := 0
			settled(t, what+" changes something", func() bool {
				last := n
				n = strings.Count(list.Output(), "\n")
				return n > 0 && n == last
			})
			_ = list.Stop()
			return n
		}
		creating, removing := count("create", create), count("remove", remove)
		h.restored("without a kill", before)

		// For people: in the middle of what the plugin died, and what the next one found on record.
		between, fates := 0, map[string]int{}
		onRecord := func() bool {
			t.Helper()
			out, err := h.Dockway("networks", "--json")
			if err != nil {
				t.Fatal(err)
			}
			return strings.Contains(out, `"bridge":"`+externalSwitch+`"`)
		}
		killed := func(what string, at int, do func() (string, error)) {
			t.Helper()
			pid := h.pluginGrown()
			what = fmt.Sprintf("%s killed at change %d", what, at)
			script := fmt.Sprintf("kill -9 %s; ip -o address; ip -o link show type bridge_slave", pid)
			if at > 0 {
				script = fmt.Sprintf("%s | { head -n %d >/dev/null; %s; }", changes, at, script)
			}
			trigger, err := h.Start("", "sh", "-c", script)
			if err != nil {
				t.Fatal(err)
			}
			_, failed := do()
			if now, err := h.PluginPID(); err == nil && now == pid { // fewer changes this time
				h.must("kill -9 " + pid)
			}
			if err := h.WaitPlugin(pid); err != nil {
				t.Fatal(err)
			}
			_ = trigger.Stop()
			found := trigger.Output()
			if strings.Contains(found, " "+containerUplink+" ") && strings.Contains(found, " "+externalSwitch+" ") {
				between++ // addresses are on both
			}
			_, err = h.Docker("network", "inspect", "move")
			recorded := onRecord()
			switch {
			case !recorded:
				h.restored(what+", network not on record", before)
			case err == nil:
				h.moved(what+", network on record", had)
			default: // and can be collected at any moment, as the engine does not know it
				on := ""
				if err := lab.WaitFor(soon, "all to have moved", func() (bool, error) {
					out, err := h.Script(strings.ReplaceAll(allOwn, "LINK", externalSwitch))
					on = h.anonymous(out, externalSwitch)
					return err == nil && on == had || !onRecord(), nil
				}); err != nil {
					t.Errorf("%s, network on record: %v: the uplink had\n%s\nand the switch has\n%s", what, err, had, on)
				}
			}
			h.reached(what, w)
			fates[fmt.Sprintf("succeeded %t, on record %t, engine has it %t", failed == nil, recorded, err == nil)]++
			if err != nil {
				// What the engine does not know is collected after a while, and its subnet is free then.
				if err := lab.WaitFor(soon, what+": the network to be collected", func() (bool, error) { return !onRecord(), nil }); err != nil {
					t.Fatal(err)
				}
				if out, err := create(); err != nil {
					t.Fatalf("%s: the network cannot be made again: %v: %s", what, err, out)
				}
				h.moved(what+", made again", had)
			}
			if out, err := remove(); err != nil {
				t.Errorf("%s: the network cannot be removed: %v: %s", what, err, out)
			}
			h.restored(what+", removed", before)
			h.reached(what+", removed", w)
		}
		for i := range rounds {
			killed("create", i*creating/rounds, create)
		}
		for i := range rounds {
			if out, err := create(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			killed("remove", i*removing/rounds, remove)
		}
		for i, s := range streams {
			report, err := s.End()
			if err != nil {
				t.Errorf("connection %d to the host, through %d kills: %v", i, 2*rounds, err)
			}
			t.Logf("connection %d: %d bytes there, %d back, none for at most %s", i, report.There, report.Back, report.Longest)
		}
		t.Logf("of %d changes in the move, %d in the way back; %d times killed with addresses on both; %v", creating, removing, between, fates)
	}, poolsLost)
}

// TestUplinkShared: networks of one uplink share its switch, until the last is removed.
func TestUplinkShared(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		had := h.onLink(containerUplink)
		h.wired("shared-one", "transparent")
		h.network("shared-two", "--subnet", second4, "--gateway", secondGateway, "-o", "mode=l2bridge", "-o", "interface="+containerUplink)
		h.moved("with two networks", had)
		if out := h.must("ip -o link show type bridge | grep -c dwx"); out != "1" {
			t.Errorf("two networks of one uplink have %s switches", out)
		}
		h.server("shared-a", "shared-one")
		h.server("shared-b", "shared-two")
		a, a6, b := h.address("shared-a", "shared-one"), h.address6("shared-a", "shared-one"), h.address("shared-b", "shared-two")
		for _, network := range []string{"tcp", "udp"} {
			reaches(t, "the first network", on(w.outside), network, a+":80", outside4)
			reaches(t, "the first network, IPv6", on(w.outside), network, "["+a6+"]:80", outside6)
			reaches(t, "the second network", on(w.outside), network, b+":80", secondOutside4)
		}
		c := hold(t, "outside to the second network", w.outside.Command, shared.probe, "hold", "tcp", b+":80")
		h.docker("rm", "-f", "shared-a")
		h.docker("network", "rm", "shared-one")
		h.moved("with one of two networks removed", had)
		for _, network := range []string{"tcp", "udp"} {
			reaches(t, "the second network without the first", on(w.outside), network, b+":80", secondOutside4)
		}
		c.flowed()
		h.docker("rm", "-f", "shared-b")
		h.docker("network", "rm", "shared-two") // onWire sees that all is back
	})
}

// TestVLANShared: networks of one uplink and VLAN share what the VLAN is made of, until the last is removed. The uplink
// and what is untagged stay as they are.
func TestVLANShared(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		w.trunked(t)
		const made = "ip -o link | grep -o ' dw[a-z0-9.]*[:@]' | sort | tr -d '\n'; tc filter show dev " + containerUplink + " ingress; ip -d -o link show " + containerUplink + " | grep -o 'promiscuity [0-9]*'"
		before, had := h.must(made), h.onLink(containerUplink)
		h.tagged("vshared-one", "transparent")
		whole := h.must(made)
		if whole == before {
			t.Fatalf("a VLAN is made of nothing: %s", whole)
		}
		h.network("vshared-two", "--subnet", second4, "--gateway", secondGateway, "-o", "mode=l2bridge", "-o", "interface="+containerUplink, "-o", fmt.Sprint("vlan=", vlanID))
		if now := h.must(made); now != whole {
			t.Errorf("with one network the VLAN is made of\n%s\nwith two of\n%s", whole, now)
		}
		if now := h.onLink(containerUplink); now != had {
			t.Errorf("before the VLAN the uplink had\n%s\nand with it\n%s", had, now)
		}
		h.server("vshared-a", "vshared-one")
		h.docker("rm", "-f", "vshared-a")
		h.docker("network", "rm", "vshared-one")
		settled(t, "the VLAN stays with one of two networks removed", func() bool { return h.must(made) == whole })
		h.tagged("vshared-three", "l2bridge")
		h.docker("network", "rm", "vshared-two")
		h.server("vshared-c", "vshared-three")
		for _, network := range []string{"tcp", "udp"} {
			reaches(t, "the network that is left", on(w.outside), network, h.address("vshared-c", "vshared-three")+":80", vlanOutside4)
		}
		h.docker("rm", "-f", "vshared-c")
		h.docker("network", "rm", "vshared-three")
		settled(t, "nothing is left of the VLAN", func() bool { return h.must(made) == before })
		if now := h.must(made); now != before {
			t.Errorf("of the VLAN is left\n%s\nbefore it there was\n%s", now, before)
		}
	})
}

// TestUplinkMTU: the switch has the MTU that its uplink has now, and so has a container that is started then.
func TestUplinkMTU(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		h.wired("mtu", "transparent")
		h.server("mtu-a", "mtu")
		t.Cleanup(func() { h.must("ip link set " + containerUplink + " mtu 1500") })
		for _, mtu := range []string{"1400", "1500"} {
			h.must("ip link set " + containerUplink + " mtu " + mtu)
			settled(t, "the switch has MTU "+mtu, func() bool {
				return strings.Contains(h.must("ip link show "+externalSwitch), "mtu "+mtu+" ")
			})
			h.docker("restart", "-t", "0", "mtu-a")
			if out := h.docker("exec", "mtu-a", "ip", "link", "show", "eth0"); !strings.Contains(out, "mtu "+mtu+" ") {
				t.Errorf("with an uplink of MTU %s the container has %s", mtu, out)
			}
			a := h.address("mtu-a", "mtu") // given anew
			w.forget(t)
			reaches(t, "outside to container with MTU "+mtu, on(w.outside), "tcp", a+":80", outside4)
			reaches(t, "host to container with MTU "+mtu, on(h.Machine), "tcp", a+":80", h.wire4)
		}
	})
}

// TestUplinkBridge: a bridge of the host's is used as it is, and nothing moves.
func TestUplinkBridge(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		routes := fmt.Sprintf("ip route replace 198.18.65.0/24 via %s; ip -6 route replace fd00:65::/64 via %s", wireGateway, wireGateway6)
		addresses := func(link string) string {
			return fmt.Sprintf("ip address add %[1]s/24 dev %[3]s; ip address add %[2]s/64 dev %[3]s nodad", h.wire4, h.wire6, link)
		}
		t.Cleanup(func() { h.must("ip link delete br0\n" + addresses(containerUplink) + "\n" + routes) })
		h.must(fmt.Sprintf("ip address delete %s/24 dev eth1; ip address delete %s/64 dev eth1; ip link add br0 type bridge; ip link set eth1 master br0; ip link set br0 up\n",
			h.wire4, h.wire6) + addresses("br0") + "\n" + routes)
		const listing = "ip -o link show br0 | sed 's/qdisc.*//'; ip -d -o link show br0 | grep -o 'bridge .*' | sed 's/[a-z]*_timer *[0-9.]*//g'; bridge link show | grep 'master br0'"
		var before string
		settled(t, "the bridge's addresses are checked", func() bool {
			before = h.onLink("br0") + h.must(listing)
			return !strings.Contains(before, "tentative")
		})
		unchanged := func(what string) {
			t.Helper()
			after := ""
			settled(t, what+": the bridge is as it was", func() bool {
				after = h.onLink("br0") + h.must(listing)
				return after == before
			})
			if after != before {
				t.Errorf("%s: the bridge was\n%s\nand is\n%s", what, before, after)
			}
		}
		hostMAC, err := h.MAC("br0")
		if err != nil {
			t.Fatal(err)
		}
		for _, mode := range wireModes {
			name := "foreign-" + mode
			h.wired(name, mode, "-o", "interface=br0")
			unchanged(mode + ", network made")
			w.forget(t)
			var published []string
			if mode != "transparent" {
				published = []string{"-p", "8087:80", "-p", "8087:80/udp"}
			}
			h.server(name+"-a", name, published...)
			h.server(name+"-b", name)
			a, a6, b := h.address(name+"-a", name), h.address6(name+"-a", name), h.address(name+"-b", name)
			seen := w.outside.Capture(t, "eth0")
			for _, network := range []string{"tcp", "udp"} {
				reaches(t, mode+": outside to container", on(w.outside), network, a+":80", outside4)
				reaches(t, mode+": another subnet to container", on(w.far), network, a+":80", far4)
				reaches(t, mode+": host to container", on(h.Machine), network, a+":80", h.wire4)
				reaches(t, mode+": container to container", h.in(name+"-b"), network, a+":80", b)
				reaches(t, mode+": container to outside", h.in(name+"-a"), network, outside4+":80", a)
				reaches(t, mode+": container to another subnet", h.in(name+"-a"), network, far4+":80", a)
				if a6 != "" {
					reaches(t, mode+": outside to container, IPv6", on(w.outside), network, "["+a6+"]:80", outside6)
					reaches(t, mode+": host to container, IPv6", on(h.Machine), network, "["+a6+"]:80", h.wire6)
					reaches(t, mode+": container to outside, IPv6", h.in(name+"-a"), network, "["+outside6+"]:80", a6)
				}
				if published == nil {
					continue
				}
				client := map[string]string{"l2bridge": outside4, "l2tunnel": h.wire4}[mode] // a relay speaks for it
				reaches(t, mode+": outside to published port", on(w.outside), network, h.wire4+":8087", client)
				reaches(t, mode+": another subnet to published port", on(w.far), network, h.wire4+":8087", strings.Replace(client, outside4, far4, 1))
				reaches(t, mode+": host to published port", on(h.Machine), network, h.wire4+":8087", "")
				reaches(t, mode+": host to published port on loopback", on(h.Machine), network, "127.0.0.1:8087", "")
				reaches(t, mode+": container to published port", h.in(name+"-b"), network, h.wire4+":8087", "")
				reaches(t, mode+": container to its own published port", h.in(name+"-a"), network, h.wire4+":8087", "")
			}
			if mac := h.mac(name+"-a", name); mode == "transparent" {
				seen.Saw(t, lab.TCP().From(a).SourceMAC(mac))
			} else if mode == "l2bridge" {
				seen.Saw(t, lab.TCP().From(a).SourceMAC(hostMAC))
				seen.Never(t, lab.Mentions(mac))
			}
			if out := h.must("ip -o link show | grep dwx || true"); out != "" {
				t.Errorf("%s: a switch was made beside the host's bridge: %s", mode, out)
			}
			if now, err := h.MAC("br0"); err != nil || now != hostMAC {
				t.Errorf("%s: containers have changed the bridge's MAC from %s to %s (%v)", mode, hostMAC, now, err)
			}
			h.docker("rm", "-f", name+"-a", name+"-b")
			h.docker("network", "rm", name)
			unchanged(mode + ", network removed")
		}
	})
}

// TestUplinkRefused: what cannot be an uplink is refused, with what to do, and nothing is changed.
func TestUplinkRefused(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		t.Cleanup(func() { h.must("for l in down0 taken0 br1 tap0; do ip link delete $l; done") })
		h.must(`ip link add down0 type veth peer name down0p
ip link add br1 type bridge; ip link set br1 up
ip link add taken0 type veth peer name taken0p; ip link set taken0 master br1 up
ip tuntap add tap0 mode tun; ip link set tap0 up`)
		h.network("refused-nat")
		h.client("refused-a", "refused-nat")
		ours := h.must("ip -o link | grep -o 'dwb[^:@ ]*' | head -1")
		port := h.must("ip -o link | grep -o 'dwv[^:@ ]*' | head -1")
		links := func() string { return h.must("ip -o link | sed 's/ qlen.*//'") }
		for _, mode := range wireModes {
			before := links()
			for link, words := range map[string]string{
				"eth7":   `uplink eth7 is not there: plug it in, or name another link of the host with interface=`,
				"lo":     `uplink lo is the loopback link, which leads nowhere: name a network card with interface=`,
				"down0":  `uplink down0 is down: bring it up (ip link set down0 up), or name another with interface=`,
				"taken0": `uplink taken0 is a port of br1 already: name br1 with interface=, or take taken0 out of it (ip link set taken0 nomaster)`,
				"tap0":   `uplink tap0 is not Ethernet, so a switch cannot hold it: name a network card with interface=`,
				ours:     `uplink ` + ours + ` is one of dockway's own links: name a link of the host with interface=`,
				port:     `uplink ` + port + ` is one of dockway's own links: name a link of the host with interface=`,
				"a/b":    `not the name of a network interface`,
				"":       `not the name of a network interface`,
			} {
				h.refused(words, "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", wire4, "--gateway", wireGateway, "-o", "mode="+mode, "-o", "interface="+link, "wrong")
			}
			h.refused("needs an uplink: give -o interface=", "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", wire4, "--gateway", wireGateway, "-o", "mode="+mode, "wrong")
			if after := links(); after != before {
				t.Errorf("%s: refusals changed the host's links: before\n%s\nafter\n%s", mode, before, after)
			}
		}
		// The uplink of a switch is taken, and so is what the switch is.
		h.wired("refused-wire", "transparent")
		for link, words := range map[string]string{
			externalSwitch: `uplink ` + externalSwitch + ` is one of dockway's own links`,
		} {
			h.refused(words, "network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", second4, "--gateway", secondGateway, "-o", "mode=transparent", "-o", "interface="+link, "wrong")
		}
		second := []string{"network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", second4, "--gateway", secondGateway, "-o", "mode=transparent", "-o", "interface=" + containerUplink}
		h.refused("the switch of another network holds it, and macvlan links cannot share it: leave backend=macvlan out", append(second, "-o", "backend=macvlan", "wrong")...)
		// Nor can a switch share it with macvlan links, dockway's own or others.
		h.docker("network", "rm", "refused-wire")
		h.wired("refused-direct", "transparent", "-o", "backend=macvlan", "-o", "host_access=true")
		settled(t, "macvlan links are on the uplink", func() bool { return strings.Contains(h.must("ip -o link show type macvlan"), "dwm") })
		before := h.onLink(containerUplink)
		h.refused("uplink "+containerUplink+" is in use by another link", append(second, "wrong")...)
		settled(t, "the uplink is as it was before the refusal", func() bool { return h.onLink(containerUplink) == before })
		if now := h.onLink(containerUplink); now != before {
			t.Errorf("before a refusal the uplink had\n%s\nand after it\n%s", before, now)
		}
	})
}

// TestUplinkReturns: an uplink that vanishes and returns is taken up again, and what runs goes on.
func TestUplinkReturns(t *testing.T) {
	eachWiredSurvivor(t, func(t *testing.T, w *wire, h *host) {
		h.serves()
		h.wired("returns-bridge", "l2bridge")
		h.network("returns-lan", "--subnet", second4, "--gateway", secondGateway, "-o", "mode=transparent", "-o", "interface="+containerUplink)
		h.server("returns-a", "returns-bridge")
		h.server("returns-b", "returns-bridge")
		h.server("returns-c", "returns-lan")
		a, a6, mac := h.address("returns-a", "returns-bridge"), h.address6("returns-a", "returns-bridge"), h.mac("returns-a", "returns-bridge")
		b, c := h.inside("returns-b"), h.address("returns-c", "returns-lan")
		original, err := h.MAC(containerUplink)
		if err != nil {
			t.Fatal(err)
		}
		moved := h.onLink(externalSwitch)
		reachable := func(what string) {
			t.Helper()
			h.reached(what, w)
			reaches(t, what+": outside to l2bridge", on(w.outside), "tcp", a+":80", outside4)
			reaches(t, what+": outside to l2bridge, IPv6", on(w.outside), "tcp", "["+a6+"]:80", outside6)
			reaches(t, what+": l2bridge to outside", b, "tcp", outside4+":80", "")
			reaches(t, what+": outside to transparent", on(w.outside), "tcp", c+":80", secondOutside4)
		}
		reachable("before")
		other := map[lab.Engine]string{lab.Debian: "02:64:00:00:00:77", lab.Moby: "02:64:00:00:00:78"}[h.Engine]
		for _, now := range []string{original, other, original} {
			if err := w.lan.Unplug(h.Machine, containerUplink); err != nil {
				t.Fatal(err)
			}
			if err := lab.WaitFor(soon, "the status to name the missing uplink", func() (bool, error) {
				out, err := h.Dockway("status")
				return strings.Contains(out, "in sync    no") && strings.Contains(out, "uplink "+containerUplink+" is not there"), errors.Join(err, errors.New(out))
			}); err != nil {
				t.Error(err)
			}
			reaches(t, "container to container without the uplink", b, "tcp", a+":80", "")
			reaches(t, "host to container without the uplink", on(h.Machine), "tcp", a+":80", h.wire4)
			barred(t, "outside to container without the uplink", on(w.outside), "tcp", a+":80")

			if err := w.lan.PlugAs(h.Machine, containerUplink, now); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if err := lab.WaitFor(soon, "the uplink to be taken up again", func() (bool, error) {
				out, err := h.Dockway("status")
				return strings.Contains(out, "in sync    yes"), errors.Join(err, errors.New(out))
			}); err != nil {
				t.Error(err)
			}
			t.Logf("back in sync %s after the uplink's return", time.Since(start).Round(time.Millisecond))
			seen := w.outside.Capture(t, "eth0")
			reachable("after the uplink's return as " + now)
			t.Logf("reached again %s after the uplink's return", time.Since(start).Round(time.Millisecond))
			on, want := "", strings.ReplaceAll(moved, original, now)
			want = strings.ReplaceAll(want, linkLocal(original), linkLocal(now))
			settled(t, "the switch has what it had, by the MAC that it has now", func() bool {
				on = h.onLink(externalSwitch)
				return on == want
			})
			if on != want {
				t.Errorf("after the uplink's return as %s the switch has\n%s\nwant\n%s", now, on, want)
			}
			seen.Saw(t, lab.TCP().From(a).SourceMAC(now))
			seen.Saw(t, lab.TCP().From(a6).SourceMAC(now))
			seen.Never(t, lab.Mentions(mac))
		}
	})
}

// TestUplinkReturnsAsAnother: when the uplink returns with another MAC, the wire is told of it: who
// remembers the host, or a container behind its MAC, need not find out.
func TestUplinkReturnsAsAnother(t *testing.T) {
	eachWiredSurvivor(t, func(t *testing.T, w *wire, h *host) {
		h.serves()
		h.wired("another-bridge", "l2bridge")
		h.network("another-tunnel", "--subnet", second4, "--gateway", secondGateway, "-o", "mode=l2tunnel", "-o", "interface="+containerUplink)
		h.network("another-vlan", "--subnet", vlan4, "--gateway", vlanGateway, "-o", "mode=l2bridge", "-o", "interface="+containerUplink, "-o", fmt.Sprint("vlan=", vlanID))
		w.trunked(t)
		if _, err := w.router.Run("ip", "address", "add", secondGateway+"/24", "dev", "eth0"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = w.router.Run("ip", "address", "delete", secondGateway+"/24", "dev", "eth0") })
		h.server("another-a", "another-bridge")
		h.server("another-b", "another-tunnel")
		h.server("another-c", "another-vlan")
		a, a6, mac := h.address("another-a", "another-bridge"), h.address6("another-a", "another-bridge"), h.mac("another-a", "another-bridge")
		b, c := h.address("another-b", "another-tunnel"), h.address("another-c", "another-vlan")
		all := map[string]string{
			"host": fmt.Sprintf("%s:%d", h.wire4, hostServing), "host, IPv6": fmt.Sprintf("[%s]:%d", h.wire6, hostServing),
			"l2bridge": a + ":80", "l2bridge, IPv6": "[" + a6 + "]:80", "l2tunnel": b + ":80", "VLAN": c + ":80",
		}
		for what, address := range all {
			reaches(t, "before: "+what, on(w.outside), "tcp", address, "")
		}
		original, err := h.MAC(containerUplink)
		if err != nil {
			t.Fatal(err)
		}
		other := map[lab.Engine]string{lab.Debian: "02:64:00:00:00:79", lab.Moby: "02:64:00:00:00:7a"}[h.Engine]
		for _, now := range []string{other, original} {
			if err := w.lan.Unplug(h.Machine, containerUplink); err != nil {
				t.Fatal(err)
			}
			seen := w.outside.Capture(t, "eth0")
			if err := w.lan.PlugAs(h.Machine, containerUplink, now); err != nil {
				t.Fatal(err)
			}
			const announced = 6 * time.Second // by themselves neighbours find out after 8 s at the earliest
			start := time.Now()
			var wg sync.WaitGroup
			for what, address := range all {
				wg.Go(func() {
					if err := lab.WaitFor(announced, what+" to be reached after the uplink's return as "+now, func() (bool, error) {
						_, err := on(w.outside)("-timeout", "200ms", "ask", "tcp", address)
						return err == nil, err
					}); err != nil {
						t.Error(err)
						return
					}
					t.Logf("%s is reached again %s after the uplink's return", what, time.Since(start).Round(time.Millisecond))
				})
			}
			wg.Wait()
			for _, address := range []string{h.wire4, a, b} {
				seen.Saw(t, lab.ARPRequest().From(address).To(address).SenderMAC(now).SourceMAC(now).Untagged())
			}
			seen.Saw(t, lab.ARPRequest().From(c).To(c).SenderMAC(now).SourceMAC(now).VLAN(vlanID))
			for _, address := range []string{h.wire6, a6} {
				seen.Saw(t, lab.NeighbourAdvertisement().About(address).LinkLayer(now).SourceMAC(now))
			}
			seen.Never(t, lab.Mentions(mac))
		}
	})
}

// TestUplinkTakenOut: who takes the uplink out of the switch, or flushes all rules, does not part the
// containers from the wire for long.
func TestUplinkTakenOut(t *testing.T) {
	eachWiredSurvivor(t, func(t *testing.T, w *wire, h *host) {
		h.serves()
		had := h.onLink(containerUplink)
		h.wired("taken", "l2bridge")
		h.server("taken-a", "taken", "-p", "8084:80")
		a, a6 := h.address("taken-a", "taken"), h.address6("taken-a", "taken")
		before, err := h.kernelState()
		if err != nil {
			t.Fatal(err)
		}
		for _, damage := range []string{
			"ip link set eth1 nomaster",
			"ip link set eth1 nomaster; ip address add " + h.wire4 + "/24 dev eth1",
			"ip link set eth1 down; ip link set eth1 up",
			"sysctl -qw net.ipv6.conf." + externalSwitch + ".keep_addr_on_down=1; ip link set " + externalSwitch + " down",
			"nft delete table bridge dockway",
			"nft flush ruleset",
		} {
			if damage == "nft flush ruleset" {
				before = withoutDockerUser(before)
			}
			h.must(damage)
			h.repairedBut(damage, before, regexp.MustCompile(`[0-9]+: |state [A-Z]*|<[A-Z,_-]*>|tentative `))
			h.moved(damage, had)
			reaches(t, "outside to container after "+damage, on(w.outside), "tcp", a+":80", outside4)
			reaches(t, "outside to container, IPv6, after "+damage, on(w.outside), "udp", "["+a6+"]:80", outside6)
			reaches(t, "published port after "+damage, on(w.outside), "tcp", h.wire4+":8084", outside4)
			h.reached("after "+damage, w)
		}
		if err := h.restartEngine(); err != nil { // Docker's rules come back
			t.Fatal(err)
		}
	})
}

// TestWireReboot: after a reboot networks and switch are back from the record; and they do not mind
// what becomes of the engine.
func TestWireReboot(t *testing.T) {
	eachWiredSurvivor(t, func(t *testing.T, w *wire, h *host) {
		h.serves()
		had := h.onLink(containerUplink)
		h.engineFlags("--live-restore")
		h.wired("boot-bridge", "l2bridge")
		h.network("boot-lan", "--subnet", second4, "--gateway", secondGateway, "-o", "mode=transparent", "-o", "interface="+containerUplink)
		h.server("boot-a", "boot-bridge", "--restart", "always", "-p", "8085:80")
		h.server("boot-b", "boot-lan", "--restart", "always")
		var a, a6, b string
		addresses := func() {
			t.Helper()
			a, a6, b = h.address("boot-a", "boot-bridge"), h.address6("boot-a", "boot-bridge"), h.address("boot-b", "boot-lan")
		}
		addresses()
		reachable := func(what string) {
			t.Helper()
			h.moved(what, had)
			for _, network := range []string{"tcp", "udp"} {
				reaches(t, what+": outside to l2bridge", on(w.outside), network, a+":80", outside4)
				reaches(t, what+": outside to l2bridge, IPv6", on(w.outside), network, "["+a6+"]:80", outside6)
				reaches(t, what+": outside to transparent", on(w.outside), network, b+":80", secondOutside4)
			}
			reaches(t, what+": published port", on(w.outside), "tcp", h.wire4+":8085", outside4)
		}
		reachable("before")
		// It carries nothing in a while: a packet that is routed, for the published port, loses its
		// way while Docker's rules are made anew.
		conn := hold(t, "outside to transparent", w.outside.Command, shared.probe, "hold", "tcp", b+":80")
		if err := h.KillEngine(); err != nil {
			t.Fatal(err)
		}
		reachable("without the engine")
		if err := h.StartEngine(); err != nil {
			t.Fatal(err)
		}
		reachable("after the engine's return")
		conn.flowed()

		if err := h.Reboot(); err != nil {
			t.Fatal(err)
		}
		h.must("ip route replace default via " + peer4)
		h.serves()
		w.forget(t)
		if err := lab.WaitFor(20*time.Second, "the containers to be started", func() (bool, error) {
			out, err := h.Docker("ps", "-q")
			return len(strings.Fields(out)) == 2, err
		}); err != nil {
			t.Fatal(err)
		}
		addresses() // they are given anew
		reachable("after a reboot")
		h.reached("after a reboot", w)
	})
}

// TestWireOptions: the options that every mode has do in these what they do in others.
func TestWireOptions(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		pools := map[lab.Engine]string{lab.Debian: "198.18.64.2", lab.Moby: "198.18.64.3"}
		router, err := w.router.MAC("eth0")
		if err != nil {
			t.Fatal(err)
		}
		for i, mode := range wireModes {
			name := "options-" + mode
			wanted4, wanted6, station := pools[h.Engine]+strconv.Itoa(i+1), "", fmt.Sprintf("02:64:00:00:01:%02x", i)
			flags := []string{"--mac-address", station}
			if mode != "l2tunnel" {
				wanted6 = fmt.Sprintf("%s%x", strings.TrimSuffix(wirePart6[h.Engine], "0/112"), 0x77+i)
				flags = append(flags, "--ip6", wanted6)
			}
			pool := "02-64-00-00-02-00,02-64-00-00-02-00"
			w.forget(t)
			h.wired(name, mode, "-o", "mtu=1400", "-o", "network_name=shown "+mode, "-o", "iface_prefix=lan", "-o", "mac_pool="+pool, "-o", "disable_icc=true")
			if mode != "transparent" {
				flags = append(flags, "-p", "8095:80", "-p", "8095:80/udp")
			}
			h.server(name+"-a", name, append(flags, "--ip", wanted4)...)
			h.server(name+"-b", name)
			link := h.docker("exec", name+"-a", "ip", "-o", "link", "show", "lan0")
			for _, want := range []string{"mtu 1400", station} {
				if !strings.Contains(link, want) {
					t.Errorf("%s: the container's link lacks %q: %s", mode, want, link)
				}
			}
			addresses := h.docker("exec", name+"-a", "ip", "-o", "address", "show", "lan0")
			if !strings.Contains(addresses, "inet "+wanted4+"/24") || wanted6 != "" && !strings.Contains(addresses, "inet6 "+wanted6) {
				t.Errorf("%s: the container lacks %s or %s: %s", mode, wanted4, wanted6, addresses)
			}
			if mac := h.mac(name+"-b", name); mac != "02:64:00:00:02:00" {
				t.Errorf("%s: the container's MAC %s is not of the pool %s", mode, mac, pool)
			}
			h.refused("every Ethernet address of mac_pool is taken", "run", "--rm", "--network", name, lab.Image, "true")
			h.refused("MAC address "+station+" is taken", "run", "--rm", "--network", name, "--mac-address", station, lab.Image, "true")
			if out, err := h.Dockway("networks", "--json"); err != nil || !strings.Contains(out, `"name":"shown `+mode+`"`) {
				t.Errorf("%s: dockway networks does not show the network's name: %s (%v)", mode, out, err)
			}
			b := h.address(name+"-b", name)
			for _, network := range []string{"tcp", "udp"} {
				reaches(t, mode+": outside to container", on(w.outside), network, wanted4+":80", outside4)
				reaches(t, mode+": host to container", on(h.Machine), network, wanted4+":80", h.wire4)
				reaches(t, mode+": container to outside", h.in(name+"-b"), network, outside4+":80", b)
				if mode != "transparent" {
					reaches(t, mode+": outside to published port", on(w.outside), network, h.wire4+":8095", "")
					reaches(t, mode+": container to published port with disable_icc", h.in(name+"-b"), network, h.wire4+":8095", "")
				}
				if network == "tcp" {
					barred(t, mode+": container to container with disable_icc", h.in(name+"-b"), network, wanted4+":80")
				}
				if wanted6 != "" {
					reaches(t, mode+": outside to container, IPv6", on(w.outside), network, "["+wanted6+"]:80", outside6)
				}
				if wanted6 != "" && network == "udp" {
					barred(t, mode+": container to container with disable_icc, IPv6", h.in(name+"-b"), network, "["+wanted6+"]:80")
				}
			}
			// Nor by what is for all, nor by way of the router, which would send it back.
			if out, err := h.Docker("exec", name+"-b", "/probe", "-timeout", "700ms", "arp", "lan0", wanted4); err == nil && mode != "l2tunnel" { // where the gateway answers
				t.Errorf("%s: a container finds another with disable_icc: %s", mode, out)
			}
			bMAC, b6 := h.mac(name+"-b", name), h.address6(name+"-b", name)
			round := [][]byte{udp(router, bMAC, b, 7, wanted4, 7, "round about"), udp(router, bMAC, b, 7, outside4, 7, "to outside"), udp("ff:ff:ff:ff:ff:ff", bMAC, b, 7, "198.18.64.255", 7, "to all")}
			marks := []string{"round about", "to outside", "to all"}
			if wanted6 != "" {
				round = append(round, udp(router, bMAC, b6, 7, wanted6, 7, "round about, IPv6"))
				marks = append(marks, "round about, IPv6")
			}
			inside, beyond := h.watchIn(name+"-a", "lan0", "the end"), watchOn(t, w.outside, "eth0", "the end")
			sendFrames(t, h.in(name+"-b"), "lan0", append(round, udp(router, bMAC, b, 7, outside4, 7, "the end"))...)
			same(t, mode+": by way of the router to outside", beyond.said(marks...), []string{"to outside", "to all"})
			sendPackets(t, on(w.outside), wanted4, udp(router, router, outside4, 7, wanted4, 7, "the end"))
			same(t, mode+": by way of the router, and to all, with disable_icc", inside.said(marks...), nil)

			h.docker("rm", "-f", name+"-a", name+"-b")
			h.docker("network", "rm", name)

			create := []string{"network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", wire4, "--gateway", wireGateway, "-o", "mode=" + mode, "-o", "interface=" + containerUplink}
			h.refused("use docker run --dns", append(create, "-o", "dns_servers=198.18.64.254", "wrong")...)
			h.refused("use docker run --dns-search", append(create, "-o", "dns_suffix=example.org", "wrong")...)
			h.refused("an internal network has no uplink: leave --internal out, or use mode nat in place of "+mode, append(create, "--internal", "wrong")...)
			const windows = "com.docker.network.windowsshim."
			h.docker("network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", wire4, "--gateway", wireGateway, "--ip-range", wirePart4[h.Engine], "-o", "mode="+mode,
				"-o", windows+"interface="+containerUplink, "-o", windows+"vlanid=30", "-o", windows+"networkname=of Windows", "-o", windows+"macpool="+pool, "-o", windows+"disableicc=true", name)
			if out, err := h.Dockway("networks", "--json"); err != nil || !strings.Contains(out, `"name":"of Windows"`) || !strings.Contains(out, externalSwitch+".30") {
				t.Errorf("%s: a network with the options of Windows is shown as %s (%v)", mode, out, err)
			}
			h.docker("network", "rm", name)
		}
	})
}

// TestAddressAgain: a container that is started again with its address is reached at once by those who
// have spoken to it before, though they remember its MAC.
func TestAddressAgain(t *testing.T) {
	onWire(t, func(t *testing.T, w *wire, h, _ *host) {
		for _, mode := range append([]string{"nat"}, wireModes...) {
			name, asked := "again-"+mode, strings.Replace(wirePart4[h.Engine], "/28", "", 1)
			if mode == "nat" {
				asked = "198.19.80.7"
				h.network(name, "--subnet", "198.19.80.0/24")
			} else {
				h.wired(name, mode)
			}
			w.forget(t)
			h.client(name+"-b", name, "--ip", map[string]string{"198.19.80.7": "198.19.80.9", "198.18.64.16": "198.18.64.19", "198.18.64.32": "198.18.64.39"}[asked])
			flags := []string{"--ip", asked}
			if mode != "transparent" {
				flags = append(flags, "-p", "8086:80")
			}
			h.server(name+"-a", name, flags...)
			ways := map[string]func() error{
				"another container": func() error {
					_, err := h.in(name+"-b")("-timeout", "300ms", "ask", "tcp", asked+":80")
					return err
				},
				"the host": func() error {
					_, err := on(h.Machine)("-timeout", "300ms", "ask", "tcp", asked+":80")
					return err
				},
			}
			if mode == "transparent" {
				ways["outside"] = func() error {
					_, err := on(w.outside)("-timeout", "300ms", "ask", "tcp", asked+":80")
					return err
				}
			} else {
				ways["outside, by a published port"] = func() error {
					_, err := on(w.outside)("-timeout", "300ms", "ask", "tcp", h.wire4+":8086")
					return err
				}
			}
			try := func(when string) {
				t.Helper()
				for what, ask := range ways {
					if err := lab.WaitFor(soon, what, func() (bool, error) { err := ask(); return err == nil, err }); err != nil {
						t.Errorf("%s, %s: %s is not reached: %v", mode, when, asked, err)
					}
				}
			}
			try("at first")
			h.docker("restart", "-t", "0", name+"-a")
			try("restarted")
			h.docker("rm", "-f", name+"-a", name+"-b")
			h.docker("network", "rm", name)
		}
	})
}
