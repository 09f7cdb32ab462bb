package kernel_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// TestAnnounceOnUplink: who is on the wire and remembers another MAC of an address takes over what is
// announced on an uplink, and the other ports of its switch hear nothing of it.
func TestAnnounceOnUplink(t *testing.T) {
	l := newHost(t)
	k := open(t, kernel.Config{})
	s, v := external("eth1"), veth(1, "dwx1")
	do(t, k, add(s, v)...)
	port := captureHere(t, v.Peer)
	wire := func(command string) string {
		t.Helper()
		return run(t, "sh", "-ec", "nsenter --net="+l.namespace+" "+command)
	}
	old, now := "02:00:00:00:00:01", plan.MAC{2, 0, 0, 0, 0, 2}
	var said []plan.Neighbour
	for _, a := range []string{"198.18.0.77", "fd00::77", "fe80::77"} {
		wire(fmt.Sprintf("ip neigh replace %s lladdr %s nud stale dev lan0", a, old))
		said = append(said, plan.Neighbour{Link: "eth1", Address: netip.MustParseAddr(a), MAC: now})
	}
	gone := plan.Neighbour{Link: "eth9", Address: netip.MustParseAddr("198.18.0.78"), MAC: now}
	if err := k.Announce(context.Background(), "", append([]plan.Neighbour{gone}, said...)); err == nil || !strings.Contains(err.Error(), "eth9") {
		t.Errorf("a link that is not there: %v", err)
	}
	for _, n := range said {
		eventually(t, n.Address.String()+" to have the MAC that was announced", func() bool {
			return strings.Contains(wire("ip neigh show dev lan0 to "+n.Address.String()), now.String())
		})
	}
	for _, frame := range port.taken() {
		if strings.Contains(string(frame), string(now[:])) {
			t.Errorf("a port of the switch heard %x", frame)
		}
	}
}
