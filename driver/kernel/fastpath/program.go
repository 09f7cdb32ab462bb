package fastpath

import (
	"encoding/binary"
	"time"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// goOn is the verdict (linux/pkt_cls.h) after which the frame goes on: to the next program, and then
// to the bridge and its rules.
const goOn = -1

// Where struct __sk_buff (linux/bpf.h) has what the programs read, in bytes.
const (
	skbPacketType  = 4
	skbVLANPresent = 20
	skbIfindex     = 40
	skbData        = 76
	skbDataEnd     = 80
)

// Where a frame has what the programs read, in bytes from its start.
const (
	etherDestination = 0
	etherSource      = 6
	etherType        = 12

	ip4First    = 14 // version and length of the header
	ip4Fragment = 20
	ip4Protocol = 23
	ip4Source   = 26
	ip4Target   = 30
	ip4ToPort   = 36
	ip4End      = 38 // with the two ports

	ip6First      = 14 // version
	ip6NextHeader = 20
	ip6Source     = 22
	ip6Target     = 38
	ip6ToPort     = 56
	ip6End        = 58 // with the two ports
)

const (
	ip4Plain      = 0x45   // version 4, no options
	ip4AnyPiece   = 0x3fff // more fragments follow, or it is not the first
	ip6Version    = 0x60
	ip6VersionSet = 0xf0
)

// UDP ports of clients of DHCP (RFC 2131) and DHCPv6 (RFC 8415). From which port they are answered, many
// clients do not look at.
const (
	dhcpClient  = 68
	dhcp6Client = 546
)

// Registers that keep their meaning through a program.
const (
	context = asm.R6 // struct __sk_buff
	frame   = asm.R7 // its first byte
	end     = asm.R8 // behind the last byte of its first piece
	family  = asm.R9 // reach4 or reach6
	target  = asm.R9 // at the end: the link that the frame goes to
)

// Places of the stack.
const (
	keyAt = -keySize  // the MAC that is looked up
	nowAt = keyAt - 8 // the time
)

// fromPort is the program at the ingress of a container's port. A frame that is as port security
// wants it, of a protocol that everybody admits and for a known MAC, goes straight there. To an uplink it
// does so while the lease lasts, for which none (-1) is needed with a VXLAN device.
func fromPort(table, lease int, scrubs bool) asm.Instructions {
	code := concat(begin(),
		ip4(asm.Instructions{ // containers serve no DHCP: the rules drop it
			asm.LoadMem(asm.R2, frame, ip4ToPort, asm.Half),
			asm.JEq.Imm(asm.R2, network16(dhcpClient), "slow"),
		}),
		ip6(asm.Instructions{
			asm.LoadMem(asm.R2, frame, ip6ToPort, asm.Half),
			asm.JEq.Imm(asm.R2, network16(dhcp6Client), "slow"),
		}),
		mark("look", lookUp(table, etherSource)), isLink(), isAddress(ip4Source, ip6Source),
		mark("known", lookUp(table, etherDestination)), checkDestination(),
		asm.Instructions{
			asm.Mov.Reg(target, asm.R1),
			asm.And.Imm(asm.R3, reachRemote),
			asm.JEq.Imm(asm.R3, 0, "local"),
		})
	if lease >= 0 {
		code = append(code, lasts(lease)...)
	}
	return concat(code, asm.Instructions{
		asm.Mov.Reg(asm.R1, target),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(), // sent by the uplink, or by the VXLAN device, whose own table says to which host
		asm.Return(),
	}, mark("local", deliver(scrubs)), slow())
}

// fromVXLAN is the program at the ingress of a VXLAN device, whose frames the sender's host has
// checked. They go to containers of this host, and never back.
func fromVXLAN(table int, scrubs bool) asm.Instructions {
	return concat(begin(), ip4(nil), ip6(nil),
		mark("look", lookUp(table, etherDestination)), checkDestination(),
		asm.Instructions{
			asm.Mov.Reg(target, asm.R1),
			asm.And.Imm(asm.R3, reachRemote),
			asm.JNE.Imm(asm.R3, 0, "slow"),
		}, deliver(scrubs), slow())
}

// fromUplink is the program at the ingress of a switch's uplink. Frames for containers of this host, to
// an address of theirs, go there if the sender is known to be on the wire; the bridge learns of all others,
// and has a frame of each known one from time to time.
func fromUplink(table, lease int, hearTime time.Duration, scrubs bool) asm.Instructions {
	return concat(begin(), ip4(nil), ip6(nil),
		mark("look", lasts(lease)),
		asm.Instructions{asm.StoreMem(asm.RFP, nowAt, asm.R0, asm.DWord)},
		lookUp(table, etherSource), isLink(),
		asm.Instructions{
			asm.And.Imm(asm.R3, reachRemote),
			asm.JEq.Imm(asm.R3, 0, "slow"),
			asm.LoadMem(asm.R2, asm.RFP, nowAt, asm.DWord),
			asm.LoadMem(asm.R3, asm.R0, heardAt, asm.DWord),
			asm.Mov.Reg(asm.R4, asm.R2),
			asm.Sub.Reg(asm.R4, asm.R3), // can be less than 0: this clock is a coarse one
			asm.LoadImm(asm.R5, hearTime.Nanoseconds(), asm.DWord),
			asm.JSLT.Reg(asm.R4, asm.R5, "heard"),
			asm.StoreMem(asm.R0, heardAt, asm.R2, asm.DWord),
			asm.Ja.Label("slow"),
		},
		mark("heard", lookUp(table, etherDestination)),
		asm.Instructions{
			asm.And.Imm(asm.R3, reachRemote),
			asm.JNE.Imm(asm.R3, 0, "slow"),
		},
		isAddress(ip4Target, ip6Target),
		asm.Instructions{asm.Mov.Reg(target, asm.R1).WithSymbol("known")},
		deliver(scrubs), slow())
}

// lasts leaves the frame to the bridge unless the lease still lasts.
func lasts(lease int) asm.Instructions {
	return asm.Instructions{
		asm.FnKtimeGetCoarseNs.Call(),
		asm.LoadMapValue(asm.R1, lease, 0),
		asm.LoadMem(asm.R1, asm.R1, 0, asm.DWord),
		asm.JGE.Reg(asm.R0, asm.R1, "slow"),
	}
}

// begin finds the frame in memory. One with a VLAN tag, or with less of it in one piece than the
// shortest headers, is left alone.
func begin() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(context, asm.R1),
		asm.LoadMem(asm.R2, context, skbVLANPresent, asm.Word),
		asm.JNE.Imm(asm.R2, 0, "slow"),
		asm.LoadMem(frame, context, skbData, asm.Word),
		asm.LoadMem(end, context, skbDataEnd, asm.Word),
		asm.Mov.Reg(asm.R2, frame),
		asm.Add.Imm(asm.R2, ip4End),
		asm.JGT.Reg(asm.R2, end, "slow"),
		asm.LoadMem(asm.R2, frame, etherType, asm.Half),
		asm.JEq.Imm(asm.R2, network16(unix.ETH_P_IPV6), "ip6"),
		asm.JNE.Imm(asm.R2, network16(unix.ETH_P_IP), "slow"),
	}
}

// ip4 lets TCP and UDP through, whole and without options, and has more tests for UDP.
func ip4(udp asm.Instructions) asm.Instructions {
	return concat(asm.Instructions{
		asm.LoadMem(asm.R2, frame, ip4First, asm.Byte),
		asm.JNE.Imm(asm.R2, ip4Plain, "slow"),
		asm.LoadMem(asm.R2, frame, ip4Fragment, asm.Half),
		asm.And.Imm(asm.R2, network16(ip4AnyPiece)),
		asm.JNE.Imm(asm.R2, 0, "slow"),
		asm.Mov.Imm(family, reach4),
		asm.LoadMem(asm.R2, frame, ip4Protocol, asm.Byte),
		asm.JEq.Imm(asm.R2, unix.IPPROTO_TCP, "look"),
		asm.JNE.Imm(asm.R2, unix.IPPROTO_UDP, "slow"),
	}, udp, asm.Instructions{asm.Ja.Label("look")})
}

// ip6 is ip4 for IPv6, where fragments and options are headers of their own. What comes next is "look".
func ip6(udp asm.Instructions) asm.Instructions {
	return concat(mark("ip6", asm.Instructions{
		asm.Mov.Reg(asm.R2, frame),
		asm.Add.Imm(asm.R2, ip6End),
		asm.JGT.Reg(asm.R2, end, "slow"),
		asm.LoadMem(asm.R2, frame, ip6First, asm.Byte),
		asm.And.Imm(asm.R2, ip6VersionSet),
		asm.JNE.Imm(asm.R2, ip6Version, "slow"),
		asm.Mov.Imm(family, reach6),
		asm.LoadMem(asm.R2, frame, ip6NextHeader, asm.Byte),
		asm.JEq.Imm(asm.R2, unix.IPPROTO_TCP, "look"),
		asm.JNE.Imm(asm.R2, unix.IPPROTO_UDP, "slow"),
	}), udp)
}

// lookUp finds the entry of the MAC at a place of the frame: in R0 where it is, in R1 its link, in R3
// its reach.
func lookUp(table int, at int16) asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R2, frame, at, asm.Word),
		asm.StoreMem(asm.RFP, keyAt, asm.R2, asm.Word),
		asm.LoadMem(asm.R2, frame, at+4, asm.Half),
		asm.StoreMem(asm.RFP, keyAt+4, asm.R2, asm.Half),
		asm.StoreImm(asm.RFP, keyAt+6, 0, asm.Half),
		asm.LoadMapPtr(asm.R1, table),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, keyAt),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "slow"),
		asm.LoadMem(asm.R1, asm.R0, linkAt, asm.Word),
		asm.LoadMem(asm.R3, asm.R0, reachAt, asm.Word),
		asm.Mov.Reg(asm.R2, asm.R3),
		asm.And.Reg(asm.R2, family),
		asm.JEq.Imm(asm.R2, 0, "slow"),
	}
}

// isLink goes on if the MAC that was looked up is behind the link that the frame comes from.
func isLink() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R2, context, skbIfindex, asm.Word),
		asm.JNE.Reg(asm.R1, asm.R2, "slow"),
	}
}

// isAddress goes to "known" if the address at a place of the frame is one of the entry's.
func isAddress(at4, at6 int16) asm.Instructions {
	return concat(asm.Instructions{
		asm.JEq.Imm(family, reach6, "address6"),
		asm.LoadMem(asm.R2, frame, at4, asm.Word),
		asm.LoadMem(asm.R3, asm.R0, source4At, asm.Word),
		asm.JNE.Reg(asm.R2, asm.R3, "slow"),
		asm.Ja.Label("known"),
	},
		mark("address6", differs(at6, source6At, "second6")), asm.Instructions{asm.Ja.Label("known")},
		mark("second6", differs(at6, source6At+16, "slow")))
}

// differs goes on if the IPv6 address at a place of the frame is that at a place of the entry, and else to
// a label.
func differs(at, in int16, label string) asm.Instructions {
	var code asm.Instructions
	for word := int16(0); word < 16; word += 4 {
		code = append(code,
			asm.LoadMem(asm.R2, frame, at+word, asm.Word),
			asm.LoadMem(asm.R3, asm.R0, in+word, asm.Word),
			asm.JNE.Reg(asm.R2, asm.R3, label),
		)
	}
	return code
}

// checkDestination leaves a frame for the port that it comes from to the bridge.
func checkDestination() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R2, context, skbIfindex, asm.Word),
		asm.JEq.Reg(asm.R1, asm.R2, "slow"),
	}
}

// deliver is where a frame arrives at the other end of the port, in the container. It bears the
// container's MAC, not that of the link that it came by, so the kernel takes it for somebody else's, and the
// container would drop it. A kernel that scrubs what it redirects sees to that itself.
func deliver(scrubs bool) asm.Instructions {
	redirect := asm.Instructions{
		asm.Mov.Reg(asm.R1, target),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirectPeer.Call(),
		asm.Return(),
	}
	if scrubs {
		return redirect
	}
	return concat(asm.Instructions{
		asm.LoadMem(asm.R2, context, skbPacketType, asm.Word),
		asm.JEq.Imm(asm.R2, unix.PACKET_HOST, "ours"),
		asm.Mov.Reg(asm.R1, context),
		asm.Mov.Imm(asm.R2, unix.PACKET_HOST),
		asm.FnSkbChangeType.Call(),
	}, mark("ours", redirect))
}

// redirectScrubs reports whether bpf_redirect_peer sets the type of a packet to PACKET_HOST: it does since
// Linux 6.15, and the call that does so instead costs a hundredth of a round trip.
func redirectScrubs() bool {
	const since = 6<<16 | 15<<8
	version, err := features.LinuxVersionCode()
	return err == nil && version >= since
}

func slow() asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, goOn).WithSymbol("slow"), asm.Return()}
}

// mark puts a label on the first of some instructions.
func mark(label string, code asm.Instructions) asm.Instructions {
	code[0] = code[0].WithSymbol(label)
	return code
}

func concat(parts ...asm.Instructions) asm.Instructions {
	var code asm.Instructions
	for _, p := range parts {
		code = append(code, p...)
	}
	return code
}

// network16 is how a program sees two bytes in network order.
func network16(v uint16) int32 {
	return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)))
}
