package facts

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"
)

const many = 100_000

// cluster returns the facts of many endpoints on hosts, 100 endpoints to a VSID and half of IPv6, in
// the order of the hosts.
func cluster(hosts int) (names []Host, fs []Fact) {
	for i := range hosts {
		name := Host(fmt.Sprintf("host-%04d/%08x", i, rand.Uint32()))
		names = append(names, name)
		s := New(name, 1_760_000_000)
		for j := range many / hosts {
			n := i*(many/hosts) + j
			k := Key{Kind: Endpoint, VSID: uint32(5000 + n/100)}
			mac := [6]byte{2, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
			if j%2 == 0 {
				k.Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 32)
			} else {
				k.Prefix = netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)}), 128)
			}
			f, _ := s.Set(k, mac)
			fs = append(fs, f)
		}
	}
	return names, fs
}

func merged(fs []Fact) *State {
	s := New("self", 1)
	s.Merge(fs)
	return s
}

func BenchmarkMerge(b *testing.B) {
	_, fs := cluster(100)
	shuffled := slices.Clone(fs)
	rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	b.Run("new", func(b *testing.B) {
		for b.Loop() {
			merged(fs)
		}
	})
	b.Run("shuffled", func(b *testing.B) {
		for b.Loop() {
			merged(shuffled)
		}
	})
	b.Run("known", func(b *testing.B) {
		s := merged(fs)
		for b.Loop() {
			s.Merge(fs)
		}
	})
	b.Run("newer", func(b *testing.B) {
		s := merged(fs)
		for b.Loop() {
			for i := range fs {
				fs[i].Counter += many
				fs[i].Clock += many
				fs[i].MAC[1]++
			}
			s.Merge(fs)
		}
	})
}

func BenchmarkApply(b *testing.B) {
	_, fs := cluster(100)
	from := merged(fs)
	deltas := slices.Collect(from.Difference(nil, 64<<10))
	for b.Loop() {
		s := New("other", 1)
		for _, d := range deltas {
			if _, err := s.Apply(d); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(len(deltas)), "parts")
}

func BenchmarkDigest(b *testing.B) {
	_, fs := cluster(1000)
	s := merged(fs)
	var encoded []byte
	for b.Loop() {
		encoded = s.Digest().Append(encoded[:0])
	}
	b.ReportMetric(float64(len(encoded))/1000, "bytes/host")
	b.ReportMetric(100*float64(len(encoded))/float64(len(AppendFacts(nil, fs))), "%full")
}

func BenchmarkSum(b *testing.B) {
	_, fs := cluster(1000)
	d := merged(fs).Digest()
	for b.Loop() {
		d.Sum()
	}
}

// BenchmarkUnchanged compares two states of 1,000 hosts that know the same.
func BenchmarkUnchanged(b *testing.B) {
	_, fs := cluster(1000)
	s, d := merged(fs), merged(fs).Digest()
	b.Run("difference", func(b *testing.B) {
		for b.Loop() {
			for range s.Difference(d, 64<<10) {
				b.Fatal("something differs")
			}
		}
	})
	b.Run("behind", func(b *testing.B) {
		for b.Loop() {
			if s.Behind(d) {
				b.Fatal("something is lacking")
			}
		}
	})
}

func BenchmarkDifference(b *testing.B) {
	_, fs := cluster(100)
	s := merged(fs)
	for b.Loop() {
		n := 0
		for d := range s.Difference(nil, 64<<10) {
			n += len(d.Facts)
		}
		if n != many {
			b.Fatalf("%d facts differ", n)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	_, fs := cluster(100)
	var encoded []byte
	for b.Loop() {
		encoded = AppendFacts(encoded[:0], fs)
	}
	b.ReportMetric(float64(len(encoded))/many, "bytes/fact")
}

func BenchmarkDecode(b *testing.B) {
	_, fs := cluster(100)
	encoded := AppendFacts(nil, fs)
	for b.Loop() {
		if _, err := DecodeFacts(encoded); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		b.ReportMetric(heapOf(func() any {
			_, fs := cluster(100)
			return merged(fs)
		})/1e6, "MB")
	}
}

// heapOf returns the bytes that what a function makes holds.
func heapOf(build func() any) float64 {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	made := build()
	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(made)
	return float64(after.HeapAlloc) - float64(before.HeapAlloc)
}
