package ipam

import (
	"math"
	"net/netip"
	"testing"
)

func TestLastAddrAndCount(t *testing.T) {
	for s, want := range map[string]struct {
		last  string
		count uint64
	}{
		"10.0.0.0/24":  {"10.0.0.255", 256},
		"10.0.0.0/8":   {"10.255.255.255", 1 << 24},
		"10.0.0.5/32":  {"10.0.0.5", 1},
		"10.0.0.4/31":  {"10.0.0.5", 2},
		"0.0.0.0/0":    {"255.255.255.255", 1 << 32},
		"fd00::/64":    {"fd00::ffff:ffff:ffff:ffff", math.MaxUint64},
		"fd00::/65":    {"fd00::7fff:ffff:ffff:ffff", 1 << 63},
		"fd00::/8":     {"fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", math.MaxUint64},
		"fd00::1/128":  {"fd00::1", 1},
		"fd00::fe/127": {"fd00::ff", 2},
	} {
		p := netip.MustParsePrefix(s)
		if got := lastAddr(p); got.String() != want.last {
			t.Errorf("last of %s: %s, want %s", s, got, want.last)
		}
		if got := count(p.Addr(), lastAddr(p)); got != want.count {
			t.Errorf("count of %s: %d, want %d", s, got, want.count)
		}
	}
	if got := count(netip.MustParseAddr("fd00::ffff:ffff:ffff:ffff"), netip.MustParseAddr("fd00:0:0:1::2")); got != 4 {
		t.Errorf("count over a border: %d, want 4", got)
	}
}
