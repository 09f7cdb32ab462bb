package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// A foundTable is a table as the kernel lists it.
type foundTable struct {
	exists bool
	sets   []foundPart
	chains []foundPart
	rules  map[string][][]byte // by chain
}

type foundPart struct {
	name string
	body []byte
}

func (k *Kernel) findTable(ctx context.Context, t *nft.Table) (*foundTable, error) {
	out := &foundTable{rules: map[string][][]byte{}}
	m := nftMessage(unix.NFT_MSG_GETTABLE, 0, t.Family, attrs{}.str(unix.NFTA_TABLE_NAME, t.Name))
	if _, err := k.nft.request(ctx, m); errors.Is(err, unix.ENOENT) {
		return out, nil
	} else if err != nil {
		return nil, err
	}
	out.exists = true
	lists := []struct {
		kind        int
		table, name uint16
		add         func(name string, body []byte)
	}{
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, func(name string, body []byte) {
			out.sets = append(out.sets, foundPart{name, body})
		}},
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, func(name string, body []byte) {
			out.chains = append(out.chains, foundPart{name, body})
		}},
		{unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, func(chain string, body []byte) {
			out.rules[chain] = append(out.rules[chain], body)
		}},
	}
	for _, list := range lists {
		m := nftMessage(list.kind, 0, t.Family, attrs{}.str(list.table, t.Name))
		bodies, err := k.nft.dump(ctx, m.kind, m.body)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, err
		}
		for _, body := range bodies {
			if name, part, ok := partOf(t.Name, list.table, list.name, body); ok {
				list.add(name, part)
			}
		}
	}
	return out, nil
}

// partOf is the name of a part in a list, and the part, if it is of a table.
func partOf(table string, tableKind, nameKind uint16, body []byte) (name string, part []byte, ok bool) {
	part = nfAttributes(body)
	in, _ := attribute(part, tableKind)
	is, _ := attribute(part, nameKind)
	return text(is), part, text(in) == table
}

// observeTable returns the wanted table when the kernel holds exactly it, nothing when there is
// none, and else a table whose text says where it departs.
func (k *Kernel) observeTable(ctx context.Context, t *nft.Table) (plan.Object, error) {
	compiled, err := compileTable(t)
	if err != nil {
		return nil, err
	}
	found, err := k.findTable(ctx, t)
	if err != nil || !found.exists {
		return nil, err
	}
	anonymous := func(name string) ([]attrs, error) { return k.dumpElements(ctx, t.Family, t.Name, name) }
	if err := compiled.compare(found, anonymous); err != nil {
		return plan.Table{Table: &nft.Table{Family: t.Family, Name: t.Name, Chains: []*nft.Chain{{Name: "departs: " + err.Error()}}}}, nil
	}
	return plan.Table{Table: t}, nil
}

// compare says where the table that was found departs from the one that is wanted.
func (t *compiledTable) compare(found *foundTable, elements func(set string) ([]attrs, error)) error {
	var named []foundPart
	for _, s := range found.sets {
		flags, _ := attribute(s.body, unix.NFTA_SET_FLAGS)
		if value(flags, false)&unix.NFT_SET_ANONYMOUS == 0 {
			named = append(named, s)
		}
	}
	if err := compareParts("set", t.sets, named, setHandle, setBackend, setCount); err != nil {
		return err
	}
	if err := compareParts("chain", t.chains, found.chains, unix.NFTA_CHAIN_HANDLE, unix.NFTA_CHAIN_USE, chainFlags); err != nil {
		return err
	}
	next := map[string]int{}
	for _, r := range t.rules {
		i := next[r.chain]
		next[r.chain]++
		if i >= len(found.rules[r.chain]) {
			return fmt.Errorf("chain %s lacks rule %d", r.chain, i+1)
		}
		if err := r.compare(found.rules[r.chain][i], elements); err != nil {
			return fmt.Errorf("chain %s rule %d: %w", r.chain, i+1, err)
		}
	}
	for chain, rules := range found.rules {
		if len(rules) > next[chain] {
			return fmt.Errorf("chain %s has %d rules too many", chain, len(rules)-next[chain])
		}
	}
	return nil
}

// What the kernel adds to its lists, of linux/netfilter/nf_tables.h.
const (
	setHandle  = 16 // NFTA_SET_HANDLE
	setBackend = 19 // NFTA_SET_TYPE: which implementation the kernel chose
	setCount   = 20 // NFTA_SET_COUNT: how many elements there are
	chainFlags = 10 // NFTA_CHAIN_FLAGS: a base chain or not
)

// compareParts compares what was sent with what is listed, some attributes of the list left out.
func compareParts(what string, wanted []compiledPart, found []foundPart, ignore ...uint16) error {
	byName := map[string][]byte{}
	for _, f := range found {
		byName[f.name] = f.body
	}
	for _, w := range wanted {
		body, ok := byName[w.name]
		if !ok {
			return fmt.Errorf("%s %s is missing", what, w.name)
		}
		if !covers(body, w.body, ignore...) {
			return fmt.Errorf("%s %s is different", what, w.name)
		}
		delete(byName, w.name)
	}
	for name := range byName {
		return fmt.Errorf("%s %s is not ours", what, name)
	}
	return nil
}

func (r compiledRule) compare(found []byte, elements func(set string) ([]attrs, error)) error {
	if comment, _ := attribute(found, unix.NFTA_RULE_USERDATA); !bytes.Equal(comment, r.comment) {
		return errors.New("another comment")
	}
	list := expressions(found)
	if len(list) != len(r.exprs) {
		return fmt.Errorf("%d expressions, not %d", len(list), len(r.exprs))
	}
	for i, want := range r.exprs {
		if err := r.compareExpr(want, list[i], elements); err != nil {
			return fmt.Errorf("expression %d: %w", i+1, err)
		}
	}
	return nil
}

func (r compiledRule) compareExpr(want, found []byte, elements func(set string) ([]attrs, error)) error {
	name, data := expression(want)
	foundName, foundData := expression(found)
	if name != foundName {
		return fmt.Errorf("%s, not %s", foundName, name)
	}
	var ignore []uint16
	switch name {
	case "lookup":
		// A lookup names its set; an anonymous one is known by what it holds.
		id, _ := attribute(data, unix.NFTA_LOOKUP_SET_ID)
		if s := r.anonymous(id); s != nil {
			set, _ := attribute(foundData, unix.NFTA_LOOKUP_SET)
			held, err := elements(text(set))
			if err != nil {
				return err
			}
			if !sameElements(s.elements, held) {
				return errors.New("another set of values")
			}
			ignore = append(ignore, unix.NFTA_LOOKUP_SET)
		}
		ignore = append(ignore, unix.NFTA_LOOKUP_SET_ID)
	case "dynset":
		ignore = append(ignore, unix.NFTA_DYNSET_SET_ID)
	case "nat":
		ignore = append(ignore, unix.NFTA_NAT_FLAGS) // the kernel's own, by what else is given
	}
	if !covers(foundData, data, ignore...) {
		return fmt.Errorf("another %s", name)
	}
	return nil
}

func (r compiledRule) anonymous(id []byte) *anonymousSet {
	for i := range r.sets {
		if bytes.Equal(id, binaryutil.BigEndian.PutUint32(r.sets[i].id)) {
			return &r.sets[i]
		}
	}
	return nil
}

// sameElements compares two sets of elements in any order.
func sameElements(wanted, found []attrs) bool {
	if len(wanted) != len(found) {
		return false
	}
	for _, w := range wanted {
		if !slices.ContainsFunc(found, func(f attrs) bool { return covers(f, w) }) {
			return false
		}
	}
	return true
}

// expressions cuts a rule into its expressions.
func expressions(rule []byte) [][]byte {
	var out [][]byte
	list, _ := attribute(rule, unix.NFTA_RULE_EXPRESSIONS)
	for kind, e := range attributes(list) {
		if kind == unix.NFTA_LIST_ELEM {
			out = append(out, e)
		}
	}
	return out
}

// expression is one expression's name and attributes.
func expression(e []byte) (name string, data []byte) {
	n, _ := attribute(e, unix.NFTA_EXPR_NAME)
	data, _ = attribute(e, unix.NFTA_EXPR_DATA)
	return text(n), data
}

// covers reports whether the kernel lists what was sent: the same attributes, but for those that
// are zero, of which either side may be silent.
func covers(listed, sent []byte, ignore ...uint16) bool {
	for kind, want := range rawAttributes(sent) {
		nested := kind&unix.NLA_F_NESTED != 0
		kind &^= unix.NLA_F_NESTED
		if slices.Contains(ignore, kind) {
			continue
		}
		got, ok := attribute(listed, kind)
		same := bytes.Equal(got, want)
		if nested {
			same = covers(got, want)
		}
		if !same && (ok || !isZero(want)) {
			return false
		}
	}
	for kind, got := range attributes(listed) {
		if _, ok := attribute(sent, kind); !ok && !slices.Contains(ignore, kind) && !isZero(got) {
			return false
		}
	}
	return true
}

func isZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
