package plan

import "net/netip"

// Uplink is a link that can connect a switch with the network outside, as observed.
type Uplink struct {
	Name   string
	MAC    MAC
	MTU    int
	Bridge bool // it is a bridge of the host's, which is used as it is
	Switch bool // it is a port of a Switch of ours
	// Addresses are the host's on it, or on the Switch of ours that it is a port of, but for link-local
	// ones.
	Addresses []netip.Prefix
}
