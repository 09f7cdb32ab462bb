package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"

	"github.com/dockway/dockway/ipam"
)

// Addresses is the address manager.
type Addresses interface {
	RequestPool(context.Context, ipam.PoolRequest) (ipam.PoolReply, error)
	// ReleasePool and ReleaseAddress succeed for what is not held.
	ReleasePool(ctx context.Context, poolID string) error
	// RequestAddress gives an address with its pool's prefix length.
	RequestAddress(context.Context, ipam.AddressRequest) (netip.Prefix, error)
	ReleaseAddress(ctx context.Context, poolID, address string) error
}

type (
	ipamCapabilities struct {
		// RequiresMACAddress false: engines would choose every Ethernet address themselves, and a
		// network's mac_pool would be in vain.
		RequiresMACAddress bool
		// RequiresRequestReplay false: the record on disk is enough.
		RequiresRequestReplay bool
	}
	// addressSpaces have different names: with one name for both, engines do not look whether a
	// pool that they are given overlaps one of the host's networks.
	addressSpaces struct {
		LocalDefaultAddressSpace  string
		GlobalDefaultAddressSpace string
	}
	poolReply struct {
		PoolID string
		Pool   string
		Data   map[string]string `json:",omitempty"`
	}
	addressReply struct {
		Address string
	}
)

// Requests as the address manager takes them.
type (
	poolRequest    struct{ ipam.PoolRequest }
	addressRequest struct{ ipam.AddressRequest }
	poolRef        struct{ PoolID string }
	addressRef     struct{ PoolID, Address string }
)

func (r poolRequest) String() string {
	switch {
	case r.Pool != "":
		return "pool " + plain(r.Pool)
	case r.V6:
		return "a pool for IPv6"
	}
	return "a pool"
}

func (r addressRequest) String() string { return addressRef{r.PoolID, r.Address}.String() }

func (r poolRef) String() string { return "pool " + plain(r.PoolID) }

func (r addressRef) String() string {
	if r.Address == "" {
		return "an address of pool " + plain(r.PoolID)
	}
	return "address " + plain(r.Address) + " of pool " + plain(r.PoolID)
}

func (s *Server) handleAddresses() {
	tell(s, "IpamDriver.GetCapabilities", http.MethodPost, func() any {
		s.known.Store(true) // an engine asks after it has registered the network driver
		return ipamCapabilities{}
	})
	tell(s, "IpamDriver.GetDefaultAddressSpaces", http.MethodPost, func() any {
		return addressSpaces{LocalDefaultAddressSpace: string(ipam.Local), GlobalDefaultAddressSpace: string(ipam.Global)}
	})
	call(s, "IpamDriver.RequestPool", decodeRequestPool, func(ctx context.Context, r poolRequest) (any, error) {
		reply, err := s.Addresses.RequestPool(ctx, r.PoolRequest)
		return poolReply{PoolID: reply.ID, Pool: reply.Pool.String(), Data: reply.Data}, err
	})
	call(s, "IpamDriver.ReleasePool", decodeReleasePool, func(ctx context.Context, r poolRef) (any, error) {
		return done{}, s.Addresses.ReleasePool(ctx, r.PoolID)
	})
	call(s, "IpamDriver.RequestAddress", decodeRequestAddress, func(ctx context.Context, r addressRequest) (any, error) {
		r.Endpoint = s.onNetwork(r.Address)
		address, err := s.Addresses.RequestAddress(ctx, r.AddressRequest)
		return addressReply{Address: address.String()}, err
	})
	call(s, "IpamDriver.ReleaseAddress", decodeReleaseAddress, func(ctx context.Context, r addressRef) (any, error) {
		return done{}, s.Addresses.ReleaseAddress(ctx, r.PoolID, r.Address)
	})
}

// onNetwork reports whether an address that is asked for is on a network that exists: then it is a
// container's, because gateways and auxiliary addresses are asked for before their network is made.
func (s *Server) onNetwork(address string) bool {
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return false
	}
	for _, n := range s.Networks.Networks() {
		for _, subnet := range n.Subnets {
			if p, err := netip.ParsePrefix(subnet); err == nil && p.Contains(addr) {
				return true
			}
		}
	}
	return false
}

// The address manager checks what the strings say; here is checked that they are there.

func decodeRequestPool(body []byte) (poolRequest, error) {
	var wire struct {
		AddressSpace string
		Pool         string
		SubPool      string
		Options      map[string]json.RawMessage
		V6           bool
	}
	err := unmarshal(body, &wire)
	if err == nil && wire.AddressSpace == "" {
		err = errors.New("field AddressSpace is missing")
	}
	r := poolRequest{ipam.PoolRequest{Space: wire.AddressSpace, Pool: wire.Pool, SubPool: wire.SubPool, V6: wire.V6}}
	if err == nil {
		r.Options, err = texts(wire.Options, all)
	}
	if err != nil {
		return r, fmt.Errorf("request %s: %w", r, err)
	}
	return r, nil
}

func decodeReleasePool(body []byte) (poolRef, error) {
	var r poolRef
	err := unmarshal(body, &r)
	if err == nil {
		err = checkPoolID(r.PoolID)
	}
	if err != nil {
		return r, fmt.Errorf("release %s: %w", r, err)
	}
	return r, nil
}

func decodeRequestAddress(body []byte) (addressRequest, error) {
	var wire struct {
		PoolID  string
		Address string
		Options map[string]json.RawMessage
	}
	err := unmarshal(body, &wire)
	r := addressRequest{ipam.AddressRequest{PoolID: wire.PoolID, Address: wire.Address}}
	if err == nil {
		err = checkPoolID(r.PoolID)
	}
	if err == nil {
		r.Options, err = texts(wire.Options, all)
	}
	if err != nil {
		return r, fmt.Errorf("request %s: %w", r, err)
	}
	return r, nil
}

func decodeReleaseAddress(body []byte) (addressRef, error) {
	var r addressRef
	err := unmarshal(body, &r)
	if err == nil {
		err = checkPoolID(r.PoolID)
	}
	if err == nil && r.Address == "" {
		err = errors.New("field Address is missing")
	}
	if err != nil {
		return r, fmt.Errorf("release %s: %w", r, err)
	}
	return r, nil
}

func checkPoolID(id string) error {
	if id == "" {
		return errors.New("field PoolID is missing")
	}
	return nil
}

// all wants every option.
func all(string) bool { return true }
