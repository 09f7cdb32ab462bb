package plan

import "net/netip"

// Uplink is a link that can connect a switch with the network outside, as observed.
type Uplink struct {
	Name   string
	MAC    MAC
	MTU    int
	Bridge bool // it is a bridge of the host's, which is used as it is
	Switch bool // it is a port of a Switch of ours
	// Addresses are the host's on it, but for link-local ones: none when a Switch of ours has them.
	Addresses []netip.Prefix
}
