package integration

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// theUnderlay makes three hosts of an overlay once, for all tests that use them: Debian, moby, Debian.
var theUnderlay = sync.OnceValues(func() (*lab.Underlay, error) {
	return shared.lab.Underlay(lab.UnderlayConfig{Name: "under", Hosts: 3, Plugin: shared.built, Probe: shared.probe, Setting: []string{"LOG_LEVEL=debug", "COLLECT_AFTER=3s"}})
})

// onUnderlay gives the hosts of the underlay within a test.
func onUnderlay(t *testing.T) (*lab.Underlay, []*host) {
	t.Helper()
	u, err := theUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	var hosts []*host
	for i, h := range u.Hosts {
		one := onHost(t, h)
		one.ip = lab.UnderlayAddress(i)
		hosts = append(hosts, one)
	}
	return u, hosts
}

// pulse starts a pulse from a container to an address of another spot.
func (h *host) pulse(container string, to lab.Spot, address string) *lab.Pulse {
	h.t.Helper()
	p, err := shared.lab.Pulse(h.spot(container), to, address)
	if err != nil {
		h.t.Fatal(err)
	}
	return p
}

// spot is a container's network.
func (h *host) spot(container string) lab.Spot {
	h.t.Helper()
	s, err := h.Container(container)
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// ended ends a pulse and fails the test if a datagram was lost outside of the spans.
func ended(t *testing.T, what string, p *lab.Pulse, spans ...lab.Span) lab.PulseReport {
	t.Helper()
	r, err := p.End()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if lost := r.LostOutside(spans...); len(lost) > 0 || r.Twice+r.Strange > 0 {
		t.Errorf("%s: lost when nothing should be: %v; %s", what, lost, r)
	}
	t.Logf("%s: %s", what, r)
	return r
}

// TestUnderlay: the hosts of an overlay reach each other, have their settings, can be cut off, killed
// and powered off one by one; what goes on meanwhile is told by a pulse.
func TestUnderlay(t *testing.T) {
	u, hosts := onUnderlay(t)
	for i, h := range hosts {
		settings := h.docker("plugin", "inspect", "-f", "{{.Settings.Env}}", lab.Plugin)
		for _, want := range []string{"NODE_NAME=" + h.Name, "JOIN=198.18.80.1,198.18.80.2 ", "ADVERTISE=eth0", "VXLAN_PORT=14789"} {
			if !strings.Contains(settings, want) {
				t.Errorf("%s has %s, which lacks %s", h.Name, settings, want)
			}
		}
		if engine := h.Engine; (engine == lab.Moby) != (i == 1) {
			t.Errorf("host %d has engine %s", i, engine)
		}
		h.network("under")
		h.client("under-client", "under")
		if mtu := h.must("cat /sys/class/net/eth0/mtu"); mtu != "1500" {
			t.Errorf("the MTU of %s is %s", h.Name, mtu)
		}
	}
	// Each to the next, which is reached for as long as it is on.
	at := func(i int) string { return fmt.Sprintf("%s:%d", hosts[i].ip, 90) }
	from0, from1 := hosts[0].pulse("under-client", hosts[1].Spot(), at(1)), hosts[1].pulse("under-client", hosts[2].Spot(), at(2))
	six, err := shared.lab.Pulse(hosts[1].Spot(), hosts[0].Spot(), "["+lab.UnderlayAddress6(0)+"]:91")
	if err != nil {
		t.Fatal(err)
	}
	var before lab.Span
	before.From = time.Now()
	p, err := u.Part(u.Machines(0), u.Machines(1, 2))
	if err != nil {
		t.Fatal(err)
	}
	hosts[1].killPlugin()
	if err := p.Heal(); err != nil {
		t.Fatal(err)
	}
	before.To = time.Now()
	hosts[0].killPlugin() // not one twice: an engine that is not done with its start gives it up
	if r := ended(t, "from host 1 to host 2, cut off for a while", from0, before); r.Received == r.Sent {
		t.Error("nothing was lost in the cut")
	}
	ended(t, "the same over IPv6, from host 2 to host 1", six, before)
	ended(t, "from host 2 to host 3, never cut off", from1)

	last := hosts[2]
	last.PowerOff()
	if out, err := hosts[1].Run(shared.probe, "-timeout", "500ms", "ping", last.ip, "1", "?"); err == nil && out == "1" {
		t.Error("a host that is off answers")
	}
	if err := last.PowerOn(); err != nil {
		t.Fatal(err)
	}
	if err := last.WaitPlugin(""); err != nil {
		t.Fatal(err)
	}
	last.docker("start", "under-client")
	ended(t, "from host 3, powered on, to host 1", pulsed(t, last, hosts[0], at(0)))

	if err := last.SetPlugin("CLUSTER=another"); err != nil {
		t.Fatal(err)
	}
	if settings := last.docker("plugin", "inspect", "-f", "{{.Settings.Env}}", lab.Plugin); !strings.Contains(settings, "CLUSTER=another") {
		t.Errorf("the settings are %s", settings)
	}
	if err := last.SetPlugin("CLUSTER=dockway"); err != nil {
		t.Fatal(err)
	}
}

// pulsed is a pulse that has gone on for some datagrams.
func pulsed(t *testing.T, from, to *host, address string) *lab.Pulse {
	t.Helper()
	p := from.pulse("under-client", to.Spot(), address)
	time.Sleep(200 * time.Millisecond)
	return p
}

// pins is where the plugin holds its namespaces, as it sees it itself, and as the host does.
const (
	pinsInside  = "/host/run/dockway-netns"
	pinsOutside = "/run/docker/plugins/dockway-netns"
)

// TestNamespacesOutliveThePlugin: what config.json asks for is enough to make a namespace, to hold
// it and to write settings in it, and what is held there stays until the host reboots.
func TestNamespacesOutliveThePlugin(t *testing.T) {
	for _, engine := range []lab.Engine{lab.Debian, lab.Moby} {
		t.Run(string(engine), func(t *testing.T) {
			t.Parallel()
			bare, err := shared.host(string(engine)+"-namespaces", engine)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(bare.PowerOff) // after the host has told what failed
			h := onHost(t, bare)

			h.inPlugin("mkdir -p " + pinsInside + "; touch " + pinsInside + "/a; unshare --net=" + pinsInside + "/a ip link add held type bridge")
			made := h.must("stat -Lc %i " + pinsOutside + "/a")
			if own := h.must("stat -Lc %i /proc/1/ns/net"); made == own {
				t.Fatal("the namespace is the host's own")
			}
			held := func(after string) {
				t.Helper()
				for _, side := range []string{
					h.must("stat -Lc %i " + pinsOutside + "/a; nsenter --net=" + pinsOutside + "/a ip link show held >/dev/null"),
					h.inPlugin("stat -Lc %i " + pinsInside + "/a"),
				} {
					if side != made {
						t.Errorf("after %s the namespace is %s, and was %s", after, side, made)
					}
				}
				if mounts := h.must("grep -c " + pinsOutside + "/a /proc/1/mountinfo"); mounts != "1" {
					t.Errorf("after %s it is mounted %s times", after, mounts)
				}
			}
			held("it was made")

			h.settings()

			h.killPlugin()
			held("kill -9 of the plugin")
			h.must("docker plugin disable -f dockway:latest; docker plugin set dockway:latest LOG_LEVEL=info; docker plugin enable dockway:latest")
			held("disable, set and enable")
			h.must("docker plugin disable -f dockway:latest; docker plugin rm -f dockway:latest")
			if err := h.InstallPlugin(shared.built, "LOG_LEVEL=debug"); err != nil {
				t.Fatal(err)
			}
			held("a new plugin in its place, as make install does")
			if err := h.StopEngine(); err != nil {
				t.Fatal(err)
			}
			if err := h.StartEngine(); err != nil {
				t.Fatal(err)
			}
			held("a restart of the engine")
			if err := h.KillEngine(); err != nil {
				t.Fatal(err)
			}
			if err := h.StartEngine(); err != nil {
				t.Fatal(err)
			}
			held("kill -9 of the engine")

			h.inPlugin("umount " + pinsInside + "/a; rm " + pinsInside + "/a")
			if left := h.must("ls " + pinsOutside + "; grep " + pinsOutside + " /proc/1/mountinfo || true"); left != "" {
				t.Errorf("the plugin cannot let go of it: %s", left)
			}
			h.inPlugin("touch " + pinsInside + "/b; unshare --net=" + pinsInside + "/b true")
			if err := h.Reboot(); err != nil {
				t.Fatal(err)
			}
			if out, err := h.Run("ls", pinsOutside); err == nil {
				t.Errorf("after a reboot there is still %s", out)
			}
		})
	}
}

// settings writes network settings in the namespace as the plugin does, in the host's /proc/sys/net.
func (h *host) settings() {
	h.t.Helper()
	for _, name := range []string{"bridge/bridge-nf-call-iptables", "ipv4/ip_forward", "ipv6/conf/held/disable_ipv6", "ipv4/conf/held/rp_filter"} {
		inside := func(what string) string {
			return h.inPlugin("nsenter --net=" + pinsInside + "/a sh -ec '" + fmt.Sprintf(what, "/host/proc/sys/net/"+name) + "'")
		}
		host := "/proc/sys/net/" + name
		before := h.must("cat " + host + " 2>/dev/null || true")
		was := inside("cat %s")
		want := map[string]string{"0": "1", "1": "0"}[was]
		inside("echo " + want + " >%s")
		if now := h.must("nsenter --net=" + pinsOutside + "/a cat " + host); now != want {
			h.t.Errorf("%s in the namespace was %s and is %s, want %s", name, was, now, want)
		}
		if after := h.must("cat " + host + " 2>/dev/null || true"); after != before {
			h.t.Errorf("%s of the host was %q and is %q", name, before, after)
		}
	}
}

// inPlugin runs a shell script of busybox's in the plugin's container, with no more rights than the
// plugin has.
func (h *host) inPlugin(script string) string {
	h.t.Helper()
	pid, err := h.PluginPID()
	if err != nil {
		h.t.Fatal(err)
	}
	var bound uint64
	if _, err := fmt.Sscanf(h.must("grep CapBnd /proc/"+pid+"/status"), "CapBnd: %x", &bound); err != nil {
		h.t.Fatal(err)
	}
	rights := "-all"
	for n := range 64 {
		if bound&(1<<n) != 0 {
			rights += fmt.Sprintf(",+cap_%d", n)
		}
	}
	h.must("cp /bin/busybox /proc/" + pid + "/root/busybox")
	out, err := h.Run("setpriv", "--bounding-set", rights, "nsenter", "-t", pid, "-m", "-p", "/busybox", "sh", "-ec", script)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}
