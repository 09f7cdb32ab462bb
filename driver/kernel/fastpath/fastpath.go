// Package fastpath takes TCP and UDP past a bridge and its rules, by eBPF: from a container's port
// straight into another container of the host, or to what leads to others, and from that into the
// container. What leads to others is an overlay's VXLAN device, or the uplink of an external switch. It is
// an acceleration and nothing more. Whatever is unusual goes on to the bridge, whose rules decide: ARP,
// neighbour discovery and all other protocols, fragments, options, VLAN tags, unknown MACs, the gateway's
// or the host's, a source that is not the port's, a DHCP server's answers. With no fast path at all,
// everything does.
//
// It is only for containers with the default firewall, which admits TCP and UDP from everybody, and
// whose frames no rule of the bridge changes: not for those with an ACL or behind a load balancer, nor
// for networks with disable_icc, in a VLAN, or behind the host's MAC. Their ports are never attached.
//
// Programs and the table of MACs stay when the process ends, held by the links; the next process finds
// the table by them. Nothing is pinned. The table ends with the bridge's last attached link. Who is behind
// an uplink is not ours to say, but the bridge's, which has heard them: what a process says of them counts
// for as long as it says so.
//
// Frames that pass by here count as received at the container's end and at the VXLAN device or the uplink,
// and as received from the container at its port, but not as sent by the port.
package fastpath

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

var (
	// ErrUnsupported is wrapped where this kernel, or this process's rights, give no fast path. Go on
	// without it.
	ErrUnsupported = errors.New("no fast path")
	// ErrTogether is wrapped where both ends of a port are in one namespace: a container's is to be moved
	// into it yet.
	ErrTogether = errors.New("both ends are in one namespace")
	// ErrFull is wrapped where a bridge has 65,536 MACs. Those that do not fit go by the bridge.
	ErrFull = errors.New("the fast path's table is full")
)

// Names of programs, of at most 15 characters for bpftool(8). A program that does something else, or
// reads another form of table, needs another name: one that is there under its name is not replaced.
const (
	namePrefix = "dwfast"
	portName   = namePrefix + "2_port"
	vxlanName  = namePrefix + "2_vxlan"
	wiredName  = namePrefix + "2_wired" // of a port on an external switch
	uplinkName = namePrefix + "3_uplink"
)

// A design is which programs a bridge's links have.
type design struct {
	port, remote string
	hearTime     time.Duration // of an external switch
}

var (
	overlay  = design{port: portName, remote: vxlanName}
	external = design{wiredName, uplinkName, hearTime}
)

// Port is a container's port of a bridge.
type Port struct {
	Link string
	MAC  plan.MAC
	// Addresses are what the container may send as: one of IPv4, two of IPv6 at most. A family
	// without one has no fast path to or from the port.
	Addresses []netip.Addr
}

// Path is the fast path of one bridge. It is safe for concurrent use.
type Path struct {
	mu        sync.Mutex
	namespace *os.File
	bridge    string
	hook      hook
	design    design
	table     *ebpf.Map
	lease     *ebpf.Map                // of an external switch
	maps      []ebpf.MapID             // both
	programs  map[string]*ebpf.Program // by name
	uplink    uint32                   // index of the link; 0: not attached by this process
}

// Open opens the fast path of an overlay's bridge in a network namespace: what an earlier process has left, or a
// new one, in which nothing is. The file may be closed after it, but the namespace lives until Close. It
// takes CAP_SYS_ADMIN, and wraps ErrUnsupported where there can be no fast path.
func Open(namespace *os.File, bridge string) (*Path, error) {
	return open(namespace, bridge, overlay, redirectScrubs(), tcx{}, clsact{})
}

// OpenSwitch is Open for an external switch.
func OpenSwitch(namespace *os.File, bridge string) (*Path, error) {
	return open(namespace, bridge, external, redirectScrubs(), tcx{}, clsact{})
}

// open takes the first of some hooks that the kernel has.
func open(namespace *os.File, bridge string, design design, scrubs bool, hooks ...hook) (*Path, error) {
	fd, err := unix.FcntlInt(namespace.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("namespace of bridge %s: %w", bridge, err)
	}
	p := &Path{namespace: os.NewFile(uintptr(fd), namespace.Name()), bridge: bridge, design: design, programs: map[string]*ebpf.Program{}}
	if err := inside(p.namespace, func() error { return p.find(scrubs, hooks) }); err != nil {
		_ = p.Close()
		if errors.Is(err, unix.EPERM) && !errors.Is(err, ErrUnsupported) {
			err = unsupported("namespace", err)
		}
		return nil, fmt.Errorf("fast path of bridge %s: %w", bridge, err)
	}
	return p, nil
}

// Close leaves all as it is, for the next that opens it.
func (p *Path) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := []error{p.namespace.Close()}
	for _, program := range p.programs {
		all = append(all, program.Close())
	}
	for _, m := range []*ebpf.Map{p.table, p.lease} {
		if m != nil {
			all = append(all, m.Close())
		}
	}
	return errors.Join(all...)
}

// Attach gives a port its fast path, in place of the one it has, if any. The container's end has to be
// in another namespace than the bridge, or what it is sent would be lost.
func (p *Path) Attach(port Port) error {
	return p.do("port "+port.Link, func() error {
		index, err := p.port(port.Link, "veth")
		if err != nil {
			return err
		}
		e, err := portEntry(uint32(index), port.Addresses)
		if err != nil {
			return err
		}
		// What the port was before: another MAC. One that was never attached was none.
		before, err := p.running(index)
		if err == nil && before != "" {
			err = p.sweep(func(mac plan.MAC, old entry) bool { return old.link != e.link || mac == port.MAC })
		}
		if err != nil {
			return err
		}
		// The entry is what lets others past the rules: it comes last, and goes first.
		if err := p.install(index, p.design.port); err != nil {
			return err
		}
		return put(p.table, port.MAC, e)
	})
}

// AttachVXLAN gives a VXLAN device of the bridge its fast path to containers.
func (p *Path) AttachVXLAN(device string) error {
	return p.do("VXLAN device "+device, func() error {
		index, err := p.port(device, "vxlan")
		if err != nil {
			return err
		}
		return p.install(index, vxlanName)
	})
}

// Put says that MACs are behind a VXLAN device, whose FDB has to know the host of each.
func (p *Path) Put(device string, macs ...plan.MAC) error {
	return p.do("VXLAN device "+device, func() error {
		index, err := p.port(device, "vxlan")
		if err != nil {
			return err
		}
		for _, mac := range macs {
			if err := put(p.table, mac, entry{link: uint32(index), reach: reach4 | reach6 | reachRemote}); err != nil {
				return err
			}
		}
		return nil
	})
}

// Remove has MACs that are behind a link go by the bridge from now on, to and from. Those that are not
// there, or behind another link, are fine.
func (p *Path) Remove(link string, macs ...plan.MAC) error {
	return p.do("link "+link, func() error {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		index := l.Attrs().Index
		for _, mac := range macs {
			e, there, err := get(p.table, mac)
			if err == nil && there && e.link == uint32(index) {
				err = remove(p.table, mac)
			}
			if err != nil {
				return fmt.Errorf("MAC %s: %w", mac, err)
			}
		}
		return nil
	})
}

// Lookup tells whether a port with a MAC, or with the zero MAC a VXLAN device or uplink, is attached, and what the
// port may send as. Its cost does not depend on how many there are.
func (p *Path) Lookup(link string, mac plan.MAC) (port Port, there bool, err error) {
	err = p.do("link "+link, func() error {
		l, err := netlink.LinkByName(link)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return err
		}
		at, err := p.running(l.Attrs().Index)
		if err != nil {
			return err
		}
		port = Port{Link: link, MAC: mac}
		if mac == (plan.MAC{}) {
			there = at == p.design.remote
			return nil
		}
		e, known, err := get(p.table, mac)
		there = known && at == p.design.port && e.link == uint32(l.Attrs().Index)
		port.Addresses = e.addresses()
		return err
	})
	return port, there, err
}

// DetachPort ends the fast path to and from a port with a MAC, of which the program goes with the link.
// Its cost does not depend on how many there are. One that is not there, or whose link is not, is fine.
func (p *Path) DetachPort(link string, mac plan.MAC) error {
	return p.do("port "+link, func() error {
		l, err := netlink.LinkByName(link)
		missing := errors.As(err, &netlink.LinkNotFoundError{})
		if err != nil && !missing {
			return err
		}
		e, there, err := get(p.table, mac)
		if err != nil {
			return err
		}
		if there && e.reach&reachRemote == 0 && (missing || e.link == uint32(l.Attrs().Index)) {
			if err := remove(p.table, mac); err != nil {
				return fmt.Errorf("MAC %s: %w", mac, err)
			}
		}
		return nil
	})
}

// Detach ends the fast path of a link and of all MACs behind it, and forgets those behind links that
// are not ports of the bridge any longer. A link that is not there is fine, and so is a bridge.
func (p *Path) Detach(name string) error {
	return p.do("link "+name, func() error {
		links, err := p.links()
		if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
			return err
		}
		delete(links, name)
		kept := indices(links)
		if err := p.sweep(func(_ plan.MAC, e entry) bool { return kept[e.link] }); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return err
		}
		index := l.Attrs().Index
		old, err := p.ours(index)
		if err != nil {
			return err
		}
		defer closeAll(old)
		return p.remove(index, old)
	})
}

// Free takes all programs of this package away from a link of a network namespace, whoever left them, and
// without the bridge that they are for. A link that is not there is fine.
func Free(namespace *os.File, name string) error {
	return inside(namespace, func() error {
		l, err := netlink.LinkByName(name)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, h := range []hook{tcx{}, clsact{}} {
			p := Path{hook: h}
			old, err := p.ours(l.Attrs().Index)
			if err != nil {
				continue // there can be none
			}
			err = p.remove(l.Attrs().Index, old)
			closeAll(old)
			if err != nil {
				return fmt.Errorf("link %s: %w", name, err)
			}
		}
		return nil
	})
}

// State is what is there.
type State struct {
	Ports  []Port              // by name
	VXLAN  []string            // devices, or uplinks, by name
	Remote map[plan.MAC]string // the device of each MAC
	Half   []string            // links that are neither attached nor free: attach them again, or detach them
}

// List tells what is there and works. MACs behind links that are not ports any longer are forgotten.
func (p *Path) List() (State, error) {
	s := State{Remote: map[plan.MAC]string{}}
	return s, p.do("list", func() error {
		links, err := p.links()
		if err != nil {
			return err
		}
		names := map[uint32]string{}
		for name, index := range links {
			names[uint32(index)] = name
		}
		if err := p.sweep(func(_ plan.MAC, e entry) bool { return names[e.link] != "" }); err != nil {
			return err
		}
		ports := map[uint32]Port{}
		err = each(p.table, func(mac plan.MAC, e entry) {
			if e.reach&reachRemote == 0 {
				ports[e.link] = Port{MAC: mac, Addresses: e.addresses()}
			} else {
				s.Remote[mac] = names[e.link]
			}
		})
		if err != nil {
			return err
		}
		for _, name := range slices.Sorted(maps.Keys(links)) {
			index := links[name]
			port, known := ports[uint32(index)]
			port.Link = name
			at, err := p.running(index)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			switch {
			case known && at == p.design.port:
				s.Ports = append(s.Ports, port)
			case !known && at == p.design.remote:
				s.VXLAN = append(s.VXLAN, name)
			case known || at != "":
				s.Half = append(s.Half, name)
			}
		}
		return nil
	})
}

// do calls f in the namespace, one at a time, and says what its error is about.
func (p *Path) do(about string, f func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := inside(p.namespace, f); err != nil {
		return fmt.Errorf("fast path of bridge %s: %s: %w", p.bridge, about, err)
	}
	return nil
}

const dumpRetries = 10 // of a list that others change meanwhile

// links are the ports of the bridge, by name.
func (p *Path) links() (map[string]int, error) {
	bridge, err := netlink.LinkByName(p.bridge)
	if err != nil {
		return nil, err
	}
	all, err := netlink.LinkList()
	for range dumpRetries {
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
		all, err = netlink.LinkList()
	}
	// In a namespace where links come and go all the time, this is what there is. A port that is left out
	// goes by the bridge until it is attached again.
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list links: %w", err)
	}
	out := map[string]int{}
	for _, l := range all {
		if a := l.Attrs(); a.MasterIndex == bridge.Attrs().Index {
			out[a.Name] = a.Index
		}
	}
	return out, nil
}

func indices(links map[string]int) map[uint32]bool {
	out := map[uint32]bool{}
	for _, index := range links {
		out[uint32(index)] = true
	}
	return out
}

// port is the index of one port of the bridge, of a kind.
func (p *Path) port(name, kind string) (int, error) {
	bridge, err := netlink.LinkByName(p.bridge)
	if err != nil {
		return 0, err
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return 0, err
	}
	if l.Attrs().MasterIndex != bridge.Attrs().Index {
		return 0, fmt.Errorf("%s is no port of the bridge", name)
	}
	if l.Type() != kind {
		return 0, fmt.Errorf("%s is a %s, not a %s", name, l.Type(), kind)
	}
	if kind == "veth" && l.Attrs().NetNsID < 0 {
		return 0, fmt.Errorf("%s: %w: move the container's", name, ErrTogether)
	}
	return l.Attrs().Index, nil
}

// sweep removes the entries that are not to be kept.
func (p *Path) sweep(keep func(plan.MAC, entry) bool) error {
	var unwanted []plan.MAC
	err := each(p.table, func(mac plan.MAC, e entry) {
		if !keep(mac, e) {
			unwanted = append(unwanted, mac)
		}
	})
	if err != nil {
		return err
	}
	for _, mac := range unwanted {
		if err := remove(p.table, mac); err != nil {
			return fmt.Errorf("MAC %s: %w", mac, err)
		}
	}
	return nil
}

// unsupported says what to do about a kernel that refuses.
func unsupported(what string, err error) error {
	advice := "see whether the kernel has CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF"
	switch {
	case errors.Is(err, unix.EPERM):
		advice = "give this process CAP_SYS_ADMIN, and let its seccomp profile allow bpf(2)"
	case errors.Is(err, unix.EINVAL), errors.Is(err, ebpf.ErrNotSupported):
		advice = "it takes Linux 5.10 (bpf_redirect_peer), and with an uplink 5.11 (bpf_ktime_get_coarse_ns)"
	}
	return fmt.Errorf("%w: %s: %w: %s", ErrUnsupported, what, err, advice)
}
