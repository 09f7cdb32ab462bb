package lab_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// verdict is a test that a capture tells of its findings.
type verdict struct{ said []string }

func (v *verdict) Helper() {}
func (v *verdict) Errorf(format string, args ...any) {
	v.said = append(v.said, fmt.Sprintf(format, args...))
}
func (v *verdict) Fatalf(format string, args ...any) { v.Errorf(format, args...) }
func (v *verdict) Cleanup(func())                    {}

// TestCapture: a capture has what passed since it began, with its direction; it finds what was there
// and fails a test on what was not, and says what it saw.
func TestCapture(t *testing.T) {
	s := newSite(t)
	_, a, b := s.pair()
	s.reach(b, a4)
	c := a.Capture(t, "eth0")
	// What passes right after is in it, each time.
	for i := range 20 {
		mark := fmt.Sprintf("mark %d.", i)
		early := a.Capture(t, "eth0")
		s.ask(b, "ping", a4, "1", mark)
		for _, x := range []*lab.Capture{early, c} {
			if n := x.Count(lab.EchoRequest().From(b4).To(a4).Received().Carrying(mark)); n != 1 {
				t.Fatalf("%d of 1 request is in the capture: %v", n, x.Frames(lab.Frames()))
			}
			if n := x.Count(lab.EchoReply().From(a4).To(b4).Sent().Carrying(mark)); n != 1 {
				t.Fatalf("%d of 1 reply is in the capture: %v", n, x.Frames(lab.Frames()))
			}
		}
	}
	c.Where(lab.ICMP()).AllFrames(t, "has a mark", lab.Frames().Carrying("mark "))
}

// TestCaptureFails: each question has an answer that fails the test, in words.
func TestCaptureFails(t *testing.T) {
	s := newSite(t)
	_, a, b := s.pair()
	c := a.Capture(t, "eth0").Where(lab.ICMP()).Patient(100 * time.Millisecond)
	s.reach(b, a4)
	for _, q := range []struct {
		ask   func(t lab.T)
		wants []string // nil: it passes
	}{
		{func(t lab.T) { c.Saw(t, lab.ICMPFrom(b4).To(a4)) }, nil},
		{func(t lab.T) { c.Saw(t, lab.ICMPFrom(b4).To(b4)) }, []string{"a eth0 (ICMP)", "no ICMP from 198.18.0.2 to 198.18.0.2", "198.18.0.2 > 198.18.0.1: ICMP EchoRequest"}},
		{func(t lab.T) { c.Never(t, lab.ARP()) }, nil},
		{func(t lab.T) { c.Never(t, lab.EchoReply().Sent()) }, []string{"no echo reply sent", "Out", "198.18.0.1 > 198.18.0.2: ICMP EchoReply"}},
		{func(t lab.T) { c.AllFrames(t, "is ICMP", lab.ICMP()) }, nil},
		{func(t lab.T) { c.AllFrames(t, "comes in", lab.Frames().Received()) }, []string{"not every frame comes in", "Out"}},
		{func(t lab.T) { c.Where(lab.TCP()).AllFrames(t, "comes in", lab.Frames().Received()) }, []string{"no frame"}},
	} {
		var v verdict
		q.ask(&v)
		all := strings.Join(v.said, "\n")
		if (len(v.said) > 0) != (q.wants != nil) {
			t.Errorf("want %q, but %q", q.wants, all)
		}
		for _, want := range q.wants {
			if !strings.Contains(all, want) {
				t.Errorf("it says %q, want %q in it", all, want)
			}
		}
	}
	c.Forget()
	if n := c.Count(lab.Frames()); n != 0 {
		t.Errorf("%d frames are not forgotten", n)
	}
	// What comes late is waited for.
	p, err := b.Start("", "sh", "-c", "sleep 0.3; "+s.probe+" ping "+a4+" 1 late")
	s.must(err)
	c.Patient(10*time.Second).Saw(t, lab.EchoRequest().From(b4).Carrying("late"))
	s.must(p.Stop())
}

// TestStream: a connection that lives through an interruption is whole, and one that is broken is
// reported.
func TestStream(t *testing.T) {
	s := newSite(t)
	n, a, b := s.pair()
	carries, sends := b.Capture(t, "eth0"), a.Capture(t, "eth0")
	stream, err := s.Stream(a, b, b4+":90")
	s.must(err)
	carries.Saw(t, lab.TCP().ToPort(90).Received())
	s.must(n.Cut(b, "eth0"))
	carries.Forget()
	sends.Forget()
	vain := lab.TCP().ToPort(90).Sent() // nobody gets it
	first := sends.Saw(t, vain).At
	sends.Saw(t, vain.That("a quarter of a second later", func(f lab.Frame) bool { return f.At > first+250*time.Millisecond }))
	s.must(n.Mend(b, "eth0"))
	carries.Saw(t, lab.TCP().ToPort(90).Received())
	report, err := stream.End()
	if err != nil || report.There < 8192 || report.Back < 8192 || report.Longest < 250*time.Millisecond || report.Longest > 10*time.Second {
		t.Errorf("a stream that was interrupted ends as %+v, %v", report, err)
	}

	stream, err = s.Stream(a, b, "["+b6+"]:90")
	s.must(err)
	_, err = b.Script("nft add table inet cut; nft 'add chain inet cut in { type filter hook input priority 0; }'; nft add rule inet cut in tcp dport 90 reject with tcp reset")
	s.must(err)
	carries.Saw(t, lab.TCP().FromPort(90).That("reset", func(f lab.Frame) bool { return strings.Contains(f.String(), "[R") }))
	s.run(b, "nft", "delete", "table", "inet", "cut") // so that b hears of it, too
	if report, err := stream.End(); err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("a stream that was reset ends as %+v, %v", report, err)
	}

	stream, err = s.Stream(a, b, b4+":90")
	s.must(err)
	s.must(n.Cut(b, "eth0"))
	if report, err := stream.End(); err == nil {
		t.Errorf("a stream without a cable ends as %+v", report)
	}
}

// TestCaptureIn: what passes a container's link is seen in the container.
func TestCaptureIn(t *testing.T) {
	s := newSite(t)
	h, err := s.Host("host", lab.Moby)
	s.must(err)
	s.must(h.LoadImage(s.probe))
	_, err = h.Docker("run", "-d", "--name", "web", lab.Image)
	s.must(err)
	ip, err := h.Docker("inspect", "-f", "{{.NetworkSettings.Networks.bridge.IPAddress}}", "web")
	s.must(err)
	c := h.CaptureIn(t, "web", "eth0")
	s.reach(h.Machine, ip)
	c.Saw(t, lab.EchoRequest().To(ip).Received())
	c.Saw(t, lab.EchoReply().From(ip).Sent())
}
