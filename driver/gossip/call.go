package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// A message begins with its type. A statement is facts as they are encoded, and a seal a delta that
// has none. A request and a reply
// are: type, identifier (8 bytes), sender (1 byte of length, host), then the operation or the
// status (1 byte) and the content. They travel over TCP, each on a stream of its own that memberlist
// encrypts; operations can be repeated without harm.
const (
	msgStatement = 1
	msgRequest   = 2
	msgReply     = 3
	msgSeal      = 4
)

// The operations.
const (
	opSum     = 1 // do you know the same?
	opDigest  = 2 // compare what both know
	opDelta   = 3 // take this
	opClaim   = 4 // may I have this block?
	opUnclaim = 5 // it is not wanted any more
	opKey     = 6 // look at or change the keys
	opAway    = 7 // the sender stops in order to be back
)

// The statuses of a reply. No and Failed have a text for people as content.
const (
	statusOK      = 0
	statusNo      = 1
	statusBusy    = 2
	statusFailed  = 3
	statusUnknown = 4 // the operation is of a later version
)

// Limits of what others can make this host do.
const (
	maxServing    = 64       // requests at a time
	maxPushing    = 4        // exchanges begun by others at a time, each with a copy of what differs
	maxCalling    = 4096     // own requests at a time
	maxUnclaiming = 32       // of these, to take claims back
	maxMessage    = 4 << 20  // bytes
	maxQueued     = 48       // statements waiting to be broadcast: a host sends 200 in a second, each a dozen times
	maxRemembered = 1024     // names, reasons and the like
	maxPeers      = 16 << 10 // hosts
	introduction  = 100 * time.Millisecond
	maxPending    = 64 << 10 // changes until Take says All
)

// How several hosts are asked.
const (
	abreast  = 128                   // at a time, of those that answer
	patience = 20 * time.Millisecond // until one is taken for one that may not
)

type reply struct {
	from    facts.Host
	status  byte
	content []byte
}

var (
	errStopped  = errors.New("this host's gossip has stopped")
	errBusy     = errors.New("it is busy")
	errOverload = fmt.Errorf("%d requests of this host are under way already: try again", maxCalling)
)

// receive takes a message. It does not block: memberlist's handler of all packets may be calling.
func (g *Gossip) receive(buf []byte) {
	if len(buf) == 0 || len(buf) > maxMessage {
		g.refused.refuse("malformed", fmt.Sprintf("a message of %d bytes", len(buf)))
		return
	}
	switch buf[0] {
	case msgStatement:
		g.heard(buf[1:])
		return
	case msgSeal:
		g.heardSeal(buf[1:])
		return
	case msgRequest, msgReply:
	default:
		g.refused.refuse("unknown type", fmt.Sprintf("a message of type %d, of a later version perhaps", buf[0]))
		return
	}
	id, from, code, content, ok := decodeFrame(buf)
	if !ok {
		g.refused.refuse("malformed", "a frame that is cut off")
		return
	}
	content = bytes.Clone(content)
	if buf[0] == msgReply {
		g.mu.Lock()
		defer g.mu.Unlock()
		if ch := g.calls[id]; ch != nil {
			select {
			case ch <- reply{from, code, content}:
			default: // answered already
			}
		}
		return
	}
	select {
	case g.serving <- struct{}{}:
	default:
		g.refused.refuse("busy", "a request of "+string(from))
		return
	}
	go func() {
		defer func() { <-g.serving }()
		select {
		case <-g.ready:
		case <-g.closed:
			return
		}
		g.answer(id, from, code, content)
	}()
}

func (g *Gossip) answer(id uint64, from facts.Host, op byte, content []byte) {
	node, ok := g.node(from)
	for try := 0; !ok && try < 10; try++ { // who has just joined may ask before it is known
		select {
		case <-time.After(introduction):
		case <-g.closed:
			return
		}
		node, ok = g.node(from)
	}
	if !ok {
		g.refused.refuse("stranger", "a request of "+string(from)+", which is no living member")
		return
	}
	status, content, then := g.serve(op, from, content)
	if err := g.list.SendReliable(node, appendFrame(msgReply, id, g.self, status, content)); err != nil {
		g.failed("host "+string(from), fmt.Errorf("answer: %w", err))
	}
	if then != nil {
		then()
	}
}

// serve does what another host asks for; then, if there is any, is to be done after the answer.
func (g *Gossip) serve(op byte, from facts.Host, content []byte) (status byte, answer []byte, then func()) {
	switch op {
	case opSum:
		return g.serveSum(content)
	case opDigest:
		return g.serveDigest(from, content)
	case opDelta:
		return g.serveDelta(from, content)
	case opClaim:
		return g.serveClaim(from, content)
	case opUnclaim:
		return g.serveUnclaim(from, content)
	case opKey:
		return g.serveKey(from, content)
	case opAway:
		g.mu.Lock()
		defer g.mu.Unlock()
		if p := g.peers[from]; p != nil {
			p.meta.away = true
		}
		return statusOK, nil, nil
	}
	g.refused.refuse("unknown type", fmt.Sprintf("a request for operation %d, of a later version perhaps", op))
	return statusUnknown, nil, nil
}

// call asks a host and waits for its answer until ctx ends.
func (g *Gossip) call(ctx context.Context, host facts.Host, op byte, content []byte) ([]byte, error) {
	if host == g.self {
		status, answer, _ := g.serve(op, host, content)
		return answer, errorOf(status, answer)
	}
	node, ok := g.node(host)
	if !ok {
		return nil, fmt.Errorf("host %s is no living member", host)
	}
	id, ch := rand.Uint64(), make(chan reply, 1)
	g.mu.Lock()
	if len(g.calls) >= maxCalling {
		g.mu.Unlock()
		return nil, fmt.Errorf("ask host %s: %w", host, errOverload)
	}
	g.calls[id] = ch
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		delete(g.calls, id)
		g.mu.Unlock()
	}()
	sent := make(chan error, 1)
	go func() { sent <- g.list.SendReliable(node, appendFrame(msgRequest, id, g.self, op, content)) }()
	for {
		select {
		case err := <-sent:
			if err != nil {
				g.suspected(host)
				return nil, fmt.Errorf("ask host %s: %w", host, err)
			}
			sent = nil
		case r := <-ch:
			if r.from != host {
				return nil, fmt.Errorf("ask host %s: host %s answered", host, r.from)
			}
			return r.content, errorOf(r.status, r.content)
		case <-ctx.Done():
			return nil, fmt.Errorf("ask host %s: %w", host, ctx.Err())
		case <-g.closed:
			return nil, errStopped
		}
	}
}

// refusal is what another host said instead of yes.
type denial struct {
	status byte
	text   string
}

func (d *denial) Error() string { return d.text }

func errorOf(status byte, content []byte) error {
	text := string(content[:min(len(content), 256)])
	switch status {
	case statusOK:
		return nil
	case statusBusy:
		return errBusy
	case statusUnknown:
		text = "it does not know the request: it runs an earlier version"
	}
	return &denial{status, text}
}

// node is a living peer in memberlist's terms.
func (g *Gossip) node(host facts.Host) (*memberlist.Node, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.peers[host]
	if p == nil || !p.alive {
		return nil, false
	}
	node := p.node
	return &node, true
}

func appendFrame(kind byte, id uint64, from facts.Host, code byte, content []byte) []byte {
	b := make([]byte, 0, 11+len(from)+len(content))
	b = binary.BigEndian.AppendUint64(append(b, kind), id)
	b = append(append(b, byte(len(from))), from...)
	return append(append(b, code), content...)
}

func decodeFrame(b []byte) (id uint64, from facts.Host, code byte, content []byte, ok bool) {
	if len(b) < 9 {
		return 0, "", 0, nil, false
	}
	id = binary.BigEndian.Uint64(b[1:])
	host, rest, ok := cutBytes(b[9:])
	if !ok || len(rest) < 1 || len(host) == 0 || len(host) > maxName+maxID+1 {
		return 0, "", 0, nil, false
	}
	return id, facts.Host(host), rest[0], rest[1:], true
}
