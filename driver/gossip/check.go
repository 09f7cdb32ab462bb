package gossip

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/hashicorp/memberlist"
)

// check reports what in a Config can never work, and fills in what is left out.
func (c *Config) check() error {
	if err := CheckName(c.Name); err != nil {
		return err
	}
	if !word(c.ID, maxID) {
		return fmt.Errorf("the host's ID %q is not valid: use %s", c.ID, words(maxID))
	}
	if len(c.Version) > maxVersion {
		return fmt.Errorf("the version %q is longer than %d bytes", c.Version, maxVersion)
	}
	if err := CheckLabel(c.Label); err != nil {
		return err
	}
	if c.Port == 0 {
		return errors.New("port 0 is not possible: every host has to know it")
	}
	c.Advertise, c.Bind = c.Advertise.Unmap(), c.Bind.Unmap()
	if err := CheckAddress(c.Advertise); err != nil {
		return err
	}
	if !c.Bind.IsValid() {
		c.Bind = netip.IPv4Unspecified()
		if c.Advertise.Is6() {
			c.Bind = netip.IPv6Unspecified()
		}
	}
	for i, key := range c.Keys {
		if err := memberlist.ValidateKey(key); err != nil {
			return fmt.Errorf("key %d of %d has %d bytes: 16, 24 or 32 are possible", i+1, len(c.Keys), len(key))
		}
	}
	for _, seed := range c.Seeds {
		if err := CheckSeed(seed, c.Port); err != nil {
			return err
		}
	}
	return nil
}

// CheckName reports why a host cannot have a name.
func CheckName(name string) error {
	if !word(name, maxName) {
		return fmt.Errorf("the host's name %q is not valid: use %s", name, words(maxName))
	}
	return nil
}

func words(size int) string {
	return fmt.Sprintf("1 to %d ASCII letters, digits and signs without spaces or slashes", size)
}

func word(text string, size int) bool {
	return text != "" && len(text) <= size && !strings.ContainsFunc(text, func(r rune) bool { return r == '/' || r <= ' ' || r > '~' })
}

// CheckLabel reports why a cluster cannot have a label.
func CheckLabel(label string) error {
	switch {
	case len(label) > memberlist.LabelMaxSize:
		return fmt.Errorf("the label of the cluster has %d bytes: %d are possible", len(label), memberlist.LabelMaxSize)
	case strings.ContainsFunc(label, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("the label of the cluster %q has control characters: leave them out", label)
	}
	return nil
}

// CheckAddress reports why others can never reach a host at an address.
func CheckAddress(a netip.Addr) error {
	a = a.Unmap()
	if !reachable(a) {
		return fmt.Errorf("%s is no address to advertise: give one of this host's that the others reach, neither link-local (IPv6) nor that of a group", a)
	}
	return nil
}

// reachable reports whether an address can be that of one host to others. Sockets have to be told the
// link of a link-local one, which another host cannot know.
func reachable(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && a.Zone() == "" &&
		!(a.Is6() && a.IsLinkLocalUnicast()) && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// CheckSeed reports why no host can ever be found by a seed, which has the given port if it names none.
func CheckSeed(seed string, port uint16) error {
	_, _, err := splitSeed(seed, port)
	return err
}

// splitSeed divides "host", "host:port", "address" and "[address]:port".
func splitSeed(seed string, port uint16) (host string, _ uint16, err error) {
	host, text := seed, strconv.Itoa(int(port))
	if _, err := netip.ParseAddr(seed); err != nil {
		if h, p, err := net.SplitHostPort(seed); err == nil {
			host, text = h, p
		}
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if addr, no := netip.ParseAddr(host); no == nil {
		host = addr.Unmap().String()
		if err == nil && n > 0 && reachable(addr.Unmap()) {
			return host, uint16(n), nil
		}
	} else if err == nil && n > 0 && isDomain(host) {
		return host, uint16(n), nil
	}
	return "", 0, fmt.Errorf("%q is no seed: give an address or a name of a host, with :port if it is not %d", seed, port)
}

// isDomain reports whether a resolver looks a name up at all, and it is none that only misses to be an
// IPv4 address: no domain ends in digits (RFC 3696, section 2).
func isDomain(name string) bool {
	name = strings.TrimSuffix(name, ".")
	last := ""
	for _, label := range strings.Split(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || strings.ContainsFunc(label, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
		}) {
			return false
		}
		last = label
	}
	return len(name) <= 253 && strings.Trim(last, "0123456789") != ""
}
