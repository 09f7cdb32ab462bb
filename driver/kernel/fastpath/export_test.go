package fastpath

import (
	"errors"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// OpenClsact is Open as on a kernel without tcx, which does not scrub what it redirects either.
func OpenClsact(namespace *os.File, bridge string) (*Path, error) {
	return open(namespace, bridge, overlay, false, refusing{errors.ErrUnsupported}, clsact{})
}

// OpenRefused is Open as on a kernel that refuses all.
func OpenRefused(namespace *os.File, bridge string, err error) (*Path, error) {
	return open(namespace, bridge, overlay, true, refusing{err})
}

type refusing struct{ err error }

func (r refusing) programs(int) ([]ebpf.ProgramID, error)         { return nil, r.err }
func (r refusing) attach(int, *ebpf.Program, *ebpf.Program) error { return r.err }
func (r refusing) detach(int, *ebpf.Program) error                { return r.err }

// CountPrograms counts the programs at the ingress of a link of the calling thread's namespace.
func CountPrograms(name string) (n int, err error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return 0, err
	}
	for _, h := range []hook{tcx{}, clsact{}} {
		all, err := h.programs(l.Attrs().Index)
		if err != nil {
			return 0, err
		}
		n += len(all)
	}
	return n, nil
}

// OpenSwitchHearing is OpenSwitch with another time after which the bridge has a frame of each on the wire.
func OpenSwitchHearing(every time.Duration) func(*os.File, string) (*Path, error) {
	return func(namespace *os.File, bridge string) (*Path, error) {
		return open(namespace, bridge, design{wiredName, uplinkName, every}, redirectScrubs(), tcx{}, clsact{})
	}
}

// OpenSwitchClsact is OpenSwitchHearing as on a kernel without tcx.
func OpenSwitchClsact(every time.Duration) func(*os.File, string) (*Path, error) {
	return func(namespace *os.File, bridge string) (*Path, error) {
		return open(namespace, bridge, design{wiredName, uplinkName, every}, false, refusing{errors.ErrUnsupported}, clsact{})
	}
}

// PutVLANFilter puts a filter at the ingress of a link as package kernel does for a VLAN.
func PutVLANFilter(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "vlan", Type: ebpf.SchedCLS, Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, goOn), asm.Return()}})
	if err != nil {
		return err
	}
	defer p.Close()
	f := &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS,
		Handle: 1, Protocol: unix.ETH_P_8021Q, Priority: 0x6477}, Fd: p.FD(), Name: "dockway vlan", DirectAction: true}
	return netlink.FilterReplace(f)
}
