package kernel_test

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

func TestManyLinks(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{})
	const n = 500
	all := []plan.Object{bridge(1)}
	for i := range n {
		all = append(all, veth(i, "dwb1"))
	}
	do(t, k, add(all...)...)
	if got := observeAll(t, k); len(got) != n+1 {
		t.Errorf("%d of %d links", len(got), n+1)
	}
	do(t, k, remove(all...)...)
	if got := observeAll(t, k); len(got) > 0 {
		t.Errorf("%d links are still observed", len(got))
	}
	eventually(t, "all links are gone", func() bool { return len(linkNames(t)) == 1 })
}

func TestLeftovers(t *testing.T) {
	inNamespace(t)
	first := open(t, kernel.Config{})
	do(t, first, add(bridge(1), veth(1, "dwb1"), bridge(2))...)
	// Left by a process that died: one that is doomed, one that was born and never finished. Not
	// ours: one that somebody put into the group.
	const doomed = "25719"
	run(t, "ip", "link", "set", "dwv1", "group", doomed)
	run(t, "ip", "link", "add", "dwv2", "group", doomed, "type", "veth", "peer", "dwc2")
	run(t, "ip", "link", "add", "eth1", "group", doomed, "type", "bridge")
	run(t, "ip", "link", "add", "dwv3", "group", doomed, "type", "bridge")
	run(t, "ip", "link", "set", "dwv3", "alias", "somebody's")
	open(t, kernel.Config{})
	eventually(t, "leftovers are reaped", func() bool { return !exists(t, "dwv1") && !exists(t, "dwv2") })
	for _, name := range []string{"dwb1", "dwb2", "eth1", "dwv3"} {
		if !exists(t, name) {
			t.Errorf("%s was deleted", name)
		}
	}
	// The same with something foreign in the very group that is deleted.
	const dying = "25720"
	run(t, "ip", "link", "set", "eth1", "group", dying)
	do(t, first, add(veth(1, "dwb1"))...)
	do(t, first, remove(veth(1, "dwb1"), bridge(2))...)
	flush(t, first)
	if exists(t, "dwv1") || exists(t, "dwb2") || !exists(t, "eth1") {
		t.Errorf("left: %s", linkNames(t))
	}
	// Routes of what is doomed are as good as gone.
	do(t, first, add(bridge(2), address("dwb2", "10.2.0.1/24"))...)
	do(t, first, remove(bridge(2))...)
	if routes, err := first.Routes(context.Background()); err != nil || strings.Contains(fmt.Sprint(routes), "10.2.0.0/24") {
		t.Errorf("routes %v, %v", routes, err)
	}
	// A name that is taken by something unfinished is free.
	run(t, "ip", "link", "add", "dwb3", "group", doomed, "type", "bridge")
	do(t, first, add(bridge(3))...)
	holds(t, first, bridge(3))
}

func TestSideBySide(t *testing.T) {
	inNamespace(t)
	config := kernel.Config{Tables: tables()}
	kernels := []*kernel.Kernel{open(t, config), open(t, config)}
	do(t, kernels[0], add(plan.Table{Table: inetTable()}, plan.Table{Table: bridgeTable()})...)
	var wg sync.WaitGroup
	for i := range 8 {
		k := kernels[i%2]
		wg.Go(func() {
			b, name := bridge(i), fmt.Sprintf("dwb%d", i)
			for round := range 5 {
				v := veth(100*i+round, name)
				objects := []plan.Object{
					b, v, address(name, fmt.Sprintf("10.%d.0.1/24", i)),
					plan.Element{Set: wards, Elem: fmt.Sprintf("10.%d.0.%d", i, round)},
					plan.Element{Set: anyPort, Elem: fmt.Sprintf("tcp . %d", 100*i+round), Data: "10.0.0.1 . 80"},
				}
				if err := k.Do(context.Background(), add(objects...)); err != nil {
					t.Error(err)
				}
				if i == 0 {
					if err := k.Do(context.Background(), replace(plan.Table{Table: inetTable()})); err != nil {
						t.Error(err)
					}
				}
				got, err := k.ObserveAll(context.Background(), nil)
				if err != nil {
					t.Error(err)
				}
				for _, o := range objects {
					if got[o.Key()] == nil || !o.Same(got[o.Key()]) {
						t.Errorf("lost: %s", o)
					}
				}
				if err := k.Do(context.Background(), remove(objects[4], objects[3], objects[2], v, b)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	flush(t, kernels[0])
	if got := linkNames(t); len(got) != 1 {
		t.Errorf("left behind: %s", got)
	}
}

func TestNothingLeaks(t *testing.T) {
	inNamespace(t)
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	for range 5 {
		k, err := kernel.New(kernel.Config{Tables: tables()})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		if _, err := k.Watch(ctx); err != nil { // ends with the Kernel
			t.Fatal(err)
		}
		do(t, k, add(plan.Table{Table: inetTable()}, bridge(1))...)
		do(t, k, remove(bridge(1), plan.Table{Table: inetTable()})...)
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	}
	eventually(t, fmt.Sprintf("there are %d goroutines again", goroutines), func() bool { return runtime.NumGoroutine() <= goroutines })
	eventually(t, fmt.Sprintf("there are %d open files again", files), func() bool { return openFiles(t) <= files })
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range list {
		if to, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && (strings.HasPrefix(to, "socket:") || strings.Contains(to, "net:[")) {
			n++
		}
	}
	return n
}
