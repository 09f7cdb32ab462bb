package fastpath

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// find chooses the hook, finds the table or makes one, and loads the programs, for a kernel that scrubs what
// it redirects or one that does not.
func (p *Path) find(scrubs bool, hooks []hook) error {
	links, err := p.links()
	if err != nil {
		return err
	}
	bridge, err := netlink.LinkByName(p.bridge)
	if err != nil {
		return err
	}
	for _, h := range hooks {
		if _, err = h.programs(bridge.Attrs().Index); err == nil {
			p.hook = h
			break
		}
	}
	if p.hook == nil {
		return unsupported("hooks for programs", err)
	}
	for _, index := range links {
		old, err := p.ours(index)
		if err != nil {
			return unsupported("what is there", err)
		}
		for _, a := range old {
			p.adopt(a)
		}
		closeAll(old)
	}
	wanted := []ownMap{{&p.table, tableSpec()}}
	if p.design != overlay {
		wanted = append(wanted, ownMap{&p.lease, leaseSpec()})
	}
	for _, m := range wanted {
		if err := p.have(m); err != nil {
			return unsupported("table", err)
		}
	}
	code := map[string]asm.Instructions{}
	switch p.design {
	case overlay:
		code[portName], code[vxlanName] = fromPort(p.table.FD(), -1, scrubs), fromVXLAN(p.table.FD(), scrubs)
	default:
		code[wiredName] = fromPort(p.table.FD(), p.lease.FD(), scrubs)
		code[uplinkName] = fromUplink(p.table.FD(), p.lease.FD(), p.design.hearTime, scrubs)
	}
	for name, code := range code {
		if p.programs[name], err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, Instructions: code}); err != nil {
			return unsupported("program "+name, err)
		}
	}
	kept := indices(links)
	return p.sweep(func(_ plan.MAC, e entry) bool { return kept[e.link] })
}

// An ownMap is a map that is to be there.
type ownMap struct {
	at   **ebpf.Map
	spec *ebpf.MapSpec
}

// have makes a map, unless an earlier process has.
func (p *Path) have(m ownMap) (err error) {
	if *m.at == nil {
		if *m.at, err = ebpf.NewMap(m.spec); errors.Is(err, unix.EPERM) {
			if err = rlimit.RemoveMemlock(); err == nil { // tables count towards it before Linux 5.11
				*m.at, err = ebpf.NewMap(m.spec)
			}
		}
		if err != nil {
			return err
		}
	}
	info, err := (*m.at).Info()
	if err != nil {
		return err
	}
	id, _ := info.ID()
	p.maps = append(p.maps, id)
	return nil
}

// adopt takes the maps that an earlier process has made, if they are of these forms, and all that are to
// be there.
func (p *Path) adopt(a attached) {
	if p.table != nil {
		return
	}
	var table, lease *ebpf.Map
	for _, id := range a.maps {
		m, err := ebpf.NewMapFromID(id)
		switch {
		case err != nil:
		case table == nil && tableSpec().Compatible(m) == nil:
			table = m
		case p.design != overlay && lease == nil && leaseSpec().Compatible(m) == nil:
			lease = m
		default:
			_ = m.Close()
		}
	}
	if table != nil && (lease != nil || p.design == overlay) {
		p.table, p.lease = table, lease
		return
	}
	for _, m := range []*ebpf.Map{table, lease} {
		if m != nil {
			_ = m.Close()
		}
	}
}
