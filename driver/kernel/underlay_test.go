package kernel_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

func TestUnderlay(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	if got, err := k.Outgoing(ctx(), netip.Addr{}); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("the source of a host without a route: %v, %v", got, err)
	}
	here(t, "ip link add eth0 mtu 1400 type veth peer wire", "ip link set eth0 addrgenmode none", "ip link set eth0 up", "ip link set wire up",
		"ip addr add 198.18.0.1/24 dev eth0", "ip addr add 198.18.0.9/24 dev eth0", "ip addr add fd00:18::1/64 dev eth0 nodad",
		"ip route add 198.18.7.0/24 via 198.18.0.2 src 198.18.0.9")
	for _, a := range []string{"198.18.0.1", "198.18.0.9", "fd00:18::1"} {
		if name, mtu, err := k.Underlay(ctx(), netip.MustParseAddr(a)); err != nil || name != "eth0" || mtu != 1400 {
			t.Errorf("%s is on %s, MTU %d: %v", a, name, mtu, err)
		}
	}
	for _, a := range []string{"198.18.0.3", "fd00:18::3"} {
		if name, _, err := k.Underlay(ctx(), netip.MustParseAddr(a)); !errors.Is(err, unix.EADDRNOTAVAIL) || !strings.Contains(err.Error(), a) {
			t.Errorf("%s is on %s: %v", a, name, err)
		}
	}
	source := func(to, want string) {
		t.Helper()
		var a netip.Addr
		if to != "" {
			a = netip.MustParseAddr(to)
		}
		if got, err := k.Outgoing(ctx(), a); err != nil || got.String() != want {
			t.Errorf("the source of what goes to %q is %s, not %s: %v", to, got, want, err)
		}
	}
	source("198.18.0.2", "198.18.0.1")
	source("198.18.7.7", "198.18.0.9")
	source("fd00:18::2", "fd00:18::1")
	run(t, "ip", "-6", "route", "add", "default", "via", "fd00:18::2")
	source("", "fd00:18::1")
	run(t, "ip", "route", "add", "default", "via", "198.18.0.2", "metric", "50")
	source("", "198.18.0.1")
	run(t, "ip", "route", "add", "default", "via", "198.18.0.2", "src", "198.18.0.9", "metric", "5")
	source("", "198.18.0.9")
}

// TestSettingsElsewhere: in a managed plugin /proc/sys is read-only, and the host's settings are mounted
// elsewhere: settings of a namespace are found there too.
func TestSettingsElsewhere(t *testing.T) {
	h := newOverlayHost(t)
	root := t.TempDir()
	target := filepath.Join(root, "net")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/proc/sys/net", target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, 0); err != nil {
			t.Error(err)
		}
	})
	k := openIn(t, h.place, kernel.Config{Namespaces: h.dir, ProcSys: root})
	forward := plan.Sysctl{Name: "net/ipv4/ip_forward", Value: "1"}
	noRA := plan.Sysctl{Name: "net/ipv6/conf/dwb1/accept_ra", Value: "0"}
	all := append([]plan.Object{plan.Namespace{Name: tenant}}, within(tenant, innerBridge(), forward, noRA)...)
	put(t, k, all...)
	holds(t, k, all...)
	holds(t, h.k, all...) // by the usual way
	if got := h.in(t, tenant, "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/dwb1/accept_ra"); got != "1\n0\n" {
		t.Errorf("in the namespace: %q", got)
	}
	if got := h.run(t, "cat /proc/sys/net/ipv4/ip_forward"); got != "0\n" {
		t.Errorf("in the host: %q", got)
	}
}
