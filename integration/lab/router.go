package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
)

// Router is a machine that forwards IPv4 and IPv6 between its links, and from a link back to the
// same one: it tells nobody of a shorter way (ICMP redirect). It counts what it forwards.
type Router struct {
	*Machine
	plugs []attachment
	rules int
}

type attachment struct {
	lan  *LAN
	link string
}

// Router makes a router that is not on any LAN yet.
func (l *Lab) Router(name string) (*Router, error) {
	m, err := l.Machine(name)
	if err != nil {
		return nil, err
	}
	// Links take over the default when they are made. IPv6 has no setting against redirects.
	_, err = m.Script(`
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
for c in all default; do sysctl -qw net.ipv4.conf.$c.send_redirects=0 net.ipv4.conf.$c.rp_filter=0; done
nft -f - <<.
table inet lab {
	set pairs4 { type ipv4_addr . ipv4_addr; size 65535; flags dynamic; }
	set pairs6 { type ipv6_addr . ipv6_addr; size 65535; flags dynamic; }
	chain count {
		type filter hook forward priority 100
		add @pairs4 { ip saddr . ip daddr counter }
		add @pairs6 { ip6 saddr . ip6 daddr counter }
	}
	chain redirects {
		type filter hook output priority 0
		icmpv6 type nd-redirect drop
	}
}
.`)
	return &Router{Machine: m}, err
}

// Plug connects the router to a segment.
func (r *Router) Plug(n *LAN, link string, addresses ...string) error {
	r.plugs = append(r.plugs, attachment{n, link})
	return n.Plug(r.Machine, link, addresses...)
}

// Die makes the router silent: all its cables are cut. What it knows stays.
func (r *Router) Die() error {
	var err error
	for _, p := range r.plugs {
		err = errors.Join(err, p.lan.Cut(r.Machine, p.link))
	}
	return err
}

// Revive ends what Die began.
func (r *Router) Revive() error {
	var err error
	for _, p := range r.plugs {
		err = errors.Join(err, p.lan.Mend(r.Machine, p.link))
	}
	return err
}

// Forwarded is the number of packets from one address to another that the router has passed on.
func (r *Router) Forwarded(from, to string) (int, error) {
	a, err := netip.ParseAddr(from)
	if err != nil {
		return 0, err
	}
	b, err := netip.ParseAddr(to)
	if err != nil {
		return 0, err
	}
	set := "pairs4"
	if a.Is6() {
		set = "pairs6"
	}
	out, err := r.Run("nft", "list", "set", "inet", "lab", set)
	if err != nil {
		return 0, err
	}
	return packets(out, regexp.QuoteMeta(a.String()+" . "+b.String()+" "))
}

// Rule is what a router or a segment drops.
type Rule struct {
	machine       *Machine
	family, chain string
}

// Drop makes the router drop what it would forward and nft's expression fits ("ip saddr 198.18.0.7
// ip daddr 198.18.0.8"), until the rule is removed.
func (r *Router) Drop(expression string) (*Rule, error) {
	r.rules++
	rule := &Rule{r.Machine, "inet", "drop" + strconv.Itoa(r.rules)}
	return rule, rule.add(expression)
}

func (r *Rule) add(expression string) error {
	_, err := r.machine.Script(fmt.Sprintf(`nft -f - <<.
table %s lab {
	chain %s {
		type filter hook forward priority 0
		%s counter drop
	}
}
.`, r.family, r.chain, expression))
	return err
}

// Dropped is the number of packets that the rule has dropped.
func (r *Rule) Dropped() (int, error) {
	out, err := r.machine.Run("nft", "list", "chain", r.family, "lab", r.chain)
	if err != nil {
		return 0, err
	}
	return packets(out, "")
}

// Remove ends the rule.
func (r *Rule) Remove() error {
	_, err := r.machine.Run("nft", "delete", "chain", r.family, "lab", r.chain)
	return err
}

// packets reads the counter that comes after a text in nft's listing, 0 if the text is not there.
func packets(listing, after string) (int, error) {
	found := regexp.MustCompile(`(?:\s|^)` + after + `counter packets (\d+)`).FindStringSubmatch(listing)
	if found == nil {
		return 0, nil
	}
	return strconv.Atoi(found[1])
}
