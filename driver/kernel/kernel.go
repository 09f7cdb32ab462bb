// Package kernel observes what the kernel holds with dockway's mark, and does what a plan says. It
// is the only package that speaks netlink, nftables and sysctl. It decides nothing, and what it
// remembers is only what it has told its caller, so that Watch need not tell it again.
//
// What bears no mark of dockway's is never touched: links are ours by name and alias, nftables
// tables by name, network namespaces by name and directory, and what is static on our links in
// those. Everything else that this package changes is named in the plan: a sysctl, one
// rule in Docker's DOCKER-USER chain, the uplink of a switch, whose addresses and routes move.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// Sockets holds ports of the host for us. Hold refuses with a *plan.PortInUseError what somebody
// else holds; holding what is held and releasing what is not are fine.
type Sockets interface {
	Hold(plan.HostPort) error
	Release(plan.HostPort) error
	Held() []plan.HostPort
	// Lookup gives one that is held. Its cost does not depend on how many are.
	Lookup(plan.Key) (plan.HostPort, bool)
}

// Config is what a Kernel needs to know.
type Config struct {
	// Tables are ours, with every set that an element can be in. Elements have to name these very
	// sets: they are compared by identity.
	Tables []*nft.Table
	// Sockets holds host ports; nil when the plans have none.
	Sockets Sockets
	// Namespaces is the directory where network namespaces of ours are kept, each by a mount, such as
	// /run/dockway/netns: made if it is missing, for root alone. Empty: none can be made, and what is
	// to be done in one is refused.
	Namespaces string
	// NamespaceTables are what a namespace of ours has in the place of Tables.
	NamespaceTables []*nft.Table
	// ProcSys is where "net/…" settings are found, /proc/sys when empty. The managed plugin has the
	// host's /proc/sys/net mounted elsewhere, because its own is read-only.
	ProcSys string
	// Log hears of what happens in the background; nil: the standard logger.
	Log *logrus.Entry
}

// Kernel is one network namespace of the kernel, and those of ours that were made from it. It is safe
// for concurrent use.
type Kernel struct {
	rules
	rulesWithin rules // of namespaces of ours
	pins        pins  // where those are
	children    children

	parent *Kernel // the host's, for one of a namespace of ours, which has
	name   string  // this name there
	inode  uint64
	nsid   int32        // and this number
	inUse  sync.RWMutex // held for reading while the parent uses it

	mark      uint32 // of Admit
	sockets   Sockets
	procSys   string
	ipv6      bool
	log       *logrus.Entry
	namespace *os.File
	buffers   *sync.Pool // of netlink sockets

	nft    *socket
	route  *socket
	slow   *socket         // for deletions, which keep others waiting
	handle *netlink.Handle // for lists of routes and of tracked connections; only the host's has one

	life    context.Context // ends with Close
	end     context.CancelFunc
	running sync.WaitGroup // what goes on in the background

	tables     sync.RWMutex        // held for writing while a table is made anew with its elements
	doing      sync.RWMutex        // held for reading while operations are carried out
	switching  sync.Mutex          // held while a switch is made or deleted
	reaping    sync.Mutex          // held while the doomed are deleted
	vlans      sync.Mutex          // held while a VLAN is put or deleted: those of one uplink share its state
	unfinished map[int32]time.Time // since when the last reaping knows of links without a mark
	reaper     worker
	forgetter  worker
	stale      publications
	believed   beliefs
	asked      questions
	shortcuts  shortcuts
	stations   stations
	shortener  worker
	hearers    hearers

	// interrupt, in tests, says how many of the next n changes of a switch are carried out before the
	// process dies.
	interrupt func(n int) (int, error)
}

// New opens the calling thread's network namespace. Links that an earlier process left doomed are
// deleted in the background.
func New(c Config) (*Kernel, error) {
	k := &Kernel{
		pins: pins{c.Namespaces}, mark: markOf(c.Tables), buffers: newBuffers(),
		sockets: c.Sockets, procSys: c.ProcSys, log: c.Log,
	}
	if k.procSys == "" {
		k.procSys = "/proc/sys"
	}
	if k.log == nil {
		k.log = logrus.NewEntry(logrus.StandardLogger())
	}
	var err error
	if k.rules, err = rulesOf(c.Tables); err != nil {
		return nil, err
	}
	if k.rulesWithin, err = rulesOf(c.NamespaceTables); err != nil {
		return nil, fmt.Errorf("of namespaces: %w", err)
	}
	if k.namespace, err = os.Open(threadNamespace); err != nil {
		return nil, err
	}
	_, err = os.Stat(filepath.Join(k.procSys, "net/ipv6/conf"))
	k.ipv6 = err == nil
	if k.pins.dir != "" {
		if err := k.pins.sweep(); err != nil {
			k.log.WithError(err).Warn("network namespaces") // who makes one hears why it cannot be
		}
	}
	k.start()
	if err := k.open(); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// rules are tables of ours, and what is known of their sets.
type rules struct {
	tableList []*nft.Table
	sets      map[string]setType // by family and name
}

func rulesOf(tables []*nft.Table) (rules, error) {
	r := rules{tableList: tables, sets: map[string]setType{}}
	for _, t := range tables {
		if _, err := compileTable(t); err != nil {
			return r, err
		}
		for _, s := range t.Sets {
			typed, err := setTypeOf(t.Name, s)
			if err != nil {
				return r, fmt.Errorf("table %s %s: %w", t.Family, t.Name, err)
			}
			r.sets[string(t.Family)+" "+s.Name] = typed
		}
	}
	return r, nil
}

// start makes the Kernel's sockets, which are not open yet, and begins its background work.
func (k *Kernel) start() {
	k.nft = k.netlinkSocket(unix.NETLINK_NETFILTER)
	k.route = k.netlinkSocket(unix.NETLINK_ROUTE)
	k.slow = k.netlinkSocket(unix.NETLINK_ROUTE)
	k.life, k.end = context.WithCancel(context.Background())
	k.reaper = k.startWorker("delete links", k.reap)
	k.forgetter = k.startWorker("forget connections to ports that are no longer published", k.forgetFlows)
	k.shortener = k.startWorker("shorten the way of containers", k.shortenDue)
	k.reaper.wake()
}

// open opens the host's sockets.
func (k *Kernel) open() (err error) {
	for _, s := range []*socket{k.nft, k.route, k.slow} {
		if err := s.dial(); err != nil {
			return err
		}
	}
	k.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	return err
}

// Close ends the background work. What is doomed is left for the next process, and so are namespaces.
func (k *Kernel) Close() error {
	k.end()
	err := k.closeChildren()
	k.running.Wait()
	k.inUse.Lock() // by nobody any more
	defer k.inUse.Unlock()
	err = errors.Join(err, k.shortcuts.close())
	for _, s := range []*socket{k.nft, k.route, k.slow} {
		err = errors.Join(err, s.Close())
	}
	if k.handle != nil {
		k.handle.Close()
	}
	return errors.Join(err, k.namespace.Close())
}

// Observe looks up what the keys name, each by itself: it costs the same however much else there
// is. What is not there, and what does not bear our mark, is not in the state.
func (k *Kernel) Observe(ctx context.Context, keys []plan.Key) (plan.State, error) {
	out := plan.State{}
	var links, switches, transits []string
	var elements, addresses, routes, entries []plan.Key
	within := map[string][]plan.Key{}
	for _, key := range keys {
		if name := key.Namespace; name != "" {
			key.Namespace = ""
			within[name] = append(within[name], key)
			continue
		}
		var err error
		switch key.Kind {
		case plan.KindNamespace:
			err = k.observeNamespace(key.Name, out)
		case plan.KindTable:
			err = k.observeTableKey(ctx, key, out)
		case plan.KindAdmit:
			err = k.observeAdmit(ctx, key.Name, out)
		case plan.KindBridge, plan.KindVeth, plan.KindVLAN, plan.KindMacvlan, plan.KindVXLAN:
			links = append(links, key.Name)
		case plan.KindSwitch:
			switches = append(switches, key.Name)
		case plan.KindTransit:
			transits = append(transits, key.Name)
		case plan.KindAddress:
			addresses = append(addresses, key)
		case plan.KindFDB, plan.KindNeighbour:
			entries = append(entries, key)
		case plan.KindShortcut:
			err = k.observeShortcut(key, out)
		case plan.KindRoute:
			routes = append(routes, key)
		case plan.KindSysctl:
			err = k.observeSysctl(key.Name, out)
		case plan.KindElement:
			elements = append(elements, key)
		case plan.KindHostPort:
			if k.sockets == nil {
				continue
			}
			if port, ok := k.sockets.Lookup(key); ok {
				out.Add(port)
			}
		default:
			err = fmt.Errorf("kind %q is not known", key.Kind)
		}
		if err != nil {
			return nil, err
		}
	}
	err := errors.Join(
		k.observeLinks(ctx, links, out),
		k.observeSwitches(ctx, switches, out),
		k.observeTransits(ctx, transits, out),
		k.observeEntryKeys(ctx, entries, out),
		k.observeAddressKeys(ctx, addresses, out),
		k.observeRouteKeys(ctx, routes, out),
		k.observeElements(ctx, elements, out))
	for name, keys := range within {
		err = errors.Join(err, k.observeWithin(ctx, name, keys, out))
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (k *Kernel) observeTableKey(ctx context.Context, key plan.Key, out plan.State) error {
	for _, t := range k.tableList {
		if (plan.Table{Table: t}).Key() != key {
			continue
		}
		o, err := k.observeTable(ctx, t)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		if o != nil {
			out.Add(o)
		}
		return nil
	}
	return fmt.Errorf("%s is none of ours", key)
}

// ObserveAll lists everything that bears our mark, in namespaces of ours too, and looks up what the
// keys in also name beside it: settings that we share with others, such as sysctls and Admit. FDB and
// neighbour entries are ours that are static and on links of ours in a namespace of ours; in the
// host's, neighbours on the links that lead there.
func (k *Kernel) ObserveAll(ctx context.Context, also []plan.Key) (plan.State, error) {
	keys := make([]plan.Key, 0, len(k.tableList)+len(also))
	for _, t := range k.tableList {
		keys = append(keys, plan.Table{Table: t}.Key())
	}
	for _, key := range also {
		if key.Namespace == "" && (key.Kind == plan.KindSysctl || key.Kind == plan.KindAdmit) {
			keys = append(keys, key)
		}
	}
	at := k.believed.now()
	out, err := k.Observe(ctx, keys)
	if err != nil {
		return nil, err
	}
	all, err := k.listLinks(ctx)
	if err != nil {
		return nil, err
	}
	names, ours := map[int32]string{}, map[int32]string{}
	var vlans, transits []*link
	for _, l := range all {
		names[l.index] = l.name
	}
	for _, l := range all {
		switch {
		case !l.ours():
		case isSwitch(l.name): // its addresses are the host's
			if err := k.observeSwitch(ctx, l, all, out); err != nil {
				return nil, err
			}
		case isTransit(l.name):
			ours[l.index] = l.name
			if k.parent == nil {
				transits = append(transits, l)
			}
		default:
			ours[l.index] = l.name
			out.Add(l.object(names[l.related()]))
		}
		if l.ours() && strings.HasPrefix(l.name, vlanPrefix) {
			vlans = append(vlans, l)
		}
	}
	var held []plan.HostPort
	if k.sockets != nil {
		held = k.sockets.Held()
	}
	for _, port := range held {
		out.Add(port)
	}
	err = errors.Join(
		k.observeAllVLANs(ctx, vlans, out),
		k.observeTransitLinks(ctx, transits, out),
		k.observeAddresses(ctx, 0, ours, out),
		k.observeRoutes(ctx, k.families(), out),
		k.observeAllElements(ctx, out))
	if err != nil {
		return nil, err
	}
	if err := k.observeAllShortcuts(all, out); err != nil {
		return nil, err
	}
	entries, err := k.observeAllEntries(ctx, all, out)
	if err != nil {
		return nil, err
	}
	k.believed.saw(out, entries, at)
	return out, k.observeAllWithin(ctx, also, out)
}

// Do carries operations out in order, and stops at the first that fails: the error says which. A
// run of operations on tables and elements is carried out tables first, and its elements in one
// transaction for each namespace: all or none. One on FDB and neighbour entries is carried out in
// batches: what comes after the first that fails may be done too. Adding what is there and deleting
// what is not are fine.
func (k *Kernel) Do(ctx context.Context, ops []plan.Op) error {
	k.doing.RLock()
	defer k.doing.RUnlock()
	for len(ops) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := 1
		for kind := batchOf(ops[0]); n < len(ops) && kind != single && batchOf(ops[n]) == kind; n++ {
		}
		if err := k.doBatch(ctx, ops[:n]); err != nil {
			return err
		}
		ops = ops[n:]
	}
	return nil
}

// A batch is what is done together.
type batch int

const (
	single    batch = iota
	ofRules         // tables and elements
	ofEntries       // FDB and neighbour entries
)

func batchOf(op plan.Op) batch {
	_, op = unwrap(op)
	switch op.Object.(type) {
	case plan.Table, plan.Element:
		return ofRules
	case plan.FDB, plan.Neighbour:
		return ofEntries
	}
	return single
}

// doBatch carries out operations that are done together, namespace by namespace.
func (k *Kernel) doBatch(ctx context.Context, ops []plan.Op) error {
	var names []string
	byName := map[string][]plan.Op{}
	for _, op := range ops {
		name, op := unwrap(op)
		if byName[name] == nil {
			names = append(names, name)
		}
		byName[name] = append(byName[name], op)
	}
	for _, name := range names {
		ops := byName[name]
		switch {
		case name != "":
			if err := k.doWithin(ctx, name, ops); err != nil {
				return fmt.Errorf("network namespace %s: %w", name, err)
			}
			continue
		case batchOf(ops[0]) == ofRules:
			if err := k.doNFT(ctx, ops); err != nil {
				return err
			}
			continue
		case batchOf(ops[0]) == ofEntries:
			if err := k.doEntries(ctx, ops); err != nil {
				return err
			}
			continue
		}
		if err := k.do(ctx, ops[0]); err != nil {
			return fmt.Errorf("%s: %w", ops[0], err)
		}
		k.believed.did(ops[0])
	}
	return nil
}

// doNFT carries out operations on tables and elements, tables first: those that come are there
// before their elements, and those that go take theirs with them.
func (k *Kernel) doNFT(ctx context.Context, ops []plan.Op) error {
	var elements []plan.Op
	for _, op := range ops {
		t, ok := op.Object.(plan.Table)
		if !ok {
			elements = append(elements, op)
			continue
		}
		put := k.putTable
		if op.Verb == plan.Delete {
			put = k.deleteTable
		}
		if err := put(ctx, t.Table); err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
	}
	return k.putElements(ctx, elements)
}

func (k *Kernel) do(ctx context.Context, op plan.Op) error {
	if _, ok := op.Object.(plan.HostPort); ok && k.sockets == nil {
		return errors.New("nobody is there to hold ports")
	}
	if op.Verb == plan.Delete {
		return k.deleteObject(ctx, op.Object)
	}
	switch o := op.Object.(type) {
	case plan.Namespace:
		return k.putNamespace(o)
	case plan.Bridge:
		return k.putBridge(ctx, o)
	case plan.Switch:
		return k.putSwitch(ctx, o)
	case plan.Veth:
		return k.putVeth(ctx, o)
	case plan.VXLAN:
		return k.putVXLAN(ctx, o)
	case plan.Shortcut:
		k.putShortcut(ctx, o)
		return nil
	case plan.Transit:
		return k.putTransit(ctx, o)
	case plan.VLAN:
		return k.putVLAN(ctx, o)
	case plan.Macvlan:
		return k.putMacvlan(ctx, o)
	case plan.Address:
		return k.putAddress(ctx, o)
	case plan.Route:
		return k.putRoute(ctx, o)
	case plan.Sysctl:
		return k.putSysctl(o)
	case plan.Admit:
		return k.putAdmit(ctx, o)
	case plan.HostPort:
		return k.sockets.Hold(o) // of one that is held, this changes the target: its relays go on
	}
	return fmt.Errorf("%T is not known", op.Object)
}
