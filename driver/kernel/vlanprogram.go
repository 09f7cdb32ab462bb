package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Verdicts of a program at a tc hook (linux/pkt_cls.h). After unspecified the next filter goes on.
const (
	tcUnspecified = -1
	tcDrop        = 2
)

// Where struct __sk_buff (linux/bpf.h) has what the programs read, in bytes.
const (
	skbPacketType  = 4
	skbVLANPresent = 20
	skbVLANTCI     = 24
	skbData        = 76
	skbDataEnd     = 80
)

const (
	etherLength = 14    // bytes of an Ethernet header without a tag
	etherTypeAt = 12    // where in it the type is
	vlanIDMask  = 0xfff // of the tag: the rest is priority
	toIngress   = 1     // BPF_F_INGRESS: as if received there, not sent
)

// pushTag is the program at the egress of a VLAN's link: what is sent there leaves the uplink with
// the tag, of priority 0. A frame that has a tag already is refused: it is not the sender's to say
// what VLAN it is in. The link's own transmission, to its idle other end, is never reached.
func pushTag(id int, uplink int32) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, skbVLANPresent, asm.Word),
		asm.JNE.Imm(asm.R2, 0, "drop"),
		// A tag may also be in the frame's bytes, if a raw socket wrote it.
		asm.LoadMem(asm.R2, asm.R6, skbData, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, skbDataEnd, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, etherLength),
		asm.JGT.Reg(asm.R4, asm.R3, "drop"),
		asm.LoadMem(asm.R4, asm.R2, etherTypeAt, asm.Half),
		asm.JEq.Imm(asm.R4, network16(unix.ETH_P_8021Q), "drop"),
		asm.JEq.Imm(asm.R4, network16(unix.ETH_P_8021AD), "drop"),

		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, network16(unix.ETH_P_8021Q)),
		asm.Mov.Imm(asm.R3, int32(id)),
		asm.FnSkbVlanPush.Call(),
		asm.JNE.Imm(asm.R0, 0, "drop"),
		asm.Mov.Imm(asm.R1, uplink),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),

		asm.Mov.Imm(asm.R0, tcDrop).WithSymbol("drop"),
		asm.Return(),
	}
}

// popTag is the program at the ingress of an uplink, which sees only frames tagged 802.1Q: those of
// the VLAN arrive on the VLAN's link, untagged, and all others go on.
func popTag(id int, link int32) asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, skbVLANTCI, asm.Word),
		asm.And.Imm(asm.R2, vlanIDMask),
		asm.JNE.Imm(asm.R2, int32(id), "pass"),
		asm.FnSkbVlanPop.Call(),
		asm.JNE.Imm(asm.R0, 0, "drop"),
		asm.Mov.Imm(asm.R1, link),
		asm.Mov.Imm(asm.R2, toIngress),
		asm.FnRedirect.Call(),
		asm.Return(),

		asm.Mov.Imm(asm.R0, tcDrop).WithSymbol("drop"),
		asm.Return(),

		asm.Mov.Imm(asm.R0, tcUnspecified).WithSymbol("pass"),
		asm.Return(),
	}
}

// shutHost is the program at the ingress of a VLAN's link. It lets all frames on to what is above the
// link, a switch or macvlans, and makes those for the link's own MAC somebody else's, for a switch or
// a macvlan does not look at that: but the host's own network would take what comes in on a link
// without addresses for addresses that it has elsewhere, and route it too.
func shutHost() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, skbPacketType, asm.Word),
		asm.JNE.Imm(asm.R2, unix.PACKET_HOST, "pass"),
		asm.Mov.Imm(asm.R2, unix.PACKET_OTHERHOST),
		asm.FnSkbChangeType.Call(),
		asm.Mov.Imm(asm.R0, tcUnspecified).WithSymbol("pass"),
		asm.Return(),
	}
}

// passAll is the program of a filter that only marks something.
func passAll() asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, tcUnspecified), asm.Return()}
}

// network16 is how a program sees two bytes in network order.
func network16(v uint16) int32 {
	return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)))
}

// loadProgram loads a program, under a name of at most 15 characters for bpftool(8). The caller closes
// it: a filter that it is in keeps it.
func loadProgram(name string, code asm.Instructions) (*ebpf.Program, error) {
	spec := &ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, Instructions: code}
	p, err := ebpf.NewProgram(spec)
	if errors.Is(err, unix.EPERM) {
		liftMemoryLock()
		p, err = ebpf.NewProgram(spec)
	}
	switch {
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("load eBPF program %s: %w: %s", name, unix.EPERM, refusedLoad())
	case err != nil:
		return nil, fmt.Errorf("load eBPF program %s: %w", name, err)
	}
	return p, nil
}

// liftMemoryLock lifts the limit of locked memory, which programs count towards before Linux 5.11.
// Where it may not be lifted, the load will say.
func liftMemoryLock() {
	if unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}) == nil {
		return
	}
	var now unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &now) == nil {
		_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: now.Max, Max: now.Max})
	}
}

// refusedLoad says why a program could not be loaded, and what to do. See capabilities(7).
func refusedLoad() string {
	const why = "VLAN tags are put on and taken off by eBPF programs"
	has := func(capability int) bool {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		return unix.Capget(&header, &data[0]) != nil || data[capability/32].Effective&(1<<(capability%32)) != 0
	}
	switch {
	case has(unix.CAP_SYS_ADMIN): // includes the others
	case !has(unix.CAP_BPF):
		return why + ", and this process lacks CAP_BPF: give it CAP_BPF, or CAP_SYS_ADMIN before Linux 5.8"
	case !has(unix.CAP_NET_ADMIN):
		return why + ", and this process lacks CAP_NET_ADMIN: give it CAP_NET_ADMIN"
	}
	return why + "; the capabilities are there, so a seccomp profile, a security module or the limit of locked memory (before Linux 5.11) forbids bpf(2): allow it"
}
