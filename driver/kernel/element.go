package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// A setType is what is known of a named set: where it is and how its elements are written.
type setType struct {
	*nft.Set
	table     string
	key, data tuple
}

func setTypeOf(table string, s *nft.Set) (setType, error) {
	key, err := tupleOf(s.Key)
	if err != nil {
		return setType{}, fmt.Errorf("set %s: %w", s.Name, err)
	}
	data, err := tupleOf(s.Data)
	if err != nil {
		return setType{}, fmt.Errorf("set %s: %w", s.Name, err)
	}
	return setType{Set: s, table: table, key: key, data: data}, nil
}

// An element is one element of a set of ours in the kernel's bytes; text is how its key was given.
type element struct {
	set       setType
	text      string
	key, data []byte
}

// element turns an element's text into bytes.
func (s setType) element(elem, data string) (element, error) {
	e := element{set: s, text: elem}
	var err error
	if e.key, err = s.key.parse(elem); err != nil {
		return e, fmt.Errorf("set %s: %w", s.Name, err)
	}
	if len(s.data) > 0 {
		e.data, err = s.data.parse(data)
	} else if data != "" {
		err = errors.New("is no map and has no values")
	}
	if err != nil {
		return e, fmt.Errorf("set %s: %w", s.Name, err)
	}
	return e, nil
}

func (e element) attrs() attrs {
	if len(e.set.data) == 0 {
		return elementAttrs(e.key, nil)
	}
	return elementAttrs(e.key, attrs{}.put(unix.NFTA_DATA_VALUE, e.data))
}

// object is the element in text again.
func (e element) object() (plan.Element, error) {
	out := plan.Element{Set: e.set.Set, Elem: e.text}
	var err error
	if e.text == "" {
		if out.Elem, err = e.set.key.format(e.key); err != nil {
			return out, fmt.Errorf("set %s: %w", e.set.Name, err)
		}
	}
	if len(e.set.data) > 0 {
		if out.Data, err = e.set.data.format(e.data); err != nil {
			return out, fmt.Errorf("set %s: %w", e.set.Name, err)
		}
	}
	return out, nil
}

// set finds the set that an element belongs to.
func (k *Kernel) set(family, name string) (setType, error) {
	s, ok := k.sets[family+" "+name]
	if !ok {
		return s, fmt.Errorf("set %s %s is in no table of ours", family, name)
	}
	return s, nil
}

func (k *Kernel) elementOf(o plan.Element) (element, error) {
	s, err := k.set(string(o.Set.Family), o.Set.Name)
	if err != nil {
		return element{}, err
	}
	return s.element(o.Elem, o.Data)
}

// observeElements looks elements up by their keys.
func (k *Kernel) observeElements(ctx context.Context, keys []plan.Key, out plan.State) error {
	wanted := make([]element, len(keys))
	for i, key := range keys {
		parts := strings.SplitN(key.Name, " ", 3)
		if len(parts) != 3 {
			return fmt.Errorf("%s: not of the form family set element", key)
		}
		s, err := k.set(parts[0], parts[1])
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		wanted[i] = element{set: s, text: parts[2]}
		if wanted[i].key, err = s.key.parse(parts[2]); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	held, err := k.lookUp(ctx, wanted)
	if err != nil {
		return err
	}
	for _, e := range held {
		if e == nil {
			continue
		}
		o, err := e.object()
		if err != nil {
			return err
		}
		out.Add(o)
	}
	return nil
}

// lookUp returns the elements that the kernel holds under the keys given, nil for those it does not.
func (k *Kernel) lookUp(ctx context.Context, wanted []element) ([]*element, error) {
	held := make([]*element, 0, len(wanted))
	for len(wanted) > 0 {
		n := min(len(wanted), lookUps)
		requests := make([]message, n)
		for i, e := range wanted[:n] {
			requests[i] = nftMessage(unix.NFT_MSG_GETSETELEM, 0, e.set.Family, attrs{}.
				str(unix.NFTA_SET_ELEM_LIST_TABLE, e.set.table).
				str(unix.NFTA_SET_ELEM_LIST_SET, e.set.Name).
				nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, attrs{}.nest(unix.NFTA_LIST_ELEM, elementAttrs(e.key, nil))))
		}
		replies, err := k.nft.exchange(ctx, requests...)
		if err != nil {
			return nil, err
		}
		for i, r := range replies {
			var found *element
			switch {
			case errors.Is(r.err, unix.ENOENT):
			case r.err != nil:
				return nil, fmt.Errorf("look %s up in set %s: %w", wanted[i].text, wanted[i].set.Name, r.err)
			default:
				for _, body := range r.bodies {
					for _, a := range elementsOf(body) {
						e := wanted[i]
						_, e.data = keyAndData(a)
						found = &e
					}
				}
			}
			held = append(held, found)
		}
		wanted = wanted[n:]
	}
	return held, nil
}

// lookUps bounds how many answers wait to be read.
const lookUps = 64

// observeAllElements lists what all sets hold that packets do not fill.
func (k *Kernel) observeAllElements(ctx context.Context, out plan.State) error {
	for _, s := range k.sets {
		if s.Dynamic {
			continue
		}
		held, err := k.dumpElements(ctx, s.Family, s.table, s.Name)
		if err != nil {
			return fmt.Errorf("list set %s: %w", s.Name, err)
		}
		for _, a := range held {
			e := element{set: s}
			e.key, e.data = keyAndData(a)
			o, err := e.object()
			if err != nil {
				return err
			}
			out.Add(o)
		}
	}
	return nil
}

// An elementOp is an operation on an element with its bytes.
type elementOp struct {
	plan.Op
	element
}

// putElements carries out operations on elements in one transaction.
func (k *Kernel) putElements(ctx context.Context, ops []plan.Op) error {
	if len(ops) == 0 {
		return nil
	}
	all := make([]elementOp, len(ops))
	for i, op := range ops {
		e, err := k.elementOf(op.Object.(plan.Element))
		if err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		all[i] = elementOp{op, e}
	}
	k.tables.RLock()
	defer k.tables.RUnlock()
	err := k.transact(ctx, assumed(all))
	if err == nil {
		k.forget(all)
		return nil
	}
	if !surprised(err) {
		return fmt.Errorf("%s and %d more: %w", ops[0], len(ops)-1, err)
	}
	// Something is not as the plan has it: each element is looked at, and only what is needed done.
	for range surprises {
		var batch []message
		var owners []elementOp
		if batch, owners, err = k.needed(ctx, all); err != nil {
			return err
		}
		err = k.transact(ctx, batch)
		var r *refused
		if errors.As(err, &r) && r.at >= 0 && r.at < len(owners) {
			owner := owners[r.at]
			if errors.Is(err, unix.ENFILE) {
				return fmt.Errorf("%s: set %s has room for %d elements, and is full", owner.Op, owner.set.Name, owner.set.Size)
			}
			err = fmt.Errorf("%s: %w", owner.Op, err)
		}
		if err == nil {
			k.forget(all)
		}
		if !surprised(err) {
			return err
		}
	}
	return err
}

const surprises = 3

// surprised reports whether elements were there that should not be, or the reverse. A set that is full
// may be so because of them.
func surprised(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENFILE)
}

// assumed takes the plan's word for what the sets hold: runs of operations on one set become
// one message.
func assumed(ops []elementOp) []message {
	var batch []message
	for len(ops) > 0 {
		n := 1
		for n < len(ops) && ops[n].Verb == ops[0].Verb && ops[n].set.Set == ops[0].set.Set {
			n++
		}
		var gone, come []attrs
		for _, op := range ops[:n] {
			if op.Verb != plan.Add {
				gone = append(gone, elementAttrs(op.key, nil))
			}
			if op.Verb != plan.Delete {
				come = append(come, op.attrs())
			}
		}
		s := ops[0].set
		batch = append(batch, elementMessages(unix.NFT_MSG_DELSETELEM, s.Family, s.table, s.Name, 0, gone)...)
		batch = append(batch, elementMessages(unix.NFT_MSG_NEWSETELEM, s.Family, s.table, s.Name, 0, come)...)
		ops = ops[n:]
	}
	return batch
}

// needed is a message for each step that is left to do, and for each the operation it is part of.
func (k *Kernel) needed(ctx context.Context, ops []elementOp) (batch []message, owners []elementOp, err error) {
	wanted := make([]element, len(ops))
	for i, op := range ops {
		wanted[i] = op.element
	}
	held, err := k.lookUp(ctx, wanted)
	if err != nil {
		return nil, nil, err
	}
	step := func(op elementOp, kind int, a attrs) {
		batch = append(batch, elementMessages(kind, op.set.Family, op.set.table, op.set.Name, 0, []attrs{a})...)
		owners = append(owners, op)
	}
	for i, op := range ops {
		there := held[i] != nil
		equal := there && string(held[i].data) == string(op.data)
		if there && (op.Verb == plan.Delete || !equal) {
			step(op, unix.NFT_MSG_DELSETELEM, elementAttrs(op.key, nil))
		}
		if op.Verb != plan.Delete && !equal {
			step(op, unix.NFT_MSG_NEWSETELEM, op.attrs())
		}
	}
	return batch, owners, nil
}
