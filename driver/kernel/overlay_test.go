package kernel_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// TestOverlay: containers of two hosts reach each other through VXLAN, by what is written down
// beforehand. Nothing is sent to all, and nothing is encapsulated between containers of one host.
func TestOverlay(t *testing.T) {
	for _, ipv6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "IPv4", true: "IPv6"}[ipv6], func(t *testing.T) {
			hosts := newOverlayHosts(t, 3, ipv6)
			a, b, c := hosts[0], hosts[1], hosts[2]
			put(t, a.k, append(base(tenant, testVNI, a.local), within(tenant, append(append(port(1), port(2)...), remote(3, b.local)...)...)...)...)
			put(t, b.k, append(base(tenant, testVNI, b.local), within(tenant, append(append(port(3), remote(1, a.local)...), remote(2, a.local)...)...)...)...)
			one, two, three := a.container(t, 1), a.container(t, 2), b.container(t, 3)
			wire := captureHere(t, "u0")

			exchange(t, one, two, inner4(2))
			exchange(t, one, two, inner6(2))
			if n := checkUnderlay(t, wire, testVNI); len(n) > 0 {
				t.Errorf("%d frames on the underlay between two containers of one host", n)
			}
			exchange(t, one, three, inner4(3))
			exchange(t, one, three, inner6(3))
			exchange(t, three, two, inner4(2))
			exchange(t, three, two, inner6(2))
			for _, address := range []string{inner4(3).String(), inner6(3).String()} {
				transfer(t, one, three, address, io.LimitReader(zeros{}, 1<<20), io.Discard)
			}
			if n := checkUnderlay(t, wire, testVNI); len(n) != 3 {
				t.Errorf("frames on the underlay: %d", n)
			}
			// Whom nobody knows is asked for on this host alone.
			shout(t, one, netip.MustParseAddrPort("198.19.0.77:9"), netip.MustParseAddrPort("[fd00:90::77]:9"), netip.MustParseAddrPort("198.19.0.255:9"), netip.MustParseAddrPort("[ff02::1%eth0]:9"))
			exchange(t, one, three, inner4(3))
			checkUnderlay(t, wire, testVNI)

			// The endpoint moves to a third host: its MAC stays, and the container need not notice.
			put(t, c.k, append(base(tenant, testVNI, c.local), within(tenant, append(port(3), remote(1, a.local)...)...)...)...)
			moved := plan.Within{Namespace: tenant, Object: plan.FDB{Link: "dwo1", MAC: innerMAC(3), VTEP: c.local}}
			do(t, a.k, plan.Diff(observe(t, a.k, moved), plan.Of(moved))...)
			again := c.container(t, 3)
			exchange(t, one, again, inner4(3))
			exchange(t, one, again, inner6(3))
			// Then to the first.
			do(t, a.k, remove(within(tenant, remote(3, c.local)...)...)...)
			do(t, a.k, add(within(tenant, port(3)...)...)...)
			checkUnderlay(t, wire, testVNI)
			here := a.container(t, 3)
			exchange(t, one, here, inner4(3))
			exchange(t, one, here, inner6(3))
			if n := checkUnderlay(t, wire, testVNI)[innerMAC(3)]; n > 0 {
				t.Errorf("%d frames on the underlay for a container that has moved to this host", n)
			}
			// And to another again, where an entry at another port gives way.
			do(t, a.k, add(within(tenant, remote(3, b.local)...)...)...)
			holds(t, a.k, within(tenant, remote(3, b.local)...)...)
			exchange(t, one, three, inner4(3))
		})
	}
}

// shout sends a datagram to each of some addresses, which may have nobody.
func shout(t testing.TB, from *place, to ...netip.AddrPort) {
	t.Helper()
	from.do(t, func() error {
		for _, a := range to {
			c, err := (&net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
				var failure error
				err := raw.Control(func(fd uintptr) { failure = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1) })
				return errors.Join(err, failure)
			}}).ListenPacket(ctx(), map[bool]string{true: "udp4", false: "udp6"}[a.Addr().Is4()], ":0")
			if err != nil {
				return err
			}
			_, err = c.WriteTo([]byte("is anybody there?"), net.UDPAddrFromAddrPort(a))
			if err := errors.Join(err, c.Close()); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestTenants: two networks with the same subnet, on the same hosts, do not meet.
func TestTenants(t *testing.T) {
	hosts := newOverlayHosts(t, 2, false)
	a, b := hosts[0], hosts[1]
	put(t, a.k, append(base(tenant, testVNI, a.local), within(tenant, append(port(1), remote(2, b.local)...)...)...)...)
	put(t, b.k, append(base(tenant, testVNI, b.local), within(tenant, append(port(2), remote(1, a.local)...)...)...)...)
	other := func(n int) []plan.Object { // the same addresses
		o := port(n)
		v := o[0].(plan.Veth)
		v.Peer = fmt.Sprintf("dwc%d", n+10)
		o[0] = v
		return o
	}
	put(t, a.k, append(base(tenant2, testVNI+1, a.local), within(tenant2, append(other(1), remote(2, b.local)...)...)...)...)
	one, two := a.container(t, 1), b.container(t, 2)
	stranger := newPlace(t)
	a.run(t, "ip link set dwc11 netns "+stranger.path+" name eth0")
	stranger.run(t, "ip link set eth0 up", "ip addr add 198.19.0.1/24 dev eth0")
	exchange(t, one, two, inner4(2))
	if err := tryExchange(t, stranger, two, inner4(2), 300*time.Millisecond); err == nil {
		t.Error("one network reaches the other")
	}
	exchange(t, one, two, inner4(2))
	if all := observeAll(t, a.k); len(plan.Diff(all, plan.Of(append(base(tenant, testVNI, a.local), append(within(tenant, append(port(1), remote(2, b.local)...)...),
		append(base(tenant2, testVNI+1, a.local), within(tenant2, append(other(1), remote(2, b.local)...)...)...)...)...)...))) > 6 {
		t.Errorf("all there is:\n%s", all)
	}
	if got := a.run(t, "ip -d -o link"); strings.Contains(got, "vxlan") {
		t.Errorf("a VXLAN device in the host's namespace: %s", got)
	}
}
