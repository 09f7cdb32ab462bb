package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"maps"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// told is what the running kernel lists of a namespace with one of everything that this package reads, each as the one
// message of a datagram.
func told(t testing.TB) (out [][]byte) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the namespace ends with the thread
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			k, err := New(Config{Tables: []*nft.Table{mode.InetTable(), mode.BridgeTable()}, Log: silent()})
			if err != nil {
				return err
			}
			defer k.Close()
			for line := range strings.Lines(`
				ip link set lo up
				ip link add dwb0 address 02:00:00:00:00:01 type bridge
				ip link add dwv0 type veth peer name dwc0
				ip link set dwv0 master dwb0 alias dockway up
				ip link set dwc0 up
				ip link set dwb0 up
				ip link add dwo0 type vxlan id 5001 local 192.0.2.1 dstport 14789
				ip link set dwo0 master dwb0
				bridge fdb add 02:00:00:00:00:02 dev dwo0 dst 192.0.2.2
				bridge fdb add 02:00:00:00:00:03 dev dwv0 master static
				ip link add dwm0 link dwc0 type macvlan mode bridge
				ip addr add 192.0.2.1/24 dev dwb0 label dwb0:1
				ip addr add fd00::1/64 dev dwb0 nodad valid_lft 600 preferred_lft 600
				ip neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev dwb0
				ip neigh add fd00::9 lladdr 02:00:00:00:00:09 dev dwb0
				ip neigh add proxy 192.0.2.10 dev dwb0
				ip route add 198.18.1.0/24 via 192.0.2.9 dev dwb0 src 192.0.2.1 proto 100
				ip route add 198.18.2.0/24 nexthop via 192.0.2.8 dev dwb0 nexthop via 192.0.2.9 dev dwb0 weight 2
				ip route add fd01::/64 via fd00::9 dev dwb0 proto 100
				ip route add fd02::/64 via fd00::9 dev dwb0 expires 600 table 1000
				ip nexthop add id 7 via 192.0.2.9 dev dwb0
				tc qdisc add dev dwv0 clsact`) {
				if words := strings.Fields(line); len(words) > 0 {
					if said, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
						t.Errorf("%s: %v\n%s", line, err, said)
					}
				}
			}
			ctx := context.Background()
			v0, err := k.link(ctx, "dwv0")
			if err != nil {
				return err
			}
			if err := k.install(ctx, shutFilter(v0.index), "test", passAll()); err != nil {
				return err
			}
			wanted := mode.Host([]string{"dwc0"})
			maps.DeleteFunc(wanted, func(key plan.Key, _ plan.Object) bool {
				return key.Kind != plan.KindTable && key.Kind != plan.KindElement
			})
			if err := k.Do(ctx, plan.Diff(nil, wanted)); err != nil {
				return err
			}
			family := func(family byte) []byte { return append([]byte{family}, make([]byte, unix.SizeofRtMsg-1)...) } // as long as of neighbours
			list := func(by *socket, kind uint16, body []byte) error {
				bodies, err := by.dump(ctx, kind, body)
				answer := kind - 2 // RTM_NEWLINK to RTM_GETLINK, and so on
				if by == k.nft {
					answer = kind - 1
				}
				for _, b := range bodies {
					out = append(out, appendMessage(nil, message{kind: answer, body: b}, 1))
				}
				return err
			}
			for _, l := range []struct {
				by   *socket
				kind uint16
				body []byte
			}{
				{k.route, unix.RTM_GETLINK, linkBody(0, 0, 0, nil)},
				{k.route, unix.RTM_GETADDR, addressBody(unix.AF_UNSPEC, 0, 0, nil)},
				{k.route, unix.RTM_GETROUTE, family(unix.AF_INET)},
				{k.route, unix.RTM_GETROUTE, family(unix.AF_INET6)},
				{k.route, unix.RTM_GETNEIGH, family(unix.AF_BRIDGE)},
				{k.route, unix.RTM_GETNEIGH, family(unix.AF_UNSPEC)},
				{k.route, unix.RTM_GETNEXTHOP, make([]byte, sizeofNHMsg)},
				{k.route, unix.RTM_GETQDISC, tcBody(0, 0, 0, 0, nil)},
				{k.route, unix.RTM_GETTFILTER, tcBody(v0.index, 0, hookIn, filterPriority<<16, nil)},
				{k.nft, nftMessage(unix.NFT_MSG_GETSET, 0, nft.Inet, nil).kind, nftMessage(unix.NFT_MSG_GETSET, 0, nft.Inet, attrs{}.str(unix.NFTA_SET_TABLE, "dockway")).body},
				{k.nft, nftMessage(unix.NFT_MSG_GETCHAIN, 0, nft.Inet, nil).kind, nftMessage(unix.NFT_MSG_GETCHAIN, 0, nft.Inet, attrs{}.str(unix.NFTA_CHAIN_TABLE, "dockway")).body},
				{k.nft, nftMessage(unix.NFT_MSG_GETRULE, 0, nft.Inet, nil).kind, nftMessage(unix.NFT_MSG_GETRULE, 0, nft.Inet, attrs{}.str(unix.NFTA_RULE_TABLE, "dockway")).body},
				{k.nft, nftMessage(unix.NFT_MSG_GETSETELEM, 0, nft.Inet, nil).kind, nftMessage(unix.NFT_MSG_GETSETELEM, 0, nft.Inet, attrs{}.str(unix.NFTA_SET_ELEM_LIST_TABLE, "dockway").str(unix.NFTA_SET_ELEM_LIST_SET, "uplink")).body},
			} {
				if err := list(l.by, l.kind, l.body); err != nil {
					t.Errorf("list %d: %v", l.kind, err)
				}
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		t.Fatalf("these tests need root: %v", err)
	}
	if len(out) < 100 {
		t.Fatalf("the kernel told only %d things", len(out))
	}
	return out
}

func silent() *logrus.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return logrus.NewEntry(l)
}

// reader has all that reads what the kernel tells.
type reader struct {
	k      *Kernel
	tables []*compiledTable
}

func newReader(t testing.TB) reader {
	r := reader{k: &Kernel{nft: &socket{}}}
	var err error
	if r.k.rules, err = rulesOf([]*nft.Table{mode.InetTable(), mode.BridgeTable()}); err != nil {
		t.Fatal(err)
	}
	for _, table := range r.k.tableList {
		compiled, err := compileTable(table)
		if err != nil {
			t.Fatal(err)
		}
		r.tables = append(r.tables, compiled)
	}
	return r
}

// read has each message read as everything that it could be, and fails if what comes out cannot be.
func (r reader) read(t testing.TB, datagram []byte) {
	size := 0
	for h, body := range messages(datagram) {
		size += headerSize + len(body)
		var answer reply
		answer.take(h, body)
		r.readList(t, body)
		r.readLink(t, body)
		r.readEntry(t, body)
		r.readRoute(t, body)
		r.readAddress(t, body)
		r.readRules(t, body)
		if f, ok := parseFilter(body, hookIn); ok && f.handle == 0 {
			t.Errorf("filter %+v", f)
		}
		w := &watcher{k: r.k, names: map[int32]string{1: "lo"}, ports: map[int32]string{}}
		for _, parse := range []func(unix.NlMsghdr, []byte) (event, bool){r.k.routeEvent, r.k.nftEvent} {
			if e, ok := parse(h, body); ok {
				w.note(&dirt{}, e)
			}
		}
	}
	if size > len(datagram) {
		t.Errorf("messages of %d bytes in %d", size, len(datagram))
	}
}

// readList: attributes written again are those that were read.
func (r reader) readList(t testing.TB, body []byte) {
	var again attrs
	for kind, value := range rawAttributes(body) {
		again = again.put(kind, value)
	}
	if n := len(again); n > len(body)+3 {
		t.Errorf("attributes of %d bytes in %d", n, len(body))
	}
	var twice attrs
	for kind, value := range rawAttributes(again) {
		twice = twice.put(kind, value)
	}
	if !bytes.Equal(again, twice) {
		t.Errorf("attributes %x are read from %x", twice, again)
	}
}

func (r reader) readLink(t testing.TB, body []byte) {
	l := parseLink(body)
	if l == nil {
		return
	}
	if strings.ContainsRune(l.name+l.alias+l.kind, 0) || l.nsid >= 0 && l.lower != 0 {
		t.Errorf("link %+v", l)
	}
	if l.named() && !isSwitch(l.name) && !isTransit(l.name) {
		if o := l.object("dwb0"); o.Key().Name != l.name {
			t.Errorf("link %s is shown as %s", l.name, o.Key())
		}
	}
}

// readEntry: an entry that is read, as one of ours would be, is put and read again as the same.
func (r reader) readEntry(t testing.TB, body []byte) {
	if e, ok := parseStation(body); ok && (e.bridge == 0 || body[10]&unix.NTF_SELF != 0) {
		t.Errorf("station %+v", e)
	}
	if n, ok := parseNeighbour(body); ok && !n.address.IsValid() {
		t.Errorf("neighbour %+v", n)
	}
	if n := neighbour(body); len(n) >= sizeofNDMsg {
		copyNeighbours([]neighbour{n}, &link{index: 9})
		dropNeighbours([]neighbour{n})
	}
	h, ok := parseHalf(body)
	if !ok || h.value.vtep.Zone() != "" {
		return
	}
	again, ok := parseHalf(h.key.put(&link{index: h.link, kind: kindVXLAN}, h.value).body)
	if !ok || again.key != h.key || again.value != h.value || again.link != h.link || !again.static() {
		t.Errorf("entry %+v is read as %+v when it is put", h, again)
	}
}

// readRoute: what is read of a route of ours is put so that it is read again as the same; a route of the host's that is moved
// to another link goes out by the former no more.
func (r reader) readRoute(t testing.TB, body []byte) {
	if p, ok := routePrefix(body); ok && !p.IsValid() {
		t.Errorf("a route to %v", p)
	}
	if route, ok := parseRoute(body); ok {
		a := attrs{}.put(unix.RTA_DST, route.Prefix.Addr().AsSlice()).u32(unix.RTA_OIF, uint32(route.link))
		if route.Via.IsValid() {
			a = a.put(unix.RTA_GATEWAY, route.Via.AsSlice())
		}
		if route.Source.IsValid() {
			a = a.put(unix.RTA_PREFSRC, route.Source.AsSlice())
		}
		again, ok := parseRoute(routeBody(routeFamily(route.Prefix.Addr()), route.Prefix.Bits(), 0, 0, a))
		if !ok || again != route {
			t.Errorf("route %+v is read as %+v when it is put", route, again)
		}
	}
	if len(body) < unix.SizeofRtMsg {
		return
	}
	const from, to = 2, 1 << 20
	route := hostRoute(body)
	_, _, _, _, _ = route.String(), route.slot(), route.comesAndGoes(), route.only(from), route.onLink()
	if moved := route.on(from, to).expiring(route); moved.through(from) || route.through(from) && !moved.through(to) {
		t.Errorf("route %x was moved from %d to %d: %x", body, from, to, moved)
	}
}

// readAddress: what is read of an address is put so that it is read again as the same, also on another link.
func (r reader) readAddress(t testing.TB, body []byte) {
	index, prefix, ok := parseAddress(body)
	if !ok {
		return
	}
	if !prefix.IsValid() {
		t.Errorf("an address %v", prefix)
	}
	if i, p, ok := parseAddress(addressOf(index, prefix)); !ok || i != index || p != prefix {
		t.Errorf("address %v of link %d is read as %v of link %d when it is put", prefix, index, p, i)
	}
	a := hostAddress(body)
	if i, p, ok := parseAddress(a.on(&link{name: "eth0"}, &link{name: "eth1", index: 9}, a.flags())); !ok || i != 9 || p != prefix || !a.same(a) {
		t.Errorf("address %v was moved to link 9: %v of link %d", prefix, p, i)
	}
}

// readRules: what is no table of ours is not taken for one, and elements are what their text says.
func (r reader) readRules(t testing.TB, body []byte) {
	found := &foundTable{exists: true, rules: map[string][][]byte{}}
	if name, part, ok := partOf("dockway", unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, body); ok {
		found.sets = append(found.sets, foundPart{name, part})
		found.chains = append(found.chains, foundPart{name, part})
		found.rules[name] = append(found.rules[name], part)
	}
	for _, table := range r.tables {
		if table.compare(found, func(string) ([]attrs, error) { return elementsOf(body), nil }) == nil {
			t.Error("one message is taken for a whole table")
		}
	}
	for _, rule := range found.rules {
		for _, body := range rule {
			sameMatch(essence(expressions(body)), expressions(body))
		}
	}
	for _, a := range elementsOf(body) {
		for _, s := range r.k.sets {
			e := element{set: s}
			e.key, e.data = keyAndData(a)
			o, err := e.object()
			if err != nil || !exact(s.Key) || !exact(s.Data) {
				continue
			}
			if again, err := s.element(o.Elem, o.Data); err != nil || !bytes.Equal(again.key, e.key) || !bytes.Equal(again.data, e.data) {
				t.Errorf("element %x : %x of set %s is %v, and that is %x : %x, %v", e.key, e.data, s.Name, o, again.key, again.data, err)
			}
		}
	}
}

// exact reports whether each value of the types has a text of its own: names are cut at their end, and what fills a
// concatenation up is not told.
func exact(types []nft.Type) bool {
	return len(types) < 2 && !slices.Contains(types, nft.IfName)
}

// TestShortAnswers: what the kernel tells, cut off anywhere, of no link, or with any attribute shorter than it ever is
// or with a flag, is read as something else or as nothing.
func TestShortAnswers(t *testing.T) {
	r := newReader(t)
	for _, datagram := range told(t) {
		r.read(t, datagram)
		body := datagram[headerSize:]
		kind := binary.NativeEndian.Uint16(datagram[4:])
		if len(body) >= 8 { // of no link
			none := slices.Clone(body)
			clear(none[4:8])
			r.read(t, appendMessage(nil, message{kind: kind, body: none}, 1))
		}
		for n := range body {
			r.read(t, appendMessage(nil, message{kind: kind, body: body[:n]}, 1))
		}
		for _, start := range []int{unix.SizeofIfInfomsg, unix.SizeofIfAddrmsg, unix.SizeofNdMsg, nfgenSize} {
			if start > len(body) {
				continue
			}
			for _, short := range shortened(body[start:], 0) {
				r.read(t, appendMessage(nil, message{kind: kind, body: append(slices.Clone(body[:start]), short...)}, 1))
			}
		}
	}
}

// shortened are lists of attributes of which one has a byte only, or none, or a flag, at any depth.
func shortened(list []byte, depth int) (out []attrs) {
	type attribute struct {
		kind  uint16
		value []byte
	}
	var all []attribute
	for kind, value := range rawAttributes(list) {
		all = append(all, attribute{kind, value})
	}
	with := func(at int, flags uint16, value []byte) {
		var a attrs
		for i, each := range all {
			if i == at {
				each.kind, each.value = each.kind|flags, value
			}
			a = a.put(each.kind, each.value)
		}
		out = append(out, a)
	}
	for i, each := range all {
		with(i, 0, nil)
		with(i, 0, each.value[:min(len(each.value), 1)])
		with(i, unix.NLA_F_NET_BYTEORDER, each.value)
		if depth < 3 {
			for _, inner := range shortened(each.value, depth+1) {
				with(i, 0, inner)
			}
		}
	}
	return out
}

// FuzzAnswers reads what the kernel could tell.
func FuzzAnswers(f *testing.F) {
	for _, datagram := range told(f) {
		f.Add(datagram)
	}
	r := newReader(f)
	f.Fuzz(func(t *testing.T, datagram []byte) { r.read(t, datagram) })
}

// FuzzNames reads the names that say what filters and entries are: each is the text of just what is read.
func FuzzNames(f *testing.F) {
	f.Add("dockway vlan 7 of eth0/2 on dwteth0.7/9")
	f.Add("02:00:00:00:00:01")
	f.Fuzz(func(t *testing.T, name string) {
		if tagging, ok := parseTagging(name); ok && tagging.String() != name {
			t.Errorf("%q is read as %q", name, tagging)
		}
		if a, err := netip.ParseAddr(name); err == nil && a.Zone() == "" {
			key := entryKey{address: a}
			if got := key.object("dwb0", entryValue{}).Key().Name; got != "dwb0 "+a.String() {
				t.Errorf("the entry of %s is %q", a, got)
			}
		}
	})
}

// FuzzLegacyForward reads the policy of FORWARD out of any blob of legacy iptables: it is the verdict at the place that the
// blob itself names, or an error.
func FuzzLegacyForward(f *testing.F) {
	for _, size := range []int{targetOffset4, targetOffset6} {
		rule := make([]byte, size+24+40)
		binary.NativeEndian.PutUint16(rule[size:], uint16(size+24))
		verdict := int32(-1) // drop
		binary.NativeEndian.PutUint32(rule[size+24+32:], uint32(verdict))
		f.Add(rule, uint32(0), size == targetOffset6)
		f.Add(append(make([]byte, 8), rule...), uint32(8), size == targetOffset6)
		f.Add(rule[:size], uint32(0), size == targetOffset6)
		f.Add(rule, uint32(1<<31), size == targetOffset6)
	}
	f.Fuzz(func(t *testing.T, entries []byte, underflow uint32, six bool) {
		at := targetOffset4
		if six {
			at = targetOffset6
		}
		verdict, err := forwardPolicy(entries, underflow, at)
		if err == nil && !bytes.Contains(entries, native32(uint32(int32(-verdict-1)))) {
			t.Errorf("verdict %d is nowhere in the table", verdict)
		}
	})
}
