package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan/nft"
)

// nfFamily is the kernel's number of an nftables family.
func nfFamily(f nft.Family) byte {
	switch f {
	case nft.Inet:
		return unix.NFPROTO_INET
	case nft.Bridge:
		return unix.NFPROTO_BRIDGE
	case "ip":
		return unix.NFPROTO_IPV4
	case "ip6":
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_UNSPEC
}

// nftMessage is a request to nf_tables, see the kernel's linux/netfilter/nf_tables.h.
func nftMessage(kind int, flags uint16, f nft.Family, body attrs) message {
	return message{kind: nftKind(kind), flags: flags, body: append(nfgen(nfFamily(f), 0), body...)}
}

func nftKind(kind int) uint16 { return uint16(unix.NFNL_SUBSYS_NFTABLES<<8 | kind) }

// nfgen is struct nfgenmsg: every netfilter message begins with it.
func nfgen(family byte, resource uint16) []byte {
	return binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
}

const nfgenSize = 4

// refused says which message of a transaction the kernel refused.
type refused struct {
	at  int
	err error
}

func (r *refused) Error() string { return r.err.Error() }
func (r *refused) Unwrap() error { return r.err }

// generation is the number of the last transaction, of anybody.
func (k *Kernel) generation(ctx context.Context) (uint32, error) {
	bodies, err := k.nft.request(ctx, nftMessage(unix.NFT_MSG_GETGEN, 0, "", nil))
	if err != nil {
		return 0, err
	}
	if len(bodies) == 0 {
		return 0, errors.New("the kernel does not tell the generation of its rules")
	}
	id, _ := attribute(nfAttributes(bodies[0]), unix.NFTA_GEN_ID)
	return value(id, false), nil
}

// transact has all messages take effect at once, or none. A refusal is a *refused, whose index
// is -1 when it was not about one message.
func (k *Kernel) transact(ctx context.Context, messages []message) error {
	return k.transactAt(ctx, 0, messages)
}

// transactAt is transact on condition that nobody has changed anything since a generation: else it
// fails with ERESTART.
func (k *Kernel) transactAt(ctx context.Context, generation uint32, messages []message) error {
	if len(messages) == 0 {
		return nil
	}
	batch := make([]message, 0, len(messages)+2)
	border := message{body: nfgen(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES), quiet: true}
	border.kind = unix.NFNL_MSG_BATCH_BEGIN
	if generation != 0 {
		border.body = attrs(border.body).be32(unix.NFNL_BATCH_GENID, generation)
	}
	batch = append(batch, border)
	border.body = border.body[:nfgenSize:nfgenSize]
	for _, m := range messages {
		m.quiet = true
		batch = append(batch, m)
	}
	last := &batch[len(messages)]
	last.quiet, last.flags = false, last.flags|unix.NLM_F_ACK
	border.kind = unix.NFNL_MSG_BATCH_END
	batch = append(batch, border)
	for range dumpRetries {
		replies, err := k.nft.exchange(ctx, batch...)
		if err != nil {
			return err
		}
		err = nil
		for i, r := range replies {
			if r.err != nil {
				err = &refused{at: i - 1, err: r.err}
				if about := batch[i].about; about != "" {
					err = &refused{at: i - 1, err: fmt.Errorf("%s: %w", about, r.err)}
				}
				break
			}
		}
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return err
		}
	}
	return fmt.Errorf("interrupted %d times: %w", dumpRetries, unix.EAGAIN)
}

// elementMessages adds or deletes elements of one set, as few messages as their size allows.
func elementMessages(kind int, family nft.Family, table, set string, id uint32, elements []attrs) []message {
	var out []message
	for len(elements) > 0 {
		var list attrs
		for len(elements) > 0 && len(list)+len(elements[0]) < elementsSize {
			list = list.nest(unix.NFTA_LIST_ELEM, elements[0])
			elements = elements[1:]
		}
		body := attrs{}.str(unix.NFTA_SET_ELEM_LIST_TABLE, table).str(unix.NFTA_SET_ELEM_LIST_SET, set)
		if id != 0 {
			body = body.be32(unix.NFTA_SET_ELEM_LIST_SET_ID, id)
		}
		body = body.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, list)
		out = append(out, nftMessage(kind, unix.NLM_F_CREATE, family, body))
	}
	return out
}

// elementsSize bounds a list of elements: an attribute holds less than 64 KiB.
const elementsSize = 48 << 10

// dumpElements lists a set's elements as the kernel writes them. A set that is not there has none.
func (k *Kernel) dumpElements(ctx context.Context, family nft.Family, table, set string) ([]attrs, error) {
	m := nftMessage(unix.NFT_MSG_GETSETELEM, 0, family, attrs{}.
		str(unix.NFTA_SET_ELEM_LIST_TABLE, table).
		str(unix.NFTA_SET_ELEM_LIST_SET, set))
	bodies, err := k.nft.dump(ctx, m.kind, m.body)
	// A set that is not there may have been made anew under way, with its table.
	for retries := 0; errors.Is(err, unix.ENOENT); retries++ {
		before, failure := k.generation(ctx)
		if failure != nil {
			return nil, failure
		}
		bodies, err = k.nft.dump(ctx, m.kind, m.body)
		after, failure := k.generation(ctx)
		if failure != nil {
			return nil, failure
		}
		if errors.Is(err, unix.ENOENT) && (before == after || retries == dumpRetries) {
			return nil, nil
		}
	}
	var out []attrs
	for _, body := range bodies {
		out = append(out, elementsOf(body)...)
	}
	return out, err
}

// nfAttributes is what follows struct nfgenmsg.
func nfAttributes(body []byte) []byte { return body[min(nfgenSize, len(body)):] }

// elementsOf cuts the elements out of a NFT_MSG_NEWSETELEM.
func elementsOf(body []byte) []attrs {
	var out []attrs
	list, _ := attribute(nfAttributes(body), unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	for kind, element := range attributes(list) {
		if kind == unix.NFTA_LIST_ELEM {
			out = append(out, attrs(element))
		}
	}
	return out
}

// keyAndData are an element's bytes.
func keyAndData(element []byte) (key, data []byte) {
	if k, ok := attribute(element, unix.NFTA_SET_ELEM_KEY); ok {
		key, _ = attribute(k, unix.NFTA_DATA_VALUE)
	}
	if d, ok := attribute(element, unix.NFTA_SET_ELEM_DATA); ok {
		data, _ = attribute(d, unix.NFTA_DATA_VALUE)
	}
	return key, data
}
