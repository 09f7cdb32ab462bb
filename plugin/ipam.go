package plugin

import "net/http"

// Addresses is the address manager.
type Addresses interface{}

type (
	ipamCapabilities struct {
		RequiresMACAddress    bool // an address does not depend on the Ethernet address: CreateEndpoint chooses that
		RequiresRequestReplay bool // the record on disk is enough
	}
	// addressSpaces have different names: with one name for both, engines do not look whether a
	// pool that they are given overlaps one of the host's networks.
	addressSpaces struct {
		LocalDefaultAddressSpace  string
		GlobalDefaultAddressSpace string
	}
)

func (s *Server) handleAddresses() {
	tell(s, "IpamDriver.GetCapabilities", http.MethodPost, func() any { return ipamCapabilities{} })
	tell(s, "IpamDriver.GetDefaultAddressSpaces", http.MethodPost, func() any {
		return addressSpaces{LocalDefaultAddressSpace: "local", GlobalDefaultAddressSpace: "global"}
	})
}
