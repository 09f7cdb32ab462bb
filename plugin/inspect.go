package plugin

import "net/http"

// Paths below the socket's root that answer GET with what dockway knows, for its command line.
const (
	StatusPath    = "dockway/v1/status"
	NetworksPath  = "dockway/v1/networks"
	EndpointsPath = "dockway/v1/endpoints"
	PortsPath     = "dockway/v1/ports"
)

func (s *Server) handleInspection() {
	tell(s, StatusPath, http.MethodGet, func() any { return s.Networks.Status() })
	tell(s, NetworksPath, http.MethodGet, func() any { return list(s.Networks.Networks()) })
	tell(s, EndpointsPath, http.MethodGet, func() any { return list(s.Networks.Endpoints()) })
	tell(s, PortsPath, http.MethodGet, func() any { return list(s.Networks.Ports()) })
}

// list makes no items an empty array.
func list[T any](items []T) []T {
	if items == nil {
		return []T{}
	}
	return items
}
