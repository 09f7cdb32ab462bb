package kernel

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// Docker's chain for rules of the host's administrator, in the table that iptables-nft makes. It is
// not ours: our one rule in it is written as iptables(8) writes rules, so that it lists and saves
// it with all others.
const (
	filterTable = "filter"
	dockerUser  = "DOCKER-USER"
	admitText   = "dockway"
)

// admitRule is the rule: mark & M == M, counter, accept.
func admitRule(a plan.Admit) (compiledRule, error) {
	r, err := compileRule(nft.Family(a.Family), nft.R(admitText, nft.MarkIs{Bit: a.Mark}, nft.Accept), nil)
	if err != nil {
		return r, err
	}
	counter, err := expr.Marshal(nfFamily(nft.Family(a.Family)), &expr.Counter{})
	if err != nil {
		return r, err
	}
	last := len(r.exprs) - 1
	r.exprs = append(r.exprs[:last:last], counter, r.exprs[last])
	return r, nil
}

// admitted finds the copies of the rule in Docker's chain. iptables-restore(8) rewrites rules: the
// comment then is a match of its own, and the counter has counted.
func (k *Kernel) admitted(ctx context.Context, a plan.Admit) (handles [][]byte, chain bool, err error) {
	family := nft.Family(a.Family)
	find := nftMessage(unix.NFT_MSG_GETCHAIN, 0, family, attrs{}.str(unix.NFTA_CHAIN_TABLE, filterTable).str(unix.NFTA_CHAIN_NAME, dockerUser))
	if _, err := k.nft.request(ctx, find); errors.Is(err, unix.ENOENT) {
		return nil, false, nil
	} else if err != nil {
		return nil, false, err
	}
	want, err := admitRule(a)
	if err != nil {
		return nil, true, err
	}
	list := nftMessage(unix.NFT_MSG_GETRULE, 0, family, attrs{}.str(unix.NFTA_RULE_TABLE, filterTable).str(unix.NFTA_RULE_CHAIN, dockerUser))
	rules, err := k.nft.dump(ctx, list.kind, list.body)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, true, err
	}
	for _, rule := range rules {
		rule = nfAttributes(rule)
		if sameMatch(want.exprs, expressions(rule)) {
			handle, _ := attribute(rule, unix.NFTA_RULE_HANDLE)
			handles = append(handles, handle)
		}
	}
	return handles, true, nil
}

// sameMatch compares expressions, comments and counters left out.
func sameMatch(want, found [][]byte) bool {
	want, found = essence(want), essence(found)
	if len(want) != len(found) {
		return false
	}
	for i := range want {
		if (compiledRule{}).compareExpr(want[i], found[i], nil) != nil {
			return false
		}
	}
	return true
}

func essence(exprs [][]byte) [][]byte {
	var out [][]byte
	for _, e := range exprs {
		name, data := expression(e)
		if match, _ := attribute(data, unix.NFTA_MATCH_NAME); name == "counter" || name == "match" && text(match) == "comment" {
			continue
		}
		out = append(out, e)
	}
	return out
}

// putAdmit sees to it that the rule is there once. Where it is is left to the administrator once it
// is there; it begins at the head.
func (k *Kernel) putAdmit(ctx context.Context, a plan.Admit) error {
	handles, chain, err := k.admitted(ctx, a)
	if err != nil || !chain || len(handles) == 1 {
		return err
	}
	if len(handles) > 1 {
		return k.transact(ctx, deleteRules(a.Family, handles[1:]))
	}
	r, err := admitRule(a)
	if err != nil {
		return err
	}
	return k.transact(ctx, []message{ruleMessage(nft.Family(a.Family), filterTable, dockerUser, 0, r)})
}

func (k *Kernel) deleteAdmit(ctx context.Context, a plan.Admit) error {
	handles, _, err := k.admitted(ctx, a)
	if err != nil {
		return err
	}
	err = k.transact(ctx, deleteRules(a.Family, handles))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func deleteRules(family string, handles [][]byte) []message {
	var out []message
	for _, handle := range handles {
		out = append(out, nftMessage(unix.NFT_MSG_DELRULE, 0, nft.Family(family), attrs{}.
			str(unix.NFTA_RULE_TABLE, filterTable).str(unix.NFTA_RULE_CHAIN, dockerUser).
			put(unix.NFTA_RULE_HANDLE, handle)))
	}
	return out
}

// observeAdmit reports the rule as there when it is there once, and also when there is no chain
// that it could be in. Several copies are shown as one of mark 0, which nobody wants.
func (k *Kernel) observeAdmit(ctx context.Context, family string, out plan.State) error {
	a := plan.Admit{Family: family, Mark: k.mark}
	handles, chain, err := k.admitted(ctx, a)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", a, err)
	case !chain || len(handles) == 1:
		out.Add(a)
	case len(handles) > 1:
		out.Add(plan.Admit{Family: family})
	}
	return nil
}

// markOf is the bit that a table's rules set: the one that Admit is about.
func markOf(tables []*nft.Table) uint32 {
	for _, t := range tables {
		for _, c := range t.Chains {
			for _, r := range c.Rules {
				for _, s := range r.Stmts {
					if m, ok := s.(nft.MarkSet); ok {
						return m.Bit
					}
				}
			}
		}
	}
	return 0
}
