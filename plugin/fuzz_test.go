package plugin

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
)

// seed gives a fuzz target the bodies that real engines sent with a call, and broken ones.
func seed(f *testing.F, call string) {
	f.Helper()
	for _, path := range traces(f) {
		for _, l := range trace(f, path) {
			if strings.HasSuffix(l.Call, "."+call) {
				f.Add([]byte(l.Req))
			}
		}
	}
	for _, s := range []string{
		"", "null", "{}", "[]", `{"NetworkID":7}`, `{"NetworkID":"n"}{}`, `{"NetworkID":"n","EndpointID":"e","Options":{"a":[[[]]]}}`,
		`{"NetworkID":"n","IPv4Data":[{"Pool":"::/0","Gateway":"::1","AuxAddresses":{"":"::"}}],"Options":{"com.docker.network.generic":{"":null,"x":1e9}}}`,
		`{"NetworkID":"n","EndpointID":"e","Interface":{"Address":"0.0.0.0/0","MacAddress":"0242.0000.0001"}}`,
		`{"NetworkID":"n","EndpointID":"e","Options":{"com.docker.network.portmap":[{"Proto":132,"Port":65535,"HostIP":"::ffff:0.0.0.0","HostPortEnd":1}]}}`,
	} {
		f.Add([]byte(s))
	}
}

// checkError holds for every refusal: it is one short line.
func checkError(t *testing.T, err error) {
	t.Helper()
	if msg := err.Error(); len(msg) > 600 || strings.ContainsAny(msg, "\n\r\x00") {
		t.Errorf("not a short line: %q", msg)
	}
}

func checkIDs(t *testing.T, ids ...string) {
	t.Helper()
	for _, id := range ids {
		if !identifier.MatchString(id) {
			t.Errorf("ID %q let through", id)
		}
	}
}

func FuzzCreateNetwork(f *testing.F) {
	seed(f, "CreateNetwork")
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := decodeCreateNetwork(body)
		_ = r.String()
		if err != nil {
			checkError(t, err)
			return
		}
		checkIDs(t, r.ID)
		check := func(subnets []mode.Subnet, v4 bool) {
			for _, s := range subnets {
				if !s.Pool.IsValid() || s.Pool != s.Pool.Masked() || s.Pool.Addr().Is4() != v4 {
					t.Errorf("pool %s let through", s.Pool)
				}
				for _, a := range append([]netip.Addr{s.Gateway}, values(s.Auxiliary)...) {
					if a.IsValid() && !s.Pool.Contains(a) {
						t.Errorf("%s let through for %s", a, s.Pool)
					}
				}
			}
		}
		check(r.IPv4, true)
		check(r.IPv6, false)
		for key := range r.Options {
			if engineOnly[key] {
				t.Errorf("option %q let through", key)
			}
		}
	})
}

func values(m map[string]netip.Addr) (out []netip.Addr) {
	for _, a := range m {
		out = append(out, a)
	}
	return out
}

func FuzzCreateEndpoint(f *testing.F) {
	seed(f, "CreateEndpoint")
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := decodeCreateEndpoint(body)
		_ = r.String()
		if err != nil {
			checkError(t, err)
			return
		}
		checkIDs(t, r.NetworkID, r.ID)
		if r.Address.IsValid() && !r.Address.Addr().Is4() || r.Address6.IsValid() && (!r.Address6.Addr().Is6() || r.Address6.Addr().Is4In6()) {
			t.Errorf("addresses %s, %s let through", r.Address, r.Address6)
		}
		if r.MAC != (plan.MAC{}) && r.MAC[0]&1 != 0 {
			t.Errorf("%s let through", r.MAC)
		}
		for key := range r.Options {
			if !forDriver(key) {
				t.Errorf("option %q let through", key)
			}
		}
	})
}

func FuzzProgramExternalConnectivity(f *testing.F) {
	seed(f, "ProgramExternalConnectivity")
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := decodeProgramExternalConnectivity(body)
		_ = r.String()
		if err != nil {
			checkError(t, err)
			return
		}
		checkIDs(t, r.NetworkID, r.EndpointID)
		for _, p := range r.Ports {
			if err := p.Validate(); err != nil || p.HostIP.Is4In6() {
				t.Errorf("%s let through: %v", p, err)
			}
		}
	})
}

// Calls that name a network, or an endpoint on it.
func FuzzRefs(f *testing.F) {
	for _, call := range []string{"Join", "Leave", "DeleteEndpoint", "EndpointOperInfo", "RevokeExternalConnectivity", "DeleteNetwork", "FreeNetwork"} {
		seed(f, call)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, decode := range []func([]byte) (ref, error){decodeJoin, decodeLeave, decodeDeleteEndpoint, decodeEndpointOperInfo, decodeRevokeExternalConnectivity} {
			r, err := decode(body)
			_ = r.String()
			if err != nil {
				checkError(t, err)
				continue
			}
			checkIDs(t, r.NetworkID, r.EndpointID)
		}
		for _, decode := range []func([]byte) (ref, error){decodeDeleteNetwork, decodeFreeNetwork} {
			r, err := decode(body)
			_ = r.String()
			if err != nil {
				checkError(t, err)
				continue
			}
			checkIDs(t, r.NetworkID)
		}
	})
}

func FuzzChangeKey(f *testing.F) {
	for _, s := range []string{"", "null", "{}", "[]", `{"verb":7}`, `{"verb":"use","key":"c2VjcmV0"}`, `{"verb":"use\nall","key":"c2VjcmV0"}`, `{"verb":"use","key":"c2VjcmV0"`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := decodeKeyRequest(body)
		if about := r.String(); len(about) > 100 || strings.ContainsAny(about, "\n\r\x00") {
			t.Errorf("the log would get %q", about)
		}
		if err != nil {
			checkError(t, err)
		} else if r.Verb == "" || r.Key == "" {
			t.Errorf("%+v let through", r)
		}
	})
}

func FuzzAllocateNetwork(f *testing.F) {
	seed(f, "AllocateNetwork")
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := decodeAllocateNetwork(body)
		if err != nil {
			checkError(t, err)
			return
		}
		checkIDs(t, r.NetworkID)
	})
}
