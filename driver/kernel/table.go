package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// A compiledTable is what one table of ours looks like in the kernel's own words. The same
// bytes are sent when it is made and compared when it is observed.
type compiledTable struct {
	*nft.Table
	sets   []compiledPart
	chains []compiledPart
	rules  []compiledRule // by chain, in order
}

type compiledPart struct {
	name string
	body attrs
}

type compiledRule struct {
	chain   string
	text    string
	exprs   [][]byte
	comment []byte
	sets    []anonymousSet
}

// compileTable fails when a rule says something that the kernel has no words for: a mistake in
// the rules, not in the kernel.
func compileTable(t *nft.Table) (*compiledTable, error) {
	out := &compiledTable{Table: t}
	for _, s := range t.Sets {
		body, err := compileSet(t.Name, s)
		if err != nil {
			return nil, fmt.Errorf("table %s %s: %w", t.Family, t.Name, err)
		}
		out.sets = append(out.sets, compiledPart{s.Name, body})
	}
	lastID := uint32(0)
	nextID := func() uint32 { lastID++; return lastID }
	for _, c := range t.Chains {
		body, err := compileChain(t.Name, c)
		if err != nil {
			return nil, fmt.Errorf("table %s %s: %w", t.Family, t.Name, err)
		}
		out.chains = append(out.chains, compiledPart{c.Name, body})
		for i, r := range c.Rules {
			rule, err := compileRule(t.Family, r, nextID)
			if err != nil {
				return nil, fmt.Errorf("table %s %s: chain %s: rule %d (%s): %w", t.Family, t.Name, c.Name, i+1, r, err)
			}
			rule.chain = c.Name
			out.rules = append(out.rules, rule)
		}
	}
	return out, nil
}

func compileSet(table string, s *nft.Set) (attrs, error) {
	t, err := setTypeOf(table, s)
	if err != nil {
		return nil, err
	}
	var flags uint32
	if len(t.data) > 0 {
		flags |= unix.NFT_SET_MAP
	}
	if s.Dynamic {
		flags |= unix.NFT_SET_EVAL
	}
	if s.Timeout > 0 {
		flags |= unix.NFT_SET_TIMEOUT
	}
	body := attrs{}.
		str(unix.NFTA_SET_TABLE, table).str(unix.NFTA_SET_NAME, s.Name).
		be32(unix.NFTA_SET_FLAGS, flags).
		be32(unix.NFTA_SET_KEY_TYPE, t.key.magic()).be32(unix.NFTA_SET_KEY_LEN, uint32(t.key.length()))
	if len(t.data) > 0 {
		body = body.be32(unix.NFTA_SET_DATA_TYPE, t.data.magic()).be32(unix.NFTA_SET_DATA_LEN, uint32(t.data.length()))
	}
	if s.Size > 0 {
		body = body.nest(unix.NFTA_SET_DESC, attrs{}.be32(unix.NFTA_SET_DESC_SIZE, uint32(s.Size)))
	}
	if s.Timeout > 0 {
		body = body.be64(unix.NFTA_SET_TIMEOUT, uint64(s.Timeout.Milliseconds()))
	}
	user := byteOrder(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, t.key)
	user = byteOrder(user, userdata.NFTNL_UDATA_SET_DATABYTEORDER, t.data)
	if s.Comment != "" {
		user = userdata.AppendString(user, userdata.NFTNL_UDATA_SET_COMMENT, s.Comment)
	}
	if len(user) > 0 {
		body = body.put(unix.NFTA_SET_USERDATA, user)
	}
	return body, nil
}

// byteOrder tells nft(8), which reads it back, in which byte order a simple key or value is.
func byteOrder(user []byte, what userdata.Type, t tuple) []byte {
	const host, network = 1, 2
	switch {
	case len(t) != 1:
		return user
	case t[0].host:
		return userdata.AppendUint32(user, what, host)
	}
	return userdata.AppendUint32(user, what, network)
}

var inetHooks = map[string]uint32{
	"prerouting": unix.NF_INET_PRE_ROUTING, "input": unix.NF_INET_LOCAL_IN, "forward": unix.NF_INET_FORWARD,
	"output": unix.NF_INET_LOCAL_OUT, "postrouting": unix.NF_INET_POST_ROUTING, // the bridge family's are the same
}

// policyAccept is NF_ACCEPT: what no rule of ours decides is for others to decide.
const policyAccept = 1

func compileChain(table string, c *nft.Chain) (attrs, error) {
	body := attrs{}.str(unix.NFTA_CHAIN_TABLE, table).str(unix.NFTA_CHAIN_NAME, c.Name)
	if c.Hook == "" {
		return body, nil
	}
	hook, ok := inetHooks[c.Hook]
	if !ok {
		return nil, fmt.Errorf("chain %s: hook %q is not known", c.Name, c.Hook)
	}
	return body.
		nest(unix.NFTA_CHAIN_HOOK, attrs{}.
			be32(unix.NFTA_HOOK_HOOKNUM, hook).be32(unix.NFTA_HOOK_PRIORITY, uint32(int32(c.Priority)))).
		be32(unix.NFTA_CHAIN_POLICY, policyAccept).
		str(unix.NFTA_CHAIN_TYPE, c.Type), nil
}

func compileRule(family nft.Family, r nft.Rule, nextID func() uint32) (compiledRule, error) {
	c := compiler{family: family, known: map[fact]bool{}, nextID: nextID}
	for _, s := range r.Stmts {
		if err := c.statement(s); err != nil {
			return compiledRule{}, err
		}
	}
	out := compiledRule{text: r.String(), sets: c.sets}
	for _, e := range c.exprs {
		b, err := expr.Marshal(nfFamily(family), e)
		if err != nil {
			return compiledRule{}, err
		}
		out.exprs = append(out.exprs, b)
	}
	if len(r.Comment) > commentSize {
		return compiledRule{}, fmt.Errorf("comment is longer than %d bytes", commentSize)
	}
	if r.Comment != "" {
		out.comment = userdata.AppendString(nil, userdata.TypeComment, r.Comment)
	}
	return out, nil
}

const commentSize = 127 // NFTNL_UDATA_COMMENT_MAXLEN

// messages make the table, in an order in which each finds what it names.
func (t *compiledTable) messages() []message {
	var out []message
	add := func(about string, list ...message) {
		for _, m := range list {
			m.about = about
			out = append(out, m)
		}
	}
	add("table", t.message(unix.NFT_MSG_NEWTABLE, attrs{}.str(unix.NFTA_TABLE_NAME, t.Name)))
	for _, s := range t.sets {
		add("set "+s.name, t.message(unix.NFT_MSG_NEWSET, s.body.be32(unix.NFTA_SET_ID, 0)))
	}
	for _, c := range t.chains {
		add("chain "+c.name, t.message(unix.NFT_MSG_NEWCHAIN, c.body))
	}
	for _, r := range t.rules {
		about := fmt.Sprintf("chain %s: %s", r.chain, r.text)
		for _, s := range r.sets {
			add(about, t.message(unix.NFT_MSG_NEWSET, s.declaration(t.Name)))
			add(about, elementMessages(unix.NFT_MSG_NEWSETELEM, t.Family, t.Name, s.name(), s.id, s.elements)...)
		}
		add(about, ruleMessage(t.Family, t.Name, r.chain, unix.NLM_F_APPEND, r))
	}
	return out
}

func (t *compiledTable) message(kind int, body attrs) message {
	return nftMessage(kind, unix.NLM_F_CREATE, t.Family, body)
}

func ruleMessage(family nft.Family, table, chain string, flags uint16, r compiledRule) message {
	var list attrs
	for _, e := range r.exprs {
		list = list.nest(unix.NFTA_LIST_ELEM, e)
	}
	body := attrs{}.str(unix.NFTA_RULE_TABLE, table).str(unix.NFTA_RULE_CHAIN, chain).
		nest(unix.NFTA_RULE_EXPRESSIONS, list)
	if r.comment != nil {
		body = body.put(unix.NFTA_RULE_USERDATA, r.comment)
	}
	return nftMessage(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|flags, family, body)
}

func (a anonymousSet) declaration(table string) attrs {
	flags := uint32(unix.NFT_SET_ANONYMOUS | unix.NFT_SET_CONSTANT)
	if a.verdicts {
		flags |= unix.NFT_SET_MAP
	}
	body := attrs{}.
		str(unix.NFTA_SET_TABLE, table).str(unix.NFTA_SET_NAME, a.name()).
		be32(unix.NFTA_SET_FLAGS, flags).
		be32(unix.NFTA_SET_KEY_TYPE, a.key.magic()).be32(unix.NFTA_SET_KEY_LEN, uint32(a.key.size())).
		nest(unix.NFTA_SET_DESC, attrs{}.be32(unix.NFTA_SET_DESC_SIZE, uint32(len(a.elements)))).
		be32(unix.NFTA_SET_ID, a.id)
	if a.verdicts {
		body = body.be32(unix.NFTA_SET_DATA_TYPE, unix.NFT_DATA_VERDICT)
	}
	return body.put(unix.NFTA_SET_USERDATA, byteOrder(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, tuple{a.key}))
}

// putTable makes a table, or makes it anew, in one transaction: no packet meets it without its
// rules, and the elements that its sets hold stay.
func (k *Kernel) putTable(ctx context.Context, t *nft.Table) error {
	compiled, err := compileTable(t)
	if err != nil {
		return err
	}
	// What is deleted has to be there, hence the first message.
	name := attrs{}.str(unix.NFTA_TABLE_NAME, t.Name)
	batch := append([]message{
		compiled.message(unix.NFT_MSG_NEWTABLE, name),
		nftMessage(unix.NFT_MSG_DELTABLE, 0, t.Family, name),
	}, compiled.messages()...)
	k.tables.Lock()
	defer k.tables.Unlock()
	found, err := k.findTable(ctx, t)
	if err != nil {
		return err
	}
	for _, s := range compiled.sets {
		if !slices.ContainsFunc(found.sets, func(f foundPart) bool { return f.name == s.name && sameTypes(f.body, s.body) }) {
			continue
		}
		elements, err := k.dumpElements(ctx, t.Family, t.Name, s.name)
		if err != nil {
			return err
		}
		batch = append(batch, elementMessages(unix.NFT_MSG_NEWSETELEM, t.Family, t.Name, s.name, 0, elements)...)
	}
	return k.transact(ctx, batch)
}

// sameTypes reports whether one set's elements can be the other's.
func sameTypes(a, b []byte) bool {
	for _, kind := range []uint16{unix.NFTA_SET_KEY_TYPE, unix.NFTA_SET_DATA_TYPE} {
		x, _ := attribute(a, kind)
		y, _ := attribute(b, kind)
		if !bytes.Equal(x, y) {
			return false
		}
	}
	return true
}

// deleteTable removes a table and all that it holds.
func (k *Kernel) deleteTable(ctx context.Context, t *nft.Table) error {
	k.tables.Lock()
	defer k.tables.Unlock()
	name := attrs{}.str(unix.NFTA_TABLE_NAME, t.Name)
	return k.transact(ctx, []message{
		nftMessage(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, t.Family, name),
		nftMessage(unix.NFT_MSG_DELTABLE, 0, t.Family, name),
	})
}

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
			body = body[nfgenSize:]
			table, _ := attribute(body, list.table)
			if text(table) == t.Name {
				name, _ := attribute(body, list.name)
				list.add(text(name), body)
			}
		}
	}
	return out, nil
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
