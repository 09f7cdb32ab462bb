package integration

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

// TestFailingDisk: the disk below the open record turns read-only, or has errors. Each call fails and says what to do,
// nothing half-made is left, what runs is left alone, and when the disk is well again all calls are granted. Where nobody can
// know what is on the disk, dockway says so and goes on when it is restarted.
func TestFailingDisk(t *testing.T) {
	g := newGated(t, "failing-disk", "198.18.0.64")
	l := newLife(g, nil, true, true)
	for _, s := range l.steps {
		l.grant(s.name, s.do)
	}
	for _, s := range slices.Backward(l.steps) {
		l.grant("take back "+s.name, s.undo)
	}
	var states []string // before each step, and after the last
	for _, s := range l.steps {
		states = append(states, l.settled())
		l.grant(s.name, s.do)
	}
	states = append(states, l.settled())
	for _, s := range slices.Backward(l.steps) {
		l.grant("take back "+s.name, s.undo)
	}
	l.settles("nothing to be left", states[0])

	// fails makes a call while the disk has trouble.
	fails := func(what string, call func() error, words ...string) {
		t.Helper()
		err := call()
		if err == nil {
			t.Fatalf("%s: granted", what)
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s says %q, want %q in it", what, err, w)
			}
		}
	}
	for _, trouble := range []struct {
		errno syscall.Errno
		words string
	}{
		{syscall.EROFS, "read-only file system; mount that file system read-write"},
		{syscall.EIO, "input/output error; look for disk errors in the kernel's log"},
	} {
		// From the n-th change of the record on. The fourth makes it valid: there is a case of its own for it.
		for n := 1; n <= 3; n++ {
			failing := func() {
				count := 0
				g.judging(func(c lab.Change) error {
					if c.Disk {
						if count++; count >= n {
							return trouble.errno
						}
					}
					return nil
				})
			}
			both := func(name string, call func() error, before, after string) {
				t.Helper()
				g.doing = fmt.Sprintf("%s, %s from change %d of the record on", name, trouble.errno, n)
				if strings.HasSuffix(name, "endpoint") { // on record from Join on
					l.grant(name, call)
					return
				}
				failing()
				fails(g.doing, call, trouble.words)
				l.settles("nothing to be left half made", before)
				g.judging(nil)
				l.grant(name+" on a disk that is well again", call)
				l.settles("what the call makes", after)
			}
			for i, s := range l.steps {
				both(s.name, s.do, states[i], states[i+1])
			}
			for i, s := range slices.Backward(l.steps) {
				both("take back "+s.name, s.undo, states[i+1], states[i])
			}
		}
	}

	// A record that has to grow, and cannot.
	for _, errno := range []syscall.Errno{syscall.EROFS, syscall.EIO} {
		g.doing = fmt.Sprintf("pools, while the record's file fails to grow with %s", errno)
		g.judging(func(c lab.Change) error {
			if c.What == "ftruncate" {
				return errno
			}
			return nil
		})
		var pools []string
		request := func() error {
			var reply struct{ PoolID string }
			err := l.ask("IpamDriver.RequestPool", map[string]any{"AddressSpace": "dockway-local"}, &reply)
			if err == nil {
				pools = append(pools, reply.PoolID)
			}
			return err
		}
		var err error
		for err == nil && len(pools) < 3000 {
			err = request()
		}
		if err == nil || !strings.Contains(err.Error(), errno.Error()) {
			t.Fatalf("after %d pools: %v, want %s", len(pools), err, errno)
		}
		if record, err := g.record(); err != nil || len(record["pools"]) != len(pools) {
			t.Errorf("%d pools are on record of %d, %v", len(record["pools"]), len(pools), err)
		}
		g.judging(nil)
		l.grant("a pool on a disk that is well again", request)
		t.Logf("the record had to grow at pool %d", len(pools))
		for _, id := range pools {
			l.grant("release a pool", func() error { return l.call("IpamDriver.ReleasePool", map[string]any{"PoolID": id}) })
		}
		l.settles("nothing to be left", states[0])
	}

	// The last change of four makes the others valid, and when it fails they may be so or not.
	record := regexp.MustCompile(`(?m)^\d+ \w+ on record$`)
	for _, name := range []string{"network", "join"} {
		i := l.index(name)
		for _, s := range l.steps[:i] {
			l.grant(s.name, s.do)
		}
		g.doing = name + ", of which the last change of the record fails"
		count := 0
		g.judging(func(c lab.Change) error {
			if c.Disk {
				if count++; count == 4 {
					return syscall.EIO
				}
			}
			return nil
		})
		fails(g.doing, l.steps[i].do, "input/output error; look for disk errors in the kernel's log", "restart dockway")
		g.judging(nil)
		fails("a call after that", l.steps[i].do, "input/output error; look for disk errors in the kernel's log", "restart dockway")
		want, got := record.ReplaceAllString(states[i], ""), ""
		if err := lab.WaitFor(soon, "nothing to be left half made", func() (bool, error) {
			got = record.ReplaceAllString(g.state(), "")
			return got == want, nil
		}); err != nil {
			t.Errorf("%v: %s", err, difference(want, got))
		}
		if status, err := g.show("status"); err != nil || !strings.Contains(status, "restart dockway") {
			t.Errorf("the status says nothing of a record that takes no changes: %s, %v", status, err)
		}
		g.kill()
		g.start()
		// The engine has given up.
		l.grant("take back "+name, l.steps[i].undo)
		l.remade(i - 1)
		l.settles("nothing to be left after the restart", states[i])
		l.grant(name+" after the restart", l.steps[i].do)
		l.settles("what the call makes", states[i+1])
		for _, s := range slices.Backward(l.steps[:i+1]) {
			l.grant("take back "+s.name, s.undo)
		}
		l.settles("nothing to be left", states[0])
	}
}
