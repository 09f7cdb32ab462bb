package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// FDB and neighbour entries come by the hundred thousand, so they are written in batches of
// messages, and never one by one.
const entryBatch = 256

// An entryKey is an FDB entry of a port, by MAC, or a neighbour entry of a link, by address.
type entryKey struct {
	mac     plan.MAC
	address netip.Addr // invalid: an FDB entry
}

// An entryValue is what an entry says: the host of an FDB entry of a VXLAN device, or the MAC of a
// neighbour.
type entryValue struct {
	vtep  netip.Addr
	mac   plan.MAC
	since uint64 // when this was done, of what is believed
}

// keyAndValue are those of an FDB or neighbour entry of the plan, and its link.
func keyAndValue(o plan.Object) (link string, key entryKey, value entryValue) {
	switch o := o.(type) {
	case plan.FDB:
		return o.Link, entryKey{mac: o.MAC}, entryValue{vtep: o.VTEP}
	case plan.Neighbour:
		return o.Link, entryKey{address: o.Address}, entryValue{mac: o.MAC}
	}
	return "", key, value
}

// object is the plan's view of an entry.
func (key entryKey) object(link string, value entryValue) plan.Object {
	if key.address.IsValid() {
		return plan.Neighbour{Link: link, Address: key.address, MAC: value.mac}
	}
	return plan.FDB{Link: link, MAC: key.mac, VTEP: value.vtep}
}

// Of an FDB entry on a VXLAN device there are two halves: one of the bridge, which says that the
// device is the port (NTF_MASTER), and one of the device, which says on which host it is (NTF_SELF).
// On other ports there is the bridge's alone.
const (
	staticFDB = unix.NUD_NOARP                      // of the bridge; permanent ones are its own addresses
	remoteFDB = unix.NUD_NOARP | unix.NUD_REACHABLE // of both: the device refuses the one alone, and lets the other expire
)

// fdbBody is struct ndmsg and attributes.
func fdbBody(index int32, state uint16, flags byte, mac plan.MAC) []byte {
	b := append([]byte{unix.AF_BRIDGE, 0, 0, 0}, native32(uint32(index))...)
	b = binary.NativeEndian.AppendUint16(b, state)
	b = append(b, flags, 0)
	return append(b, attrs{}.put(unix.NDA_LLADDR, mac[:])...)
}

// put writes an entry over whatever is there.
func (key entryKey) put(l *link, value entryValue) message {
	m := message{kind: unix.RTM_NEWNEIGH, flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE}
	switch {
	case key.address.IsValid():
		m.body = attrs(neighbourBody(l.index, unix.NUD_PERMANENT, 0, key.address)).put(unix.NDA_LLADDR, value.mac[:])
	case value.vtep.IsValid():
		m.body = attrs(fdbBody(l.index, remoteFDB, unix.NTF_SELF|unix.NTF_MASTER, key.mac)).put(unix.NDA_DST, value.vtep.AsSlice())
	default:
		m.body = fdbBody(l.index, staticFDB, unix.NTF_MASTER, key.mac)
	}
	return m
}

// remove deletes an entry: each half by itself, because the one may be there without the other.
func (key entryKey) remove(l *link) []message {
	if key.address.IsValid() {
		return []message{{kind: unix.RTM_DELNEIGH, body: neighbourBody(l.index, 0, 0, key.address)}}
	}
	out := []message{{kind: unix.RTM_DELNEIGH, body: fdbBody(l.index, 0, unix.NTF_MASTER, key.mac)}}
	if l.kind == kindVXLAN {
		out = append(out, key.removeRemote(l))
	}
	return out
}

// removeRemote deletes the device's half of an FDB entry, wherever it leads.
func (key entryKey) removeRemote(l *link) message {
	return message{kind: unix.RTM_DELNEIGH, body: fdbBody(l.index, 0, unix.NTF_SELF, key.mac)}
}

// A mapping is an operation on an entry.
type mapping struct {
	plan.Op
	link  *link
	key   entryKey
	value entryValue
}

func (m mapping) messages() []message {
	if m.Verb == plan.Delete {
		return m.key.remove(m.link)
	}
	put := m.key.put(m.link, m.value)
	// By replace, the kernel gives an entry of a host another. One of a nexthop group, as others may have
	// made it, it leaves as it is; such a one is observed as one of no host.
	old, ok := m.Old.(plan.FDB)
	if ok && !old.VTEP.IsValid() && m.link.kind == kindVXLAN {
		return []message{m.key.removeRemote(m.link), put}
	}
	return []message{put}
}

// doEntries carries out operations on FDB and neighbour entries.
func (k *Kernel) doEntries(ctx context.Context, ops []plan.Op) error {
	todo, err := k.mappings(ctx, ops)
	if err != nil {
		return err
	}
	for len(todo) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(len(todo), entryBatch)
		// Noted before, so that Watch knows the kernel's events for what they are, and after, for an
		// observation that was made in between.
		k.believed.mapped(todo[:n])
		if err := k.putEntries(ctx, todo[:n]); err != nil {
			return err
		}
		k.believed.mapped(todo[:n])
		k.shortenEntries(todo[:n])
		k.hearers.follow(ctx)
		todo = todo[n:]
	}
	return nil
}

// mappings looks the links up. What is to be deleted from a link that is not there is gone.
func (k *Kernel) mappings(ctx context.Context, ops []plan.Op) ([]mapping, error) {
	links := map[string]*link{}
	out := make([]mapping, 0, len(ops))
	for _, op := range ops {
		name, key, value := keyAndValue(op.Object)
		l, known := links[name]
		if !known {
			var err error
			if l, err = k.mine(ctx, name); err != nil {
				return nil, fmt.Errorf("%s: %w", op, err)
			}
			if l != nil && !k.maps(l, key) {
				return nil, fmt.Errorf("%s: entries of the host's links are the host's, and no plan may name them", op)
			}
			links[name] = l
		}
		switch {
		case l != nil:
			out = append(out, mapping{op, l, key, value})
		case op.Verb != plan.Delete:
			return nil, fmt.Errorf("%s: link %s: %w", op, name, unix.ENODEV)
		}
	}
	return out, nil
}

// putEntries carries operations out in one go. Only failures are answered, and the last message: what
// is answered before that, has failed.
func (k *Kernel) putEntries(ctx context.Context, todo []mapping) error {
	var batch []message
	var owners []mapping
	for _, m := range todo {
		for _, message := range m.messages() {
			message.quiet = true
			batch = append(batch, message)
			owners = append(owners, m)
		}
	}
	last := &batch[len(batch)-1]
	last.quiet, last.flags = false, last.flags|unix.NLM_F_ACK
	replies, err := k.route.exchange(ctx, batch...)
	if err != nil {
		return err
	}
	for i, r := range replies {
		if r.err == nil || batch[i].kind == unix.RTM_DELNEIGH && noEntry(r.err) {
			continue
		}
		return fmt.Errorf("%s: %w", owners[i].Op, r.err)
	}
	return nil
}

// noEntry reports whether an entry is not there, or the port or the table that it would be in.
func noEntry(err error) bool {
	return isGone(err) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)
}

const ndaNextHop = 13 // NDA_NH_ID of linux/neighbour.h

// A half is what one message of the kernel says of an entry.
type half struct {
	link  int32
	key   entryKey
	value entryValue
	state uint16
	self  bool // the VXLAN device's half of an FDB entry, or that of another device, which is none
	plain bool // of an FDB entry: it says no more than a host, such as another UDP port
}

// static reports whether the entry stays, as those of ours do.
func (h half) static() bool {
	switch {
	case h.key.address.IsValid():
		return h.state&unix.NUD_PERMANENT != 0
	case h.self:
		return h.state&(unix.NUD_PERMANENT|unix.NUD_NOARP) != 0
	}
	return h.state == staticFDB
}

// parseHalf reads struct ndmsg and attributes of an entry of a bridge's, a VXLAN device's or a
// neighbour table.
func parseHalf(body []byte) (h half, ok bool) {
	if len(body) < unix.SizeofNdMsg {
		return h, false
	}
	fdb := body[0] == unix.AF_BRIDGE
	h.link = int32(binary.NativeEndian.Uint32(body[4:]))
	h.state = binary.NativeEndian.Uint16(body[8:])
	h.self = fdb && body[10]&unix.NTF_SELF != 0
	h.plain = true
	var address netip.Addr
	var mac plan.MAC
	for kind, value := range attributes(body[unix.SizeofNdMsg:]) {
		switch kind {
		case unix.NDA_DST:
			address, _ = netip.AddrFromSlice(value)
		case unix.NDA_LLADDR:
			ok = copy(mac[:], value) == len(mac)
		case unix.NDA_VLAN, unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX, unix.NDA_SRC_VNI, ndaNextHop:
			h.plain = false
		}
	}
	if fdb {
		h.key.mac, h.value.vtep = mac, address
		return h, ok && h.link != 0
	}
	h.key.address, h.value.mac = address, mac
	return h, address.IsValid() && h.link != 0
}

// found is what there is of an entry: of one of an FDB, by halves.
type found struct {
	value  entryValue
	bridge bool // the bridge's half, or that of a neighbour table
	device bool // the VXLAN device's
	odd    bool // which says more than a host
}

func (f *found) add(h half, vxlan bool) {
	switch {
	case h.key.address.IsValid():
		if h.static() {
			f.value, f.bridge = h.value, true
		}
	case !h.self:
		f.bridge = f.bridge || h.static()
	case vxlan:
		f.odd = f.odd || f.device || !h.plain || !h.static()
		f.value, f.device = h.value, true
	}
}

// entry is what the plan says of it: of no host, if it is not as it should be; ok is false when there
// is nothing.
func (f found) entry() (value entryValue, ok bool) {
	value = f.value
	if !f.bridge || f.odd {
		value.vtep = netip.Addr{}
	}
	return value, f.bridge || f.device
}

// A lookup is an entry that is looked for.
type lookup struct {
	link *link
	key  entryKey
}

// requests ask for the halves.
func (q lookup) requests() []message {
	if q.key.address.IsValid() {
		return []message{{kind: unix.RTM_GETNEIGH, body: neighbourBody(q.link.index, 0, 0, q.key.address)}}
	}
	out := []message{{kind: unix.RTM_GETNEIGH, body: fdbBody(q.link.index, 0, unix.NTF_MASTER, q.key.mac)}}
	if q.link.kind == kindVXLAN {
		out = append(out, message{kind: unix.RTM_GETNEIGH, body: fdbBody(q.link.index, 0, unix.NTF_SELF, q.key.mac)})
	}
	return out
}

// lookUpEntries tells what there is of each entry.
func (k *Kernel) lookUpEntries(ctx context.Context, wanted []lookup) ([]found, error) {
	out := make([]found, len(wanted))
	var batch []message
	var owners []int
	flush := func() error {
		replies, err := k.route.exchange(ctx, batch...)
		if err != nil {
			return err
		}
		for i, r := range replies {
			q := wanted[owners[i]]
			if r.err != nil {
				// EINVAL: the link is no port.
				if noEntry(r.err) || errors.Is(r.err, unix.EINVAL) {
					continue
				}
				return fmt.Errorf("look up %s: %w", q.key.object(q.link.name, entryValue{}), r.err)
			}
			for _, body := range r.bodies {
				// The bridge tells behind which port a MAC is, and it may be another.
				if h, ok := parseHalf(body); ok && h.link == q.link.index {
					out[owners[i]].add(h, q.link.kind == kindVXLAN)
				}
			}
		}
		batch, owners = batch[:0], owners[:0]
		return nil
	}
	for i, q := range wanted {
		for _, m := range q.requests() {
			batch, owners = append(batch, m), append(owners, i)
		}
		if len(batch) >= lookUps || i == len(wanted)-1 {
			if err := flush(); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// observeEntryKeys looks FDB and neighbour entries up by their keys.
func (k *Kernel) observeEntryKeys(ctx context.Context, keys []plan.Key, out plan.State) error {
	if len(keys) == 0 {
		return nil
	}
	parsed := make([]entryKey, len(keys))
	names := make([]string, len(keys))
	links := map[string]*link{}
	for i, key := range keys {
		var text string
		var err error
		names[i], text, _ = strings.Cut(key.Name, " ")
		if key.Kind == plan.KindFDB {
			err = parsed[i].mac.UnmarshalText([]byte(text))
		} else {
			parsed[i].address, err = netip.ParseAddr(text)
		}
		if err != nil {
			return fmt.Errorf("%s: not of the form link and MAC or address: %w", key, err)
		}
		links[names[i]] = nil
	}
	if err := k.ourLinks(ctx, links); err != nil {
		return err
	}
	var wanted []lookup
	for i, key := range parsed {
		if l := links[names[i]]; l != nil {
			wanted = append(wanted, lookup{l, key})
		}
	}
	entries, err := k.lookUpEntries(ctx, wanted)
	if err != nil {
		return err
	}
	for i, f := range entries {
		if value, ok := f.entry(); ok {
			out.Add(wanted[i].key.object(wanted[i].link.name, value))
		}
	}
	return nil
}

// ourLinks looks up links of ours that can have entries of ours, by name.
func (k *Kernel) ourLinks(ctx context.Context, links map[string]*link) error {
	names := make([]string, 0, len(links))
	for name := range links {
		names = append(names, name)
	}
	found, err := k.links(ctx, names...)
	if err != nil {
		return err
	}
	for i, l := range found {
		if l != nil && l.ours() && !isSwitch(l.name) {
			links[names[i]] = l
		}
	}
	return nil
}

// maps reports whether entries on a link are ours: all that are static, in a namespace of ours, and in
// the host those of neighbours at the end of a pair that leads there.
func (k *Kernel) maps(l *link, key entryKey) bool {
	return l.ours() && (k.parent != nil || isTransit(l.name) && key.address.IsValid())
}

// entries are those of links, by index.
type entries map[int32]*portEntries

type portEntries struct {
	name  string
	byKey map[entryKey]entryValue
}

func (e entries) put(l *link, key entryKey, value entryValue) {
	port := e[l.index]
	if port == nil {
		port = &portEntries{name: l.name, byKey: map[entryKey]entryValue{}}
		e[l.index] = port
	}
	port.byKey[key] = value
}

func (e entries) remove(link int32, key entryKey) {
	if port := e[link]; port != nil {
		delete(port.byKey, key)
	}
}

func (e entries) get(link int32, key entryKey) (entryValue, bool) {
	if port := e[link]; port != nil {
		value, ok := port.byKey[key]
		return value, ok
	}
	return entryValue{}, false
}

// An entryAt is an entry of a link, by index.
type entryAt struct {
	link int32
	key  entryKey
}

// observeAllEntries lists the entries of ours.
func (k *Kernel) observeAllEntries(ctx context.Context, all []*link, out plan.State) (entries, error) {
	links := map[int32]*link{}
	for _, l := range all {
		if l.ours() && (k.parent != nil || isTransit(l.name)) {
			links[l.index] = l
		}
	}
	seen := entries{}
	if len(links) == 0 {
		return seen, nil
	}
	halves := map[entryAt]*found{}
	for _, request := range k.entryDumps(links) {
		bodies, err := k.route.dump(ctx, unix.RTM_GETNEIGH, request)
		if isGone(err) || errors.Is(err, unix.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list FDB and neighbour entries: %w", err)
		}
		for _, body := range bodies {
			h, ok := parseHalf(body)
			l := links[h.link]
			if !ok || l == nil || body[0] != request[0] {
				continue
			}
			at := entryAt{h.link, h.key}
			if halves[at] == nil {
				halves[at] = &found{}
			}
			halves[at].add(h, l.kind == kindVXLAN)
		}
	}
	for at, f := range halves {
		value, ok := f.entry()
		if !ok {
			continue
		}
		seen.put(links[at.link], at.key, value)
		out.Add(at.key.object(links[at.link].name, value))
	}
	return seen, nil
}

// entryDumps ask for the entries of a namespace of ours, or for the neighbours on a few links.
func (k *Kernel) entryDumps(links map[int32]*link) [][]byte {
	var out [][]byte
	for _, family := range append([]byte{unix.AF_BRIDGE}, k.families()...) {
		request := make([]byte, unix.SizeofNdMsg)
		request[0] = family
		if k.parent != nil {
			out = append(out, request)
			continue
		}
		for index := range links {
			if family != unix.AF_BRIDGE {
				out = append(out, attrs(request[:unix.SizeofNdMsg:unix.SizeofNdMsg]).u32(unix.NDA_IFINDEX, uint32(index)))
			}
		}
	}
	return out
}
