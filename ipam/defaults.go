package ipam

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// DefaultPool is a range to choose pools from.
type DefaultPool struct {
	Prefix netip.Prefix
	Size   int // prefix length of the pools cut from it; IPv4 at most 30, IPv6 at most 126
}

// String returns the form that ParsePools reads.
func (d DefaultPool) String() string { return fmt.Sprintf("%s:%d", d.Prefix, d.Size) }

// ParsePools reads a comma-separated list of default pools as in 10.64.0.0/11:24,fd00:1::/48:64, each a prefix and the size
// of the pools to cut from it. The empty list is valid.
func ParsePools(s string) ([]DefaultPool, error) {
	if strings.TrimSpace(s) == "" {
		return nil, nil
	}
	var pools []DefaultPool
	for item := range strings.SplitSeq(s, ",") {
		d, err := parsePool(strings.TrimSpace(item))
		if err != nil {
			return nil, err
		}
		pools = append(pools, d)
	}
	return pools, checkPools(pools)
}

func parsePool(s string) (DefaultPool, error) {
	slash := strings.LastIndexByte(s, '/')
	colon := strings.LastIndexByte(s, ':')
	if slash < 0 || colon < slash {
		return DefaultPool{}, fmt.Errorf("default pool %q is %w: write it as 10.64.0.0/11:24, a range and the size to cut it into", s, invalid)
	}
	prefix, err := netip.ParsePrefix(s[:colon])
	if err != nil {
		return DefaultPool{}, fmt.Errorf("default pool %q is %w: %q is no address range", s, invalid, s[:colon])
	}
	size, err := strconv.Atoi(s[colon+1:])
	if err != nil {
		return DefaultPool{}, fmt.Errorf("default pool %q is %w: %q is no prefix length", s, invalid, s[colon+1:])
	}
	return DefaultPool{prefix.Masked(), size}, nil
}

func checkPools(pools []DefaultPool) error {
	for i, d := range pools {
		if !d.Prefix.IsValid() || d.Prefix != d.Prefix.Masked() {
			return fmt.Errorf("default pool %s is %w: its range is not a network address and a length", d, invalid)
		}
		if err := checkSubnet(d.Prefix); err != nil {
			return fmt.Errorf("default pool %s: %w", d, err)
		}
		if greatest := d.Prefix.Addr().BitLen() - 2; d.Size < d.Prefix.Bits() || d.Size > greatest {
			return fmt.Errorf("default pool %s is %w: pools of /%d cannot be cut from it, only of /%d to /%d", d, invalid, d.Size, d.Prefix.Bits(), greatest)
		}
		for _, other := range pools[:i] {
			if d.Prefix.Overlaps(other.Prefix) {
				return fmt.Errorf("default pool %s is %w: it overlaps %s", d, invalid, other)
			}
		}
	}
	return nil
}

// checkSubnet refuses what can be no container's subnet.
func checkSubnet(p netip.Prefix) error {
	switch a := p.Addr(); {
	case a.Is4In6():
		return fmt.Errorf("subnet %s is %w: write an IPv4 subnet without ::ffff: in front", p, invalid)
	case a.IsUnspecified():
		return fmt.Errorf("subnet %s is %w: it does not say which addresses", p, invalid)
	case a.IsMulticast(), a.IsLoopback(), p.Overlaps(netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8)):
		return fmt.Errorf("subnet %s is %w: multicast and loopback addresses cannot be a container's", p, invalid)
	}
	return nil
}

// defaultPools returns the ranges of a configuration, with the default for each family that it does not have.
func defaultPools(cfg Config) ([]DefaultPool, error) {
	if err := checkPools(cfg.Pools); err != nil {
		return nil, err
	}
	var has4, has6 bool
	for _, d := range cfg.Pools {
		has4 = has4 || d.Prefix.Addr().Is4()
		has6 = has6 || d.Prefix.Addr().Is6()
	}
	pools := append([]DefaultPool{}, cfg.Pools...)
	if !has4 {
		// Apart from what else is chosen automatically on such hosts: Docker's 172.17.0.0 to 172.31.255.255 and
		// 192.168.0.0/16, swarm's ingress and overlay networks from 10.0.0.0 on, Kubernetes' services in 10.96.0.0/12.
		pools = append(pools, DefaultPool{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64}), 11), 24})
	}
	if !has6 && cfg.Seed != "" {
		pools = append(pools, DefaultPool{uniqueLocal(cfg.Seed), 64})
	}
	return pools, nil
}

// uniqueLocal returns the unique local /48 of a host: fd and 40 bits that are as good as random (RFC 4193, section 3.2.2, with
// SHA-256 for SHA-1, and without the time so that a host keeps its own).
func uniqueLocal(seed string) netip.Prefix {
	sum := sha256.Sum256([]byte("dockway unique local prefix of " + seed))
	b := [16]byte{0: 0xfd}
	copy(b[1:6], sum[:])
	return netip.PrefixFrom(netip.AddrFrom16(b), 48)
}
