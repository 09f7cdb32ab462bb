package lab_test

import (
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// TestGate: what a program changes is made, fails, waits or is its end, as the gate says; what it only reads passes.
func TestGate(t *testing.T) {
	s := newSite(t)
	m := s.machine("gated")
	there := func() bool {
		out, err := m.Run("ip", "-o", "address", "show", "to", "198.19.1.1")
		s.must(err)
		return out != ""
	}
	for _, c := range []struct {
		name, command string
		answers       []error
		wants         string // of the error; empty: it succeeds
		there         bool   // the address, afterwards
	}{
		{"reading", "ip address show", nil, "", false},
		{"an error", "ip address add 198.19.1.1/32 dev lo", []error{syscall.EROFS}, "Read-only file system", false},
		{"killed", "ip address add 198.19.1.1/32 dev lo", []error{lab.ErrKill}, "killed", false},
		{"put off", "ip address add 198.19.1.1/32 dev lo", []error{lab.ErrWait, nil}, "", true},
		{"allowed", "ip address delete 198.19.1.1/32 dev lo", []error{nil}, "", false},
		{"allowed a write", "sysctl -w net.ipv4.ip_forward=1", []error{nil}, "", false},
		{"denied a write", "sysctl -w net.ipv4.ip_forward=0", []error{syscall.EIO}, "Input/output error", false},
	} {
		var mu sync.Mutex
		var seen []lab.Change
		p, err := m.StartGated(func(change lab.Change) error {
			mu.Lock()
			defer mu.Unlock()
			if seen = append(seen, change); len(seen) <= len(c.answers) {
				return c.answers[len(seen)-1]
			}
			return nil
		}, "", strings.Fields(c.command)...)
		s.must(err)
		err = p.Finish(10 * time.Second)
		if (err == nil) != (c.wants == "") || err != nil && !strings.Contains(err.Error(), c.wants) {
			t.Errorf("%s: %v, want %q", c.name, err, c.wants)
		}
		mu.Lock()
		// The kernel may begin a call again, as it does with a write to a setting while others hold its lock.
		if len(seen) < len(c.answers) || len(c.answers) == 0 && len(seen) > 0 {
			t.Errorf("%s: the gate was asked about %v, want %d questions", c.name, seen, len(c.answers))
		}
		mu.Unlock()
		if there() != c.there {
			t.Errorf("%s: the address is there: %t", c.name, !c.there)
		}
	}
	if forward, err := m.Run("cat", "/proc/sys/net/ipv4/ip_forward"); err != nil || forward != "1" {
		t.Errorf("of two writes, the second denied, is left %s, %v", forward, err)
	}
}
