package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

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
	k.tables.Lock() // this process keeps still; whether others did, the generation tells
	defer k.tables.Unlock()
	for range dumpRetries {
		generation, err := k.generation(ctx)
		if err != nil {
			return err
		}
		elements, err := k.keptElements(ctx, compiled)
		if err != nil {
			return err
		}
		// What is deleted has to be there, hence the first message.
		name := attrs{}.str(unix.NFTA_TABLE_NAME, t.Name)
		batch := []message{compiled.message(unix.NFT_MSG_NEWTABLE, name), nftMessage(unix.NFT_MSG_DELTABLE, 0, t.Family, name)}
		batch = append(append(batch, compiled.messages()...), elements...)
		if err := k.transactAt(ctx, generation, batch); !errors.Is(err, unix.ERESTART) {
			return err
		}
	}
	return fmt.Errorf("rules are changed by others all the time: %w", unix.ERESTART)
}

// keptElements adds again what the table's sets hold.
func (k *Kernel) keptElements(ctx context.Context, t *compiledTable) ([]message, error) {
	found, err := k.findTable(ctx, t.Table)
	if err != nil {
		return nil, err
	}
	var out []message
	for _, s := range t.sets {
		if !slices.ContainsFunc(found.sets, func(f foundPart) bool { return f.name == s.name && sameTypes(f.body, s.body) }) {
			continue
		}
		elements, err := k.dumpElements(ctx, t.Family, t.Name, s.name)
		if err != nil {
			return nil, err
		}
		out = append(out, elementMessages(unix.NFT_MSG_NEWSETELEM, t.Family, t.Name, s.name, 0, elements)...)
	}
	return out, nil
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
	name := attrs{}.str(unix.NFTA_TABLE_NAME, t.Name)
	return k.transact(ctx, []message{
		nftMessage(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, t.Family, name),
		nftMessage(unix.NFT_MSG_DELTABLE, 0, t.Family, name),
	})
}
