package driver

import (
	"context"
	"fmt"
	"net/netip"
	"testing"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// BenchmarkLook is a look at the kernel in which nothing differs, with endpoints on other hosts.
func BenchmarkLook(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ctx := context.Background()
			k, st, peers := newFakeKernel(), newFakeStore(), newFakePeers()
			s := newPeer(b, k, st, peers)
			req := webRequest(5)
			req.IPv4 = []mode.Subnet{{Pool: netip.MustParsePrefix("198.18.0.0/15"), Gateway: netip.MustParseAddr("198.18.0.1")}}
			if err := s.CreateNetwork(ctx, req); err != nil {
				b.Fatal(err)
			}
			for i := range n {
				peers.remotes = append(peers.remotes, mode.Remote{
					VSID: vsid, Address: netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)}),
					MAC: plan.MAC{2, 0x42, 1, byte(i >> 16), byte(i >> 8), byte(i)}, VTEP: netip.MustParseAddr("198.18.0.2"), Host: "other",
				})
			}
			// The fake kernel looks at all that it has for a link; what is wanted is there at once.
			for key, o := range s.wanted() {
				k.state[key] = o
			}
			b.ReportAllocs()
			for b.Loop() {
				if w, err := s.compare(ctx); err != nil || !w.empty() {
					b.Fatal(err, len(w.stale), len(w.parts))
				}
			}
		})
	}
}
