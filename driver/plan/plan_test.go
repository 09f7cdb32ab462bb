package plan

import (
	"fmt"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"github.com/dockway/dockway/driver/plan/nft"
)

var (
	guard = &nft.Set{Family: nft.Inet, Name: "guard", Key: []nft.Type{nft.IPv4}, Guard: true}
	open  = &nft.Set{Family: nft.Inet, Name: "open", Key: []nft.Type{nft.IPv4}}
)

// objects are some of every rank; variant makes others of the same keys.
func objects(variant int) []Object {
	return []Object{
		Element{Set: guard, Elem: "198.18.0.2"},
		Bridge{Name: "dwb1", MTU: 1500 + variant, Up: true},
		Veth{Name: "dwv1", Bridge: "dwb1", MTU: 1500 + variant, Up: true, Peer: fmt.Sprint("dwc", variant)},
		Sysctl{Name: "net/ipv4/ip_forward", Value: fmt.Sprint(variant)},
		Address{Link: "dwb1", Prefix: netip.MustParsePrefix("198.18.0.1/24")},
		HostPort{Proto: "tcp", Host: netip.MustParseAddrPort("0.0.0.0:80"), Target: netip.AddrPortFrom(netip.MustParseAddr("198.18.0.2"), uint16(80+variant))},
		Element{Set: open, Elem: "198.18.0.2", Data: fmt.Sprint(variant)},
	}
}

func draw(t *rapid.T, name string) State {
	s := State{}
	for i, o := range objects(rapid.IntRange(0, 1).Draw(t, name+" variant")) {
		if rapid.Bool().Draw(t, fmt.Sprint(name, " has ", i)) {
			s.Add(o)
		}
	}
	return s
}

// TestDiff applies the difference of any two states and gets the wanted one, in an order in which
// what goes goes first, openings before guards, and what comes comes guards first.
func TestDiff(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		observed, wanted := draw(t, "observed"), draw(t, "wanted")
		ops := Diff(observed, wanted)
		result := State{}.Merge(observed)
		coming, last := false, Rank(0)
		for i, op := range ops {
			rank := op.Object.Rank()
			if op.Verb != Delete && !coming {
				coming, last = true, 0
			} else if op.Verb == Delete && coming {
				t.Fatalf("%v removes after it added", ops)
			}
			if i > 0 && op.Verb == Delete && rank > last || coming && rank < last {
				t.Fatalf("%v is out of order", ops)
			}
			last = rank
			if op.Verb == Delete {
				delete(result, op.Object.Key())
			} else {
				result.Add(op.Object)
			}
			if op.Verb == Replace && op.Old != observed[op.Object.Key()] {
				t.Fatalf("%s replaces %v, but there is %v", op, op.Old, observed[op.Object.Key()])
			}
		}
		for key, o := range result {
			if w, ok := wanted[key]; !ok && key.Kind != KindSysctl || ok && !w.Same(o) {
				t.Fatalf("%v leaves %s", ops, o)
			}
		}
		for key := range wanted {
			if result[key] == nil {
				t.Fatalf("%v does not make %s", ops, key)
			}
		}
		if again := Diff(result, wanted); len(again) > 0 {
			t.Fatalf("after %v there is still to do: %v", ops, again)
		}
	})
}

func TestSame(t *testing.T) {
	for _, tt := range []struct {
		name             string
		wanted, observed Object
		same             bool
	}{
		{"sysctl", Sysctl{Name: "a", Value: "1"}, Sysctl{Name: "a", Value: "0"}, false},
		{"sysctl that is to change", Sysctl{Name: "a", Value: "2", From: "1"}, Sysctl{Name: "a", Value: "1"}, false},
		{"sysctl that somebody chose", Sysctl{Name: "a", Value: "2", From: "1"}, Sysctl{Name: "a", Value: "0"}, true},
		{"container's end", Veth{Name: "v", Peer: "p"}, Veth{Name: "v"}, true},
		{"host's end", Veth{Name: "v", Bridge: "b"}, Veth{Name: "v"}, false},
		{"another kind", Veth{Name: "v"}, Bridge{Name: "v"}, false},
		{"rules", Table{&nft.Table{Name: "t"}}, Table{&nft.Table{Name: "t", Chains: []*nft.Chain{{Name: "c"}}}}, false},
		{"equal rules", Table{&nft.Table{Name: "t"}}, Table{&nft.Table{Name: "t"}}, true},
	} {
		if got := tt.wanted.Same(tt.observed); got != tt.same {
			t.Errorf("%s: %s same as %s: %v, want %v", tt.name, tt.observed, tt.wanted, got, tt.same)
		}
	}
}

func TestMAC(t *testing.T) {
	var m MAC
	if err := m.UnmarshalText([]byte("02-42-ac-11-00-02")); err != nil || m.String() != "02:42:ac:11:00:02" {
		t.Errorf("got %s, %v", m, err)
	}
	if err := m.UnmarshalText([]byte("02:42")); err == nil {
		t.Error("two bytes are taken for an address")
	}
}
