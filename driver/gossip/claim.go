package gossip

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

const (
	claimTimeout = time.Second            // for each to answer: who has not by then has no say
	claimAsk     = 400 * time.Millisecond // of a question, before it is asked once more
	grantHolds   = 5 * time.Second        // a block that this host let another have, until the other states it
	lentHolds    = time.Minute            // the same of an address out of a block of this host's
	listening    = 20 * time.Millisecond  // between two looks whether somebody has been met
)

var errUnacquainted = errors.New("this host has just started, and no other has told it yet what is taken: try again in some seconds")

// claim is a block that a host asks the others for.
type claim struct {
	subnet, block netip.Prefix
	number        uint64 // later claims of a host have higher ones
	rank          [sha256.Size]byte
	lost          facts.Host // who asked for the like with a lower rank
}

// grant is a block that this host let another have.
type grant struct {
	claim
	to    facts.Host
	until time.Time
	void  bool // taken back; the claim may still be on its way
}

// TakenError says that a block is another host's, or that another host is to have it.
type TakenError struct {
	Subnet, Block netip.Prefix
	Holder        facts.Host
	Reason        string
}

func (e *TakenError) Error() string {
	return fmt.Sprintf("block %s of subnet %s is not free: host %s %s", e.Block, e.Subnet, e.Holder, e.Reason)
}

// IsTaken says whether a claim failed because of another host, and of which.
func IsTaken(err error) (holder facts.Host, taken bool) {
	var e *TakenError
	if errors.As(err, &e) {
		return e.Holder, true
	}
	return "", false
}

// Claim makes a block of a subnet this host's. Every member that is alive or suspect is asked; it
// fails with an error that IsTaken knows if one of them holds or is about to get part of it. A member
// that cannot be reached has no say: two halves of a partition can take the same block, which shows
// in Status when they meet. A single address inside a block of another host's is granted by that
// host alone, if it is not in use there. Asking takes a second at most, and 20 ms more for every 128 that do not answer; if
// ctx ends before all have answered, the claim fails. A host that has just started first waits until it has met another; where there is still none after
// 15 s, it takes itself for cut off. What is this host's already is fine, unless a living host has part of it too and wins.
func (g *Gossip) Claim(ctx context.Context, subnet, block netip.Prefix) error {
	subnet, block = subnet.Masked(), block.Masked()
	if !subnet.IsValid() || !block.IsValid() || !covers(subnet, block) {
		return fmt.Errorf("claim: %s is no part of subnet %s", block, subnet)
	}
	g.mu.Lock()
	mine, ok := g.own(subnet, block)
	ok = ok && mine.Prefix == block
	winner, lost := g.beaten(mine)
	g.mu.Unlock()
	switch {
	case ok && lost:
		return &TakenError{subnet, block, winner.Owner, "has " + winner.Prefix.String() + " and goes first"}
	case ok:
		return nil
	}
	if err := g.acquainted(ctx); err != nil {
		return fmt.Errorf("claim block %s of subnet %s: %w", block, subnet, err)
	}
	g.mu.Lock()
	g.claimed = max(g.claimed+1, uint64(time.Now().UnixNano())) // so that they go on after a restart
	c := &claim{subnet: subnet, block: block, number: g.claimed, rank: rank(g.self, subnet, block)}
	lenders, err := g.lenders(c)
	if err != nil {
		g.mu.Unlock()
		return err
	}
	for _, other := range g.claims {
		if overlap(other, c) {
			g.mu.Unlock()
			return &TakenError{subnet, block, g.self, "is claiming it already"}
		}
	}
	g.claims = append(g.claims, c)
	hosts := g.some(len(g.peers))
	g.mu.Unlock()

	asked, err := g.askAll(ctx, hosts, c, lenders)

	g.mu.Lock()
	g.claims = slices.DeleteFunc(g.claims, func(other *claim) bool { return other == c })
	if err == nil && c.lost != "" {
		err = &TakenError{subnet, block, c.lost, "claims it too and goes first"}
	}
	if err == nil { // somebody may have been heard of in between
		_, err = g.lenders(c)
	}
	if err == nil {
		f, changes := g.state.Set(blockKey(subnet, block), [6]byte{})
		g.note(changes)
		g.stated(f)
	}
	g.mu.Unlock()
	if err != nil {
		go g.unclaim(asked, c)
	}
	return err
}

// acquainted waits until this host has compared with another what they know. Before that it knows neither
// whom to ask, nor what those have who cannot be asked.
func (g *Gossip) acquainted(ctx context.Context) error {
	for {
		g.mu.Lock()
		met := g.counts.exchanges > 0 || time.Since(g.started) >= gathering
		g.mu.Unlock()
		switch {
		case met || g.Synced():
			return nil
		case !wait(ctx, listening):
			return errUnacquainted
		}
	}
}

// lenders are the hosts inside whose blocks the claimed address is: they have to agree. It fails if
// part of what is claimed is another's. mu is held.
func (g *Gossip) lenders(c *claim) ([]facts.Host, error) {
	var lenders []facts.Host
	for _, f := range g.holders(c.subnet, c.block) {
		switch {
		case f.Owner == g.self:
		case c.block.IsSingleIP() && !f.Prefix.IsSingleIP():
			lenders = append(lenders, f.Owner)
		default:
			return nil, &TakenError{c.subnet, c.block, f.Owner, "has " + f.Prefix.String()}
		}
	}
	return lenders, nil
}

// askAll asks the hosts, all at once, until one of them refuses, and says whom it asked.
func (g *Gossip) askAll(ctx context.Context, hosts []facts.Host, c *claim, lenders []facts.Host) (asked []facts.Host, err error) {
	asking, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex
	var failed error
	fail := func(err error) error { return fmt.Errorf("claim block %s of subnet %s: %w", c.block, c.subnet, err) }
	end := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if failed == nil {
			failed = err
		}
		cancel()
	}
	refuse := func(holder facts.Host, reason string) {
		end(&TakenError{c.subnet, c.block, holder, reason})
	}
	content := encodeClaim(c)
	g.each(hosts, func(host facts.Host) {
		if asking.Err() != nil {
			return
		}
		asking, done := context.WithTimeout(asking, claimTimeout)
		defer done()
		mu.Lock()
		asked = append(asked, host)
		mu.Unlock()
		err := g.askOne(asking, host, content)
		no := (*denial)(nil)
		switch {
		case err == nil:
		case errors.As(err, &no) && no.status == statusNo:
			holder, reason, ok := cutBytes([]byte(no.text))
			if !ok || len(holder) == 0 {
				holder = []byte(host)
			}
			refuse(facts.Host(holder), string(reason))
		case errors.Is(err, errOverload), errors.Is(err, errStopped): // it was not asked
			end(fail(err))
		case slices.Contains(lenders, host):
			refuse(host, "has it in a block of its own, and did not answer")
		}
	})
	if failed != nil {
		return asked, failed
	}
	if ctx.Err() != nil { // who has not answered yet may be about to refuse
		return asked, fail(ctx.Err())
	}
	return asked, nil
}

func (g *Gossip) askOne(ctx context.Context, host facts.Host, content []byte) error {
	for try := 0; ; try++ {
		asking, cancel := ctx, context.CancelFunc(func() {})
		if try == 0 {
			asking, cancel = context.WithTimeout(ctx, claimAsk)
		}
		_, err := g.call(asking, host, opClaim, content)
		cancel()
		no := (*denial)(nil)
		if err == nil || try > 0 || ctx.Err() != nil || errors.As(err, &no) {
			return err
		}
		wait(ctx, rand.N(claimAsk/4))
	}
}

// unclaim tells those who may have agreed, also without an answer so far, that nothing came of it. All that
// is taken back shares some requests: the next claims need the others.
func (g *Gossip) unclaim(hosts []facts.Host, c *claim) {
	ctx, cancel := context.WithTimeout(context.Background(), grantHolds)
	defer cancel()
	content := encodeClaim(c)
	g.each(hosts, func(host facts.Host) {
		select {
		case g.unclaiming <- struct{}{}:
			defer func() { <-g.unclaiming }()
		case <-ctx.Done():
			return
		}
		asking, cancel := context.WithTimeout(ctx, claimTimeout)
		defer cancel()
		_, _ = g.call(asking, host, opUnclaim, content) // the grant ends by itself
	})
}

// serveClaim lets another host have a block, or not.
func (g *Gossip) serveClaim(from facts.Host, content []byte) (byte, []byte, func()) {
	asked, ok := decodeClaim(content)
	if !ok {
		return g.malformed(from, errors.New("a claim that cannot be read"))
	}
	if holder, reason := g.consider(from, asked); holder != "" {
		return statusNo, append(append([]byte{byte(len(holder))}, holder...), reason...), nil
	}
	return statusOK, nil, nil
}

// consider says who has the block, and how, or grants it.
func (g *Gossip) consider(from facts.Host, asked *claim) (holder facts.Host, reason string) {
	asked.rank = rank(from, asked.subnet, asked.block)
	g.mu.Lock()
	defer g.mu.Unlock()
	now, same := time.Now(), ofHost(from, asked.subnet, asked.block)
	g.grants = slices.DeleteFunc(g.grants, func(other grant) bool { return now.After(other.until) })
	if slices.ContainsFunc(g.grants, func(other grant) bool { return same(other) && other.void && asked.number <= other.number }) {
		return from, "has taken that claim back"
	}
	f, held := g.own(asked.subnet, asked.block)
	lend := held && asked.block.IsSingleIP() && !f.Prefix.IsSingleIP() && g.config.Busy != nil
	if held && !lend {
		return g.self, "has " + f.Prefix.String()
	}
	for _, mine := range g.claims {
		if !overlap(mine, asked) {
			continue
		}
		if bytes.Compare(mine.rank[:], asked.rank[:]) < 0 {
			return g.self, "claims it too and goes first"
		}
		mine.lost = from
	}
	for _, other := range g.grants {
		switch {
		case other.void || other.to == from || !overlap(&other.claim, asked):
		case asked.block.IsSingleIP() && !other.block.IsSingleIP(): // that host is asked too
		case lend || bytes.Compare(other.rank[:], asked.rank[:]) < 0:
			return other.to, "was let have " + other.block.String() + " by host " + string(g.self)
		}
	}
	holds := grantHolds
	if lend {
		holds = lentHolds
	}
	if !g.remember(grant{*asked, from, now.Add(holds), false}) {
		return g.self, "has too many claims to remember"
	}
	if lend {
		g.mu.Unlock()
		busy := g.config.Busy(asked.subnet, asked.block)
		g.mu.Lock()
		if busy {
			g.ungrant(from, asked)
			return g.self, "uses it"
		}
	}
	return "", ""
}

func (g *Gossip) serveUnclaim(from facts.Host, content []byte) (byte, []byte, func()) {
	c, ok := decodeClaim(content)
	if !ok {
		return g.malformed(from, errors.New("a claim that cannot be read"))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.remember(grant{*c, from, time.Now().Add(grantHolds), true})
	return statusOK, nil, nil
}

// remember keeps what there is between this host and another about a block, of which the latest claim counts: each
// claim, and what takes it back, comes by a stream of its own, and they can overtake each other. It fails if
// there is no room. mu is held.
func (g *Gossip) remember(latest grant) bool {
	same := ofHost(latest.to, latest.subnet, latest.block)
	if i := slices.IndexFunc(g.grants, same); i >= 0 {
		switch last := &g.grants[i]; {
		case latest.number >= last.number:
			*last = latest
		case !latest.void:
			last.until = latest.until
		}
		return true
	}
	if len(g.grants) >= maxRemembered {
		g.grants = slices.DeleteFunc(g.grants, func(other grant) bool { return other.void })
	}
	if len(g.grants) >= maxRemembered {
		return false
	}
	g.grants = append(g.grants, latest)
	return true
}

// ungrant takes a grant back, unless it is of a later claim: the host can have claimed the block again
// meanwhile. mu is held.
func (g *Gossip) ungrant(to facts.Host, c *claim) {
	same := ofHost(to, c.subnet, c.block)
	g.grants = slices.DeleteFunc(g.grants, func(other grant) bool { return same(other) && other.number <= c.number })
}

// ofHost tells the grants of a block to a host.
func ofHost(to facts.Host, subnet, block netip.Prefix) func(grant) bool {
	return func(g grant) bool { return g.to == to && g.subnet == subnet && g.block == block }
}

// settle ends a grant when its block has been stated or taken back. mu is held.
func (g *Gossip) settle(change facts.Change) {
	for _, f := range []facts.Fact{change.Before, change.After} {
		if f.Owner != "" && f.Owner != g.self {
			g.grants = slices.DeleteFunc(g.grants, ofHost(f.Owner, change.Subnet, change.Prefix))
		}
	}
}

// Release gives a block of this host's back.
func (g *Gossip) Release(subnet, block netip.Prefix) {
	g.Delete(blockKey(subnet.Masked(), block.Masked()))
}

// Blocks are the blocks of a subnet, of all hosts that are not dead.
func (g *Gossip) Blocks(subnet netip.Prefix) []facts.Fact {
	return g.Holder(subnet, subnet)
}

// Holder gives the blocks of a subnet that overlap a prefix: those that are stated, and those that
// this host has just let another have.
func (g *Gossip) Holder(subnet, prefix netip.Prefix) []facts.Fact {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.holders(subnet.Masked(), prefix.Masked())
}

func (g *Gossip) holders(subnet, prefix netip.Prefix) []facts.Fact {
	list := slices.DeleteFunc(g.state.Holder(subnet, prefix), func(f facts.Fact) bool {
		return g.succeeded(f.Owner) // so it is stated by the new name, or not at all
	})
	now := time.Now()
	for _, other := range g.grants {
		if !other.void && other.subnet == subnet && other.block.Overlaps(prefix) && now.Before(other.until) {
			list = append(list, facts.Fact{Key: blockKey(subnet, other.block), Owner: other.to})
		}
	}
	return list
}

// own is a block of this host's that overlaps another. mu is held.
func (g *Gossip) own(subnet, block netip.Prefix) (facts.Fact, bool) {
	found, ok := facts.Fact{}, false
	for _, f := range g.state.Holder(subnet, block) {
		if f.Owner == g.self && (!ok || f.Prefix == block) {
			found, ok = f, true
		}
	}
	return found, ok
}

// beaten finds the block of a living host that wins against one of this host's, as they can meet after a partition.
// mu is held.
func (g *Gossip) beaten(mine facts.Fact) (winner facts.Fact, lost bool) {
	for _, c := range g.conflicts() {
		for _, f := range c.Facts[:max(0, slices.Index(c.Facts, mine))] {
			if f.Owner != g.self && f.Prefix.Overlaps(mine.Prefix) && f.Prefix.IsSingleIP() == mine.Prefix.IsSingleIP() {
				return f, true
			}
		}
	}
	return facts.Fact{}, false
}

func blockKey(subnet, block netip.Prefix) facts.Key {
	return facts.Key{Kind: facts.Block, Subnet: subnet, Prefix: block}
}

func covers(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

func overlap(a, b *claim) bool { return a.subnet == b.subnet && a.block.Overlaps(b.block) }

// rank decides between two claims at a time, the same way at every host.
func rank(host facts.Host, subnet, block netip.Prefix) [sha256.Size]byte {
	return sha256.Sum256(appendBlock([]byte(host+"\x00"), subnet, block))
}

func encodeClaim(c *claim) []byte {
	return binary.AppendUvarint(appendBlock(nil, c.subnet, c.block), c.number)
}

func appendBlock(b []byte, subnet, block netip.Prefix) []byte {
	for _, prefix := range []netip.Prefix{subnet, block} {
		text := prefix.String()
		b = append(binary.AppendUvarint(b, uint64(len(text))), text...)
	}
	return b
}

func decodeClaim(b []byte) (*claim, bool) {
	c := &claim{}
	for _, out := range []*netip.Prefix{&c.subnet, &c.block} {
		text, rest, ok := cutBytes(b)
		if !ok {
			return nil, false
		}
		prefix, err := netip.ParsePrefix(string(text))
		if err != nil || prefix != prefix.Masked() {
			return nil, false
		}
		*out, b = prefix, rest
	}
	number, read := binary.Uvarint(b)
	c.number = number
	return c, read > 0 && covers(c.subnet, c.block)
}
