package kernel_test

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

func TestVLANTags(t *testing.T) {
	l := newVLANLab(t)
	v := vlan(1, 100)
	do(t, l.k, add(v)...)
	holds(t, l.k, v)
	do(t, l.k, add(v)...) // again is fine
	holds(t, l.k, v)
	if all := observeAll(t, l.k); len(plan.Diff(all, plan.Of(v))) > 0 {
		t.Errorf("all there is:\n%s", all)
	}
	c := behind(t, v, 1).tap(t, "eth0")

	// Out.
	c.send(t, "out")
	if f := l.wire.one(t, "out"); f.vlan != 100 || f.priority != 0 || f.inner != 0 {
		t.Errorf("on the wire: %+v", f)
	}
	for _, kind := range []uint16{unix.ETH_P_8021Q, unix.ETH_P_8021AD} {
		for _, id := range []uint16{0, 100, 200} {
			c.send(t, fmt.Sprintf("tagged %x %d", kind, id), [2]uint16{kind, id})
		}
	}
	c.send(t, "after tagged")
	if got := l.wire.receive(t, "after tagged"); len(got) > 0 {
		t.Errorf("tagged frames of a container on the wire: %+v", got)
	}
	// In.
	for _, priority := range []uint16{0, 5 << 13, 1 << 12, 15 << 12} {
		l.wire.send(t, "in", tagged(priority|100))
		if f := c.one(t, "in"); f.vlan != noTag || f.inner != 0 {
			t.Errorf("in the container: %+v", f)
		}
	}
	l.wire.send(t, "untagged")
	l.wire.send(t, "priority only", tagged(0))
	l.wire.send(t, "101", tagged(101))
	l.wire.send(t, "100 and bit 12", tagged(1<<12|101))
	l.wire.send(t, "service tag", [2]uint16{unix.ETH_P_8021AD, 100})
	l.wire.send(t, "after others", tagged(100))
	if got := c.receive(t, "after others"); len(got) > 0 {
		t.Errorf("frames of others in the container: %+v", got)
	}

	// The whole MTU passes, tag or not.
	long := strings.Repeat("x", 1500-2)
	c.send(t, long)
	if f := l.wire.one(t, long); f.vlan != 100 || f.size != 1514 {
		t.Errorf("of a long frame on the wire: VLAN %d, %d bytes", f.vlan, f.size)
	}
	l.wire.send(t, long, tagged(100))
	if f := c.one(t, long); f.size != 1514 {
		t.Errorf("of a long frame in the container: %d bytes", f.size)
	}
}

// TestVLANLetsOthersPass: what is not of the VLAN goes on to what the host has on the uplink, as if
// there were no VLAN: here a bridge.
func TestVLANLetsOthersPass(t *testing.T) {
	l := newVLANLab(t)
	v := vlan(1, 100)
	here(t, "ip link add br0 type bridge", "ip link set br0 addrgenmode none up", "ip link set eth0 master br0")
	c := container(t, "br0", 9).tap(t, "eth0")
	exchange := func() (in, out []frame) {
		for _, id := range []uint16{0, 1, 99, 100, 101, 4095} {
			l.wire.send(t, fmt.Sprint("in ", id), tagged(3<<13|id))
			c.send(t, fmt.Sprint("out ", id), tagged(3<<13|id))
		}
		for _, p := range []*tap{l.wire, c} {
			p.send(t, "untagged")
			p.send(t, "service tag", [2]uint16{unix.ETH_P_8021AD, 100})
			p.send(t, "two tags", tagged(7), tagged(100))
			p.send(t, "last")
		}
		return c.receive(t, "last"), l.wire.receive(t, "last")
	}
	in, out := exchange()
	do(t, l.k, add(v)...)
	inside := behind(t, v, 1).tap(t, "eth0")
	inWith, outWith := exchange()
	var without []frame
	for _, f := range in {
		if f.text != "in 100" {
			without = append(without, f)
		}
	}
	if len(in) != 9 || len(without) != 8 || fmt.Sprint(inWith) != fmt.Sprint(without) || fmt.Sprint(outWith) != fmt.Sprint(out) {
		t.Errorf("the host gets and sends\n%+v\n%+v\nnot, as without the VLAN,\n%+v\n%+v", inWith, outWith, without, out)
	}
	inside.one(t, "in 100")
	do(t, l.k, remove(v)...)
	flush(t, l.k)
	if in, _ := exchange(); len(in) != 9 {
		t.Errorf("after the VLAN's removal the host gets %+v", in)
	}
}

// TestVLANsApart: two VLANs of an uplink, two containers in one of them.
func TestVLANsApart(t *testing.T) {
	l := newVLANLab(t)
	one, two := vlan(1, 100), vlan(2, 200)
	do(t, l.k, add(one, two)...)
	holds(t, l.k, one, two)
	a := behind(t, one, 1).tap(t, "eth0")
	b := container(t, "br1", 3).tap(t, "eth0")
	c := behind(t, two, 2).tap(t, "eth0")
	a.send(t, "from a")
	b.one(t, "from a")
	if f := l.wire.one(t, "from a"); f.vlan != 100 {
		t.Errorf("on the wire: %+v", f)
	}
	c.send(t, "from c")
	if f := l.wire.one(t, "from c"); f.vlan != 200 {
		t.Errorf("on the wire: %+v", f)
	}
	l.wire.send(t, "to one", tagged(100))
	l.wire.send(t, "to two", tagged(200))
	for _, tap := range []*tap{a, b} {
		tap.one(t, "to one")
	}
	c.one(t, "to two")
	// One goes, the other stays.
	do(t, l.k, remove(one)...)
	flush(t, l.k)
	holds(t, l.k, two)
	l.wire.send(t, "to one", tagged(100))
	l.wire.send(t, "to two again", tagged(200))
	for tap, last := range map[*tap]string{c: "to two again"} {
		if got := tap.receive(t, last); len(got) > 0 {
			t.Errorf("%+v arrives", got)
		}
	}
	c.send(t, "from c again")
	if f := l.wire.one(t, "from c again"); f.vlan != 200 {
		t.Errorf("on the wire: %+v", f)
	}
	a.send(t, "from a again")
	c.send(t, "last")
	if got := l.wire.receive(t, "last"); len(got) > 0 {
		t.Errorf("of a removed VLAN on the wire: %+v", got)
	}
}

// TestVLANMacvlan: a container on a macvlan on a VLAN is in it, and cannot choose another with a tag
// that it writes itself and calls something else.
func TestVLANMacvlan(t *testing.T) {
	l := newVLANLab(t)
	m := macvlan(1, "dwt1")
	m.Name = "dwc1"
	do(t, l.k, add(vlan(1, 100), m)...)
	p := newPlace(t)
	here(t, "ip link set dwc1 netns "+p.path)
	p.run(t, "ip link set dwc1 addrgenmode none up")
	c := p.tap(t, "dwc1")
	c.send(t, "out")
	if f := l.wire.one(t, "out"); f.vlan != 100 {
		t.Errorf("on the wire: %+v", f)
	}
	for _, kind := range []uint16{unix.ETH_P_8021Q, unix.ETH_P_8021AD} {
		c.lie(t, "tagged", [2]uint16{kind, 200})
	}
	c.send(t, "after tagged")
	if got := l.wire.receive(t, "after tagged"); len(got) > 0 {
		t.Errorf("tagged frames of a container on the wire: %+v", got)
	}
	l.wire.send(t, "101", tagged(101))
	l.wire.send(t, "in", tagged(100))
	if got := c.receive(t, "in"); len(got) > 0 {
		t.Errorf("frames of others in the container: %+v", got)
	}
}
