package kernel_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// endpoint is what one endpoint of a nat network wants.
func endpoint(i int) []plan.Object {
	v := veth(i, "dwb1")
	addr := fmt.Sprintf("10.%d.%d.2", i>>8&0xff, i&0xff)
	return []plan.Object{
		plan.Element{Set: wards, Elem: addr},
		v,
		plan.Element{Set: members, Elem: "dwb1 . " + addr},
		plan.Element{Set: senders, Elem: v.Name + " . " + v.PeerMAC.String() + " . " + addr},
		plan.Element{Set: senders, Elem: v.Name + " . " + v.PeerMAC.String() + " . 0.0.0.0"},
		plan.Element{Set: stations, Elem: v.Name + " . " + v.PeerMAC.String()},
		plan.Element{Set: links, Elem: v.Name},
	}
}

func prepared(b *testing.B) *kernel.Kernel {
	inNamespace(b)
	k := open(b, kernel.Config{Tables: tables()})
	do(b, k, add(plan.Table{Table: inetTable()}, plan.Table{Table: bridgeTable()}, bridge(1))...)
	return k
}

// BenchmarkNewEndpoint is Do for a new endpoint: a port and six elements.
func BenchmarkNewEndpoint(b *testing.B) {
	k := prepared(b)
	i := 0
	for b.Loop() {
		do(b, k, add(endpoint(i)...)...)
		if i++; i%500 == 0 {
			b.StopTimer()
			for j := i - 500; j < i; j++ {
				do(b, k, remove(endpoint(j)...)...)
			}
			flush(b, k)
			b.StartTimer()
		}
	}
}

// BenchmarkObserveEndpoint is Observe of the same with 500 endpoints there.
func BenchmarkObserveEndpoint(b *testing.B) {
	k := prepared(b)
	for i := range 500 {
		do(b, k, add(endpoint(i)...)...)
	}
	keys := plan.Of(endpoint(7)...).Keys()
	for b.Loop() {
		if s, err := k.Observe(context.Background(), keys); err != nil || len(s) != len(keys) {
			b.Fatal(s, err)
		}
	}
}

func BenchmarkElement(b *testing.B) {
	k := prepared(b)
	for _, n := range []int{0, 10_000} {
		do(b, k, add(manyPorts(n)...)...)
		one := plan.Element{Set: ports, Elem: "192.0.2.9 . udp . 53", Data: "10.0.0.2 . 53"}
		b.Run(fmt.Sprintf("observe-of-%d", n), func(b *testing.B) {
			for b.Loop() {
				observe(b, k, one)
			}
		})
		b.Run(fmt.Sprintf("add-to-%d", n), func(b *testing.B) {
			for b.Loop() {
				do(b, k, add(one)...)
			}
		})
		do(b, k, remove(one)...)
	}
}

func BenchmarkTenThousandElements(b *testing.B) {
	k := prepared(b)
	many := manyPorts(10_000)
	for b.Loop() {
		do(b, k, add(many...)...)
		do(b, k, remove(many...)...)
	}
}

func BenchmarkObserveAll(b *testing.B) {
	k := prepared(b)
	for i := range 500 {
		do(b, k, add(endpoint(i)...)...)
	}
	for b.Loop() {
		observeAll(b, k)
	}
}

func BenchmarkTable(b *testing.B) {
	k := prepared(b)
	table := plan.Table{Table: inetTable()}
	b.Run("observe", func(b *testing.B) {
		for b.Loop() {
			observe(b, k, table)
		}
	})
	b.Run("replace", func(b *testing.B) {
		for b.Loop() {
			do(b, k, replace(table)...)
		}
	})
}

// BenchmarkDeleteLinks is 500 ports made and deleted.
func BenchmarkDeleteLinks(b *testing.B) {
	k := prepared(b)
	var all []plan.Object
	for i := range 500 {
		all = append(all, veth(i, "dwb1"))
	}
	for b.Loop() {
		b.StopTimer()
		do(b, k, add(all...)...)
		b.StartTimer()
		do(b, k, remove(all...)...)
		flush(b, k)
	}
}
