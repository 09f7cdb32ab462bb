package kernel_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// TestSwitchDies ends the process after each write of a move, when the host has to be reachable, and
// after each change, where the kernel would not let it end; and lets another go on.
func TestSwitchDies(t *testing.T) {
	l := newHost(t)
	s := external("eth1")
	before, moving := hostState(t), movable(t, "eth1")
	process := func() *kernel.Kernel { return open(t, kernel.Config{}) }
	reachable := func() {
		t.Helper()
		l.answers(t, "198.18.0.2")
		l.answers(t, "fd00::2")
	}
	steps := 0
	for i := range 8 {
		resume, verb, writes := []plan.Verb{plan.Add, plan.Delete}[i%2], []plan.Verb{plan.Add, plan.Delete}[i/2%2], i < 4
		for n, done := 0, false; !done; n++ {
			// Begin with the whole.
			start := process()
			if verb == plan.Delete {
				do(t, start, add(s)...)
			} else {
				do(t, start, remove(s)...)
			}
			flush(t, start)
			k := process()
			died := k.DieAfter(n, writes)
			err := k.Do(context.Background(), []plan.Op{{Verb: verb, Object: s}})
			if done = !died(); done != (err == nil) {
				t.Fatalf("%s, %d changes: %v", verb, n, err)
			}
			steps++
			if writes {
				reachable()
			}
			next := process()
			observed := observe(t, next, s)
			if o := observed[s.Key()]; verb == plan.Add && !done && o != nil && s.Same(o) {
				t.Errorf("%s died after %d changes and is taken for whole", verb, n)
			}
			if resume == plan.Add {
				do(t, next, add(s)...)
				holds(t, next, s)
				same(t, fmt.Sprintf("%s died after %d changes, then add", verb, n), moving, movable(t, "dwx1"))
			} else {
				do(t, next, plan.Diff(observed, plan.State{})...)
				flush(t, next)
				same(t, fmt.Sprintf("%s died after %d changes, then delete", verb, n), before, hostState(t))
			}
			if writes {
				reachable()
			}
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	if steps < 100 {
		t.Errorf("only %d changes", steps)
	}
}

// TestSwitchKilled kills a process at any time.
func TestSwitchKilled(t *testing.T) {
	l := newHost(t)
	s := external("eth1")
	before, moving := hostState(t), movable(t, "eth1")
	for round := range 30 {
		child := exec.Command("/proc/self/exe")
		child.Env = append(os.Environ(), restless+"="+restlessSwitch)
		var output bytes.Buffer
		child.Stderr = &output
		if err := child.Start(); err != nil { // in the test's namespace, as its thread is
			t.Fatal(err)
		}
		looks := 0
		eventually(t, "the other process is at work", func() bool {
			if exists(t, "dwx1") {
				looks++
			}
			return looks > round
		})
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := child.Wait(); !strings.Contains(fmt.Sprint(err), "killed") {
			t.Fatalf("the other process ended by itself: %v %s", err, output.String())
		}
		l.answers(t, "198.18.0.2")
		l.answers(t, "fd00::2")
		k := open(t, kernel.Config{})
		if round%2 == 0 {
			do(t, k, add(s)...)
			holds(t, k, s)
			same(t, "killed, then add", moving, movable(t, "dwx1"))
		}
		do(t, k, plan.Diff(observe(t, k, s), plan.State{})...)
		flush(t, k)
		eventually(t, "what was unfinished is gone", func() bool { return !exists(t, "dwx1") })
		same(t, "killed, then delete", before, hostState(t))
		if t.Failed() {
			t.FailNow()
		}
	}
}

// TestSwitchIsNotReaped: a switch that holds something of the host's is not deleted, whoever says so.
func TestSwitchIsNotReaped(t *testing.T) {
	newHost(t)
	k := open(t, kernel.Config{})
	s := external("eth1")
	do(t, k, add(s)...)
	moved := movable(t, "dwx1")
	for _, group := range []string{"25719", "25720"} {
		run(t, "ip", "link", "set", "dwx1", "group", group)
		flush(t, k)
		do(t, k, add(bridge(1))...)
		do(t, k, remove(bridge(1))...)
		flush(t, k)
		if exists(t, "dwb1") {
			t.Error("what is doomed beside it is still there")
		}
		same(t, "reaped", moved, movable(t, "dwx1"))
		do(t, k, add(s)...)
		holds(t, k, s)
	}
	run(t, "ip", "link", "add", "dwx2", "group", "25719", "type", "bridge") // a process died here
	two := plan.Switch{Name: "dwx2", Alias: "dockway network=x2", Uplink: "eth2", Up: true, Moved: true}
	do(t, k, add(two)...)
	holds(t, k, s, two)
	run(t, "ip", "link", "add", "dwx3", "type", "bridge")
	three := plan.Switch{Name: "dwx3", Uplink: "eth3", Up: true, Moved: true}
	var foreign *kernel.ForeignError
	for _, op := range append(add(three), remove(three)...) {
		if err := k.Do(context.Background(), []plan.Op{op}); !errors.As(err, &foreign) {
			t.Errorf("%s: %v", op, err)
		}
	}
}
