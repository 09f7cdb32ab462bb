package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dockway/dockway/driver/gossip/facts"
)

const (
	exchangeEvery = 10 * time.Second
	soon          = 100 * time.Millisecond // until several reasons for an exchange have come together
	retrySync     = time.Second            // until the first exchange has succeeded
	burstPause    = 100 * time.Millisecond // before the first round of a burst
	burstLast     = time.Second            // between rounds when there is no end of news
	callTimeout   = 5 * time.Second        // of one message of an exchange and its acknowledgement
	fanout        = 3
	chunk         = 256 << 10 // bytes of facts in a message, about
	bulk          = 32        // so many facts in a message are not broadcast one by one
)

// session is an exchange that this host began, while it waits for the other's part.
type session struct {
	with facts.Host
	part chan struct{} // a part came
	last chan struct{} // the last came
}

// exchange brings two hosts to the same knowledge: they compare digests, then each sends what the
// other lacks, in parts of which only one is on its way at a time. It says how many parts the
// other lacked.
func (g *Gossip) exchange(ctx context.Context, host facts.Host) (sent int, err error) {
	defer func() {
		if err != nil {
			g.failed("host "+string(host), fmt.Errorf("exchange: %w", err))
		}
	}()
	g.mu.Lock()
	sum := g.state.Digest().Sum()
	g.mu.Unlock()
	same, err := g.ask(ctx, host, opSum, sum[:])
	if err != nil {
		return 0, err
	}
	if len(same) != 1+4 {
		return 0, fmt.Errorf("its answer has %d bytes", len(same))
	}
	g.introduce(host, int(binary.BigEndian.Uint32(same[1:])))
	if same[0]&saysSame != 0 {
		g.agreed(same[0]&saysSynced != 0)
		return 0, nil
	}
	id := rand.Uint64()
	s := &session{host, make(chan struct{}, 1), make(chan struct{}, 1)}
	g.mu.Lock()
	g.sessions[id] = s
	mine := g.state.Digest()
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		delete(g.sessions, id)
		g.mu.Unlock()
	}()

	request := mine.Append(binary.BigEndian.AppendUint64(nil, id))
	answer, err := g.ask(ctx, host, opDigest, request)
	if err != nil {
		return 0, err
	}
	if len(answer) < 1 {
		return 0, errors.New("its answer is empty")
	}
	theirs, err := facts.DecodeDigest(answer[1:])
	if err != nil {
		return 0, err
	}
	if sent, err = g.push(ctx, host, id, theirs); err != nil {
		return sent, err
	}
	for more := answer[0]&saysMore != 0; more; {
		select {
		case <-s.last:
			more = false
		case <-s.part:
		case <-time.After(2 * callTimeout):
			return sent, errors.New("the rest of what it knows did not come")
		case <-ctx.Done():
			return sent, ctx.Err()
		}
	}
	g.agreed(answer[0]&saysSynced != 0)
	return sent, nil
}

// What the first byte of an answer says, as bits.
const (
	saysSame   = 1 // of a sum: the other knows the same
	saysMore   = 1 // of a digest: parts follow
	saysSynced = 2 // who answers is in sync
)

// says is that byte. mu is held.
func (g *Gossip) says(bit byte) byte {
	if g.synced {
		bit |= saysSynced
	}
	return bit
}

// agreed notes that an exchange has ended well. This host is in sync when the other was; or, where
// nobody is because all have just started, when they have had time to tell each other.
func (g *Gossip) agreed(synced bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.counts.exchanges++
	if g.synced || !synced && time.Since(g.started) < gathering {
		return
	}
	g.synced = true
	g.peersChanged()
}

// gathering is how long hosts that start at the same time wait for each other, as after a power cut:
// some rounds of exchanges.
const gathering = 15 * time.Second

// ask is call within the time that one message of an exchange has.
func (g *Gossip) ask(ctx context.Context, host facts.Host, op byte, content []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := g.call(ctx, host, op, content)
	g.mu.Lock()
	g.counts.bytes += uint64(len(content) + len(answer))
	g.mu.Unlock()
	return answer, err
}

// serveSum says whether the other knows the same, and how many hosts are alive.
func (g *Gossip) serveSum(content []byte) (byte, []byte, func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	sum, says := g.state.Digest().Sum(), g.says(0)
	if bytes.Equal(sum[:], content) {
		says = g.says(saysSame)
	}
	return statusOK, binary.BigEndian.AppendUint32([]byte{says}, uint32(g.living.Load())), nil
}

// introduce has memberlist tell another host and this one of all members, if for one of them more are alive
// and no news of that is on its way. Memberlist's broadcasts can miss a host, when many come at once, and its
// own full exchanges are minutes apart in a large cluster.
func (g *Gossip) introduce(host facts.Host, living int) {
	g.mu.Lock()
	differ, at := living != int(g.living.Load()) && !g.away, netip.AddrPort{}
	for other, p := range g.peers {
		differ = differ && time.Since(p.since) >= exchangeEvery
		if other == host {
			at = p.address()
		}
	}
	g.mu.Unlock()
	if !differ || !at.IsValid() {
		return
	}
	if _, err := g.list.Join([]string{at.String()}); err != nil {
		g.failed("host "+string(host), fmt.Errorf("tell each other of the members: %w", err))
	}
}

// serveDigest compares, answers with the own digest, and then sends what the other lacks.
func (g *Gossip) serveDigest(from facts.Host, content []byte) (byte, []byte, func()) {
	if len(content) < 8 {
		return g.malformed(from, errors.New("a digest that is cut off"))
	}
	id := binary.BigEndian.Uint64(content)
	theirs, err := facts.DecodeDigest(content[8:])
	if err != nil {
		return g.malformed(from, err)
	}
	g.mu.Lock()
	mine, parts, says, more := g.state.Digest(), g.parts(theirs), g.says(0), g.says(saysMore)
	g.mu.Unlock()
	if len(parts) == 0 {
		return statusOK, mine.Append([]byte{says}), nil
	}
	select {
	case g.pushing <- struct{}{}:
	default:
		return statusBusy, nil, nil
	}
	return statusOK, mine.Append([]byte{more}), func() {
		defer func() { <-g.pushing }()
		if err := g.pushParts(context.Background(), from, id, parts); err != nil {
			g.failed("host "+string(from), fmt.Errorf("exchange: %w", err))
		}
	}
}

// parts is what a host with that digest lacks. mu is held.
func (g *Gossip) parts(theirs facts.Digest) []facts.Delta {
	var parts []facts.Delta
	for d := range g.state.Difference(theirs, chunk) {
		parts = append(parts, d)
	}
	return parts
}

func (g *Gossip) push(ctx context.Context, host facts.Host, id uint64, theirs facts.Digest) (int, error) {
	g.mu.Lock()
	parts := g.parts(theirs)
	g.mu.Unlock()
	return len(parts), g.pushParts(ctx, host, id, parts)
}

// pushParts sends parts in their order, as many at a time as fit in a chunk: identifier, whether
// it is the last, and each with 4 bytes of length.
func (g *Gossip) pushParts(ctx context.Context, host facts.Host, id uint64, parts []facts.Delta) error {
	for len(parts) > 0 {
		content := append(binary.BigEndian.AppendUint64(nil, id), 0)
		for len(parts) > 0 && len(content) < chunk {
			at := len(content)
			content = parts[0].Append(append(content, 0, 0, 0, 0))
			binary.BigEndian.PutUint32(content[at:], uint32(len(content)-at-4))
			parts[0], parts = facts.Delta{}, parts[1:]
		}
		if len(parts) == 0 {
			content[8] = 1
		}
		if _, err := g.ask(ctx, host, opDelta, content); err != nil {
			return err
		}
	}
	return nil
}

// serveDelta takes parts, and acknowledges when it has.
func (g *Gossip) serveDelta(from facts.Host, content []byte) (byte, []byte, func()) {
	if len(content) < 9 {
		return g.malformed(from, errors.New("facts that are cut off"))
	}
	id, last, rest := binary.BigEndian.Uint64(content), content[8] != 0, content[9:]
	var deltas []facts.Delta
	for len(rest) > 0 {
		if len(rest) < 4 || uint64(len(rest)-4) < uint64(binary.BigEndian.Uint32(rest)) {
			return g.malformed(from, errors.New("facts that are cut off"))
		}
		end := 4 + int(binary.BigEndian.Uint32(rest))
		delta, err := facts.DecodeDelta(rest[4:end])
		if err != nil {
			return g.malformed(from, err)
		}
		deltas, rest = append(deltas, delta), rest[end:]
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	news := 0
	var single []facts.Fact
	var seals []facts.Delta
	for _, d := range deltas {
		if !g.hideStranger(d.Owner) {
			return g.malformed(from, fmt.Errorf("facts of more than %d hosts", maxPeers))
		}
		changes, err := g.state.Apply(d)
		if err != nil {
			return g.malformed(from, err)
		}
		g.note(changes)
		news += len(changes)
		if len(single) <= bulk {
			single = append(single, d.Facts...)
		}
		if g.newSeal(d) {
			seals = append(seals, d)
		}
	}
	if len(single)+len(seals) > bulk {
		wake(g.burst)
	} else {
		for _, d := range seals {
			g.enqueueSeal(d)
		}
		for _, f := range single {
			if f.Owner != g.self {
				g.enqueue(f)
			}
		}
	}
	g.counts.learnt += uint64(news)
	if s := g.sessions[id]; s != nil && s.with == from {
		wake(s.part)
		if last {
			wake(s.last)
		}
	}
	return statusOK, nil, nil
}

func (g *Gossip) malformed(from facts.Host, err error) (byte, []byte, func()) {
	g.refused.refuse("malformed", fmt.Sprintf("a message of %s: %v", from, err))
	return statusFailed, []byte(err.Error()), nil
}

// antiEntropy exchanges with a random peer now and then, and with those that came.
func (g *Gossip) antiEntropy(ctx context.Context) {
	next := time.NewTimer(jitter(exchangeEvery))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
			g.mu.Lock()
			hosts := g.some(1)
			g.mu.Unlock()
			g.exchangeWith(ctx, hosts)
		case <-g.kick:
			if !wait(ctx, soon) {
				return
			}
			g.mu.Lock()
			var hosts []facts.Host
			for host := range g.wanted {
				hosts = append(hosts, host)
			}
			clear(g.wanted)
			g.mu.Unlock()
			g.exchangeWith(ctx, hosts)
		}
		g.report()
		pause := exchangeEvery
		g.mu.Lock()
		if !g.synced && g.living.Load() > 1 {
			pause = retrySync
		}
		g.mu.Unlock()
		next.Reset(jitter(pause))
	}
}

// spread meets bursts: what is too much for broadcasts goes to a few at once, and those who learn
// it do the same, until a round finds nobody who lacks it.
func (g *Gossip) spread(ctx context.Context) {
	pause, ended := burstPause, time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.burst:
		}
		if time.Since(ended) > 2*burstLast {
			pause = burstPause
		}
		if !wait(ctx, jitter(pause)) {
			return
		}
		pause = min(2*pause, burstLast)
		g.mu.Lock()
		hosts := g.some(fanout)
		g.mu.Unlock()
		if g.exchangeWith(ctx, hosts) {
			wake(g.burst)
		}
		ended = time.Now()
	}
}

// exchangeWith says whether any of the others lacked something, or was too busy to say.
func (g *Gossip) exchangeWith(ctx context.Context, hosts []facts.Host) bool {
	var all sync.WaitGroup
	var lacked atomic.Bool
	for _, host := range hosts {
		all.Go(func() {
			if sent, err := g.exchange(ctx, host); sent > 0 || errors.Is(err, errBusy) {
				lacked.Store(true)
			}
		})
	}
	all.Wait()
	return lacked.Load()
}
