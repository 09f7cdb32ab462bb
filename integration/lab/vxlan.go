package lab

import (
	"encoding/binary"
	"fmt"

	"github.com/gopacket/gopacket/layers"
)

// vxlanHeader is how long it is: flags, VNI (RFC 7348, section 5).
const vxlanHeader = 8

// VXLAN takes the frame out of VXLAN that is encapsulated in this one, on whatever UDP port. What
// only looks like it, is not distinguished: name the port besides (see Encapsulated).
func (f Frame) VXLAN() (vni uint32, inner Frame, ok bool) {
	udp := layer[*layers.UDP](f)
	const ethernet = 14
	if udp == nil || len(udp.Payload) < vxlanHeader+ethernet {
		return 0, Frame{}, false
	}
	flags, id := binary.BigEndian.Uint32(udp.Payload), binary.BigEndian.Uint32(udp.Payload[4:])
	const valid, reserved = 0x08000000, 0xff
	if flags != valid || id&reserved != 0 {
		return 0, Frame{}, false
	}
	return id >> 8, decode(f.At, f.Sent, udp.Payload[vxlanHeader:]), true
}

// Encapsulated is frames in VXLAN to a UDP port. What else is said of them is said of the outer
// frame, but in Inside:
//
//	lab.Encapsulated(14789).From(host).To(other).VNI(5001).Inside(lab.EchoRequest().To(container))
func Encapsulated(port int) Match {
	return UDP().ToPort(port).and("in VXLAN", func(f Frame) bool { _, _, ok := f.VXLAN(); return ok })
}

// VNI is frames in VXLAN of a network.
func (m Match) VNI(id int) Match {
	return m.and(fmt.Sprintf("of VNI %d", id), func(f Frame) bool {
		vni, _, ok := f.VXLAN()
		return ok && int(vni) == id
	})
}

// Inside is frames in VXLAN that carry a frame as described.
func (m Match) Inside(inner Match) Match {
	return m.and("with ("+inner.String()+") inside", func(f Frame) bool {
		_, frame, ok := f.VXLAN()
		return ok && inner.fits(frame)
	})
}

// Group is frames to a group or to all: flooded, unless somebody knows better.
func Group() Match {
	return Frames().and("to a group", func(f Frame) bool {
		eth := layer[*layers.Ethernet](f)
		return eth != nil && len(eth.DstMAC) > 0 && eth.DstMAC[0]&1 != 0
	})
}

// ChecksumMissing is IPv4 and IPv6 datagrams of UDP that say they have no checksum.
func (m Match) ChecksumMissing() Match {
	return m.and("without a UDP checksum", func(f Frame) bool {
		udp := layer[*layers.UDP](f)
		return udp != nil && udp.Checksum == 0
	})
}
