package lab_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// TestVXLAN: a capture on the underlay tells who encapsulates what for whom, over IPv4 and IPv6, on
// whatever port.
func TestVXLAN(t *testing.T) {
	s := newSite(t)
	_, a, b := s.pair()
	c := b.Capture(t, "eth0")
	for _, v := range []struct {
		vni, port    int
		local, other string
	}{{5001, 14789, a4, b4}, {5002, 4789, a4, b4}, {16777214, 14789, a6, b6}} {
		link, subnet := fmt.Sprintf("vx%d", v.vni), fmt.Sprintf("10.90.%d.", v.vni%256)
		for i, m := range []*lab.Machine{a, b} {
			local, other := v.local, v.other
			if m == b {
				local, other = other, local
			}
			csum := "udpcsum"
			if v.vni == 16777214 {
				csum = "udp6zerocsumtx udp6zerocsumrx"
			}
			s.run(m, "sh", "-ec", fmt.Sprintf("ip link add %s type vxlan id %d local %s remote %s dstport %d %s", link, v.vni, local, other, v.port, csum))
			s.run(m, "sh", "-ec", fmt.Sprintf("ip link set %s up; ip address add %s%d/24 dev %[1]s", link, subnet, i+1))
		}
		s.reach(a, subnet+"2")
		ours := lab.Encapsulated(v.port).From(v.local).To(v.other).VNI(v.vni)
		f := c.Saw(t, ours.Received().Inside(lab.EchoRequest().From(subnet+"1").To(subnet+"2").DestinationMAC(s.mac(b, link))))
		if vni, inner, ok := f.VXLAN(); !ok || int(vni) != v.vni || len(inner.Data) == 0 {
			t.Errorf("of %s VNI %d is taken out (%v)", f, vni, ok)
		}
		c.Saw(t, lab.Encapsulated(v.port).To(v.local).VNI(v.vni).Sent().Inside(lab.EchoReply().From(subnet+"2")))
		c.Saw(t, ours.Inside(lab.ARPRequest().To(subnet+"2").And(lab.Group())))
		c.Never(t, ours.Inside(lab.Frames().From(v.local)))
		c.Never(t, lab.EchoRequest().To(subnet+"2")) // not in clear
		c.Never(t, lab.Not(lab.Encapsulated(v.port)).VNI(v.vni))
		if missing := c.Count(ours.ChecksumMissing()); (missing > 0) != (v.vni == 16777214) {
			t.Errorf("%d datagrams of %d have no checksum", missing, v.vni)
		}
	}
}

// TestBlock: a segment is cut in one direction, and between groups, and healed; and a pulse tells
// what was lost meanwhile, and nothing else.
func TestBlock(t *testing.T) {
	s := newSite(t)
	n, a, b := s.pair()
	c := s.machine("c")
	s.must(n.Plug(c, "eth0", "198.18.0.3/24"))
	machines := map[string]*lab.Machine{a4: a, b4: b, "198.18.0.3": c}
	pulses := map[[2]string]*lab.Pulse{}
	port := 90
	for from, sender := range machines {
		for to, receiver := range machines {
			if from == to {
				continue
			}
			s.reach(sender, to)
			p, err := s.Pulse(sender.Spot(), receiver.Spot(), fmt.Sprintf("%s:%d", to, port))
			s.must(err)
			pulses[[2]string{from, to}] = p
			port++
		}
	}
	const long = 400 * time.Millisecond
	cut := func(remove func() error) lab.Span {
		time.Sleep(long)
		span := lab.Span{To: time.Now()} // the whole cut lasts longer
		s.must(remove())
		return span
	}
	time.Sleep(long)
	oneWay := time.Now()
	rule, err := n.Block(a, b)
	s.must(err)
	blocked := time.Now()
	span := cut(func() error {
		if dropped, err := rule.Dropped(); err != nil || dropped < 100 {
			t.Errorf("the rule dropped %d frames: %v", dropped, err)
		}
		return rule.Remove()
	})
	way := lab.Span{From: oneWay, To: time.Now()}
	inWay := lab.Span{From: blocked, To: span.To}
	time.Sleep(long)
	parted := time.Now()
	p, err := n.Part([]*lab.Machine{a}, []*lab.Machine{b, c})
	s.must(err)
	apart := time.Now()
	span = cut(func() error {
		if dropped, err := p.Dropped(); err != nil || dropped < 400 {
			t.Errorf("the partition dropped %d frames: %v", dropped, err)
		}
		return p.Heal()
	})
	both := lab.Span{From: parted, To: time.Now()}
	inBoth := lab.Span{From: apart, To: span.To}
	time.Sleep(long)

	for ends, p := range pulses {
		r, err := p.End()
		s.must(err)
		var spans, inside []lab.Span
		if ends == [2]string{a4, b4} {
			spans, inside = append(spans, way), append(inside, inWay)
		}
		if ends[0] == a4 || ends[1] == a4 {
			spans, inside = append(spans, both), append(inside, inBoth)
		}
		if lost := r.LostOutside(spans...); len(lost) > 0 || r.Twice+r.Late+r.Strange > 0 {
			t.Errorf("%s to %s: lost while nothing was cut: %v; %s", ends[0], ends[1], lost, r)
		}
		want := 0
		for _, s := range inside {
			ms := int(s.To.Sub(s.From).Milliseconds())
			if got := r.LostIn(s); got < ms*9/10 || got > ms*11/10+2 {
				t.Errorf("%s to %s: %d were lost in a cut of %d ms: %s", ends[0], ends[1], got, ms, r)
			}
			want += ms
		}
		if lost := r.Sent - r.Received; r.Sent < 5*400 || lost < want*9/10 || len(inside) == 0 && lost > 0 {
			t.Errorf("%s to %s: %d lost, want about %d: %s", ends[0], ends[1], lost, want, r)
		}
	}
}

// TestPulse: what is not of the pulse is told apart, and what the sender's own kernel refuses.
func TestPulse(t *testing.T) {
	s := newSite(t)
	n, a, b := s.pair()
	s.reach(a, b4)
	p, err := s.Pulse(a.Spot(), b.Spot(), b4+":90")
	s.must(err)
	_, _ = a.Run(s.probe, "-timeout", "100ms", "ask", "udp", b4+":90") // which a pulse does not answer
	s.run(a, "ip", "address", "delete", a4+"/24", "dev", "eth0")
	time.Sleep(100 * time.Millisecond)
	s.run(a, "ip", "address", "add", a4+"/24", "dev", "eth0")
	time.Sleep(100 * time.Millisecond)
	r, err := p.End()
	s.must(err)
	refused := 0
	for _, l := range r.Lost {
		refused += l.Refused
	}
	if r.Strange != 1 || refused < 50 || r.Sent-r.Received < refused || r.Gap < 90*time.Millisecond {
		t.Errorf("one datagram was strange, and for 100 ms there was no route: %s", r)
	}
	if _, err := n.Block(a, s.machine("elsewhere")); err == nil {
		t.Error("the way to a machine that is not plugged in could be blocked")
	}
}
