package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/dockway/dockway/ipam"
)

// addresses is an address manager that writes down what it is asked.
type addresses struct {
	mu    sync.Mutex
	calls []string
	err   error // answers every call, if set
	data  map[string]string
	next  netip.Addr
}

func newAddresses() *addresses { return &addresses{next: netip.MustParseAddr("10.50.1.0")} }

func (a *addresses) record(format string, args ...any) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, fmt.Sprintf(format, args...))
	return a.err
}

func (a *addresses) take() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	calls := a.calls
	a.calls = nil
	return calls
}

func (a *addresses) RequestPool(_ context.Context, r ipam.PoolRequest) (ipam.PoolReply, error) {
	err := a.record("RequestPool space=%s pool=%s range=%s v6=%t%s", r.Space, r.Pool, r.SubPool, r.V6, options(r.Options))
	if err != nil {
		return ipam.PoolReply{}, err
	}
	return ipam.PoolReply{ID: "pool-1", Pool: netip.MustParsePrefix("10.50.0.0/16"), Data: a.data}, nil
}

func (a *addresses) ReleasePool(_ context.Context, id string) error {
	return a.record("ReleasePool %s", id)
}

func (a *addresses) RequestAddress(_ context.Context, r ipam.AddressRequest) (netip.Prefix, error) {
	whose := ""
	if r.Endpoint {
		whose = " of an endpoint"
	}
	err := a.record("RequestAddress pool=%s address=%s%s%s", r.PoolID, r.Address, whose, options(r.Options))
	if err != nil {
		return netip.Prefix{}, err
	}
	given, err := netip.ParseAddr(r.Address)
	if err != nil {
		a.next = a.next.Next()
		given = a.next
	}
	return netip.PrefixFrom(given, 16), nil
}

func (a *addresses) ReleaseAddress(_ context.Context, pool, address string) error {
	return a.record("ReleaseAddress pool=%s address=%s", pool, address)
}

func TestIPAMAnswers(t *testing.T) {
	r := newRig(t, 0)
	for _, c := range []struct{ call, body, asked, want string }{
		{"GetCapabilities", ``, "", `{"RequiresMACAddress":false,"RequiresRequestReplay":false}`},
		{"GetDefaultAddressSpaces", ``, "", `{"LocalDefaultAddressSpace":"dockway-local","GlobalDefaultAddressSpace":"dockway-global"}`},
		{"RequestPool", `{"AddressSpace":"dockway-local","Pool":"","SubPool":"","Options":null,"V6":true,"Later":1}`,
			"RequestPool space=dockway-local pool= range= v6=true options", `{"PoolID":"pool-1","Pool":"10.50.0.0/16"}`},
		{"RequestPool", `{"AddressSpace":"x","Pool":"10.50.0.0/16","SubPool":"10.50.1.0/24","Options":{"a":"b","n":1},"V6":false}`,
			"RequestPool space=x pool=10.50.0.0/16 range=10.50.1.0/24 v6=false options a=b n=1", `{"PoolID":"pool-1","Pool":"10.50.0.0/16"}`},
		{"RequestAddress", `{"PoolID":"pool-1","Address":"10.50.0.1","Options":{"RequestAddressType":"com.docker.network.gateway"}}`,
			"RequestAddress pool=pool-1 address=10.50.0.1 options RequestAddressType=com.docker.network.gateway", `{"Address":"10.50.0.1/16"}`},
		{"RequestAddress", `{"PoolID":"pool-1","Address":"198.18.9.9","Options":null}`, // on a network that exists
			"RequestAddress pool=pool-1 address=198.18.9.9 of an endpoint options", `{"Address":"198.18.9.9/16"}`},
		{"RequestAddress", `{"PoolID":"pool-1","Address":"","Options":null}`,
			"RequestAddress pool=pool-1 address= options", `{"Address":"10.50.1.1/16"}`},
		{"ReleaseAddress", `{"PoolID":"pool-1","Address":"10.50.0.1"}`, "ReleaseAddress pool=pool-1 address=10.50.0.1", `{}`},
		{"ReleasePool", `{"PoolID":"pool-1"}`, "ReleasePool pool-1", `{}`},
	} {
		status, reply := r.post("IpamDriver."+c.call, c.body)
		if status != 200 || reply != c.want {
			t.Errorf("%s %s: %d %s, want %s", c.call, c.body, status, reply, c.want)
		}
		if got := strings.Join(r.addresses.take(), "\n"); got != c.asked {
			t.Errorf("%s %s:\ngot  %s\nwant %s", c.call, c.body, got, c.asked)
		}
	}
}

func TestIPAMData(t *testing.T) {
	r := newRig(t, 0)
	r.addresses.data = map[string]string{"com.docker.network.gateway": "10.50.0.1/16"}
	status, reply := r.post("IpamDriver.RequestPool", `{"AddressSpace":"x"}`)
	if want := `{"PoolID":"pool-1","Pool":"10.50.0.0/16","Data":{"com.docker.network.gateway":"10.50.0.1/16"}}`; status != 200 || reply != want {
		t.Errorf("%d %s, want %s", status, reply, want)
	}
}

func TestErrorsOfTheAddressManagerReachTheEngine(t *testing.T) {
	r := newRig(t, 0)
	r.addresses.err = errors.New("address 10.50.0.9 in pool p is taken: it is the gateway")
	for _, call := range []string{"RequestPool", "ReleasePool", "RequestAddress", "ReleaseAddress"} {
		status, reply := r.post("IpamDriver."+call, `{"AddressSpace":"x","PoolID":"p","Address":"10.50.0.9"}`)
		if got := refused(t, reply); status != 500 || got != r.addresses.err.Error() {
			t.Errorf("%s: %d %s", call, status, got)
		}
	}
}

func TestMalformedIPAMRequests(t *testing.T) {
	r := newRig(t, 0)
	for _, c := range []struct{ call, body, want string }{
		{"RequestPool", `{"Pool":"10.0.0.0/8"}`, "request pool 10.0.0.0/8: field AddressSpace is missing"},
		{"RequestPool", `{"AddressSpace":1}`, "request a pool: field AddressSpace is number: a string is needed"},
		{"RequestPool", `{"AddressSpace":"x","V6":"yes"}`, "request a pool: field V6 is string: true or false is needed"},
		{"RequestPool", `{"AddressSpace":"x","V6":true,"SubPool":{}}`, "request a pool for IPv6: field SubPool is object: a string is needed"},
		{"RequestPool", `{"AddressSpace":"x","Options":["a"]}`, "field Options is array: an object is needed"},
		{"RequestPool", `{"AddressSpace":"x","Options":{"a":{"b":"c"}}}`, `option "a" has structure: a string is needed`},
		{"ReleasePool", `{"PoolID":["x"]}`, "field PoolID is array: a string is needed"},
		{"RequestAddress", `{"Address":"10.0.0.1"}`, "field PoolID is missing"},
		{"RequestAddress", `{"PoolID":"p","Address":7}`, "request an address of pool p: field Address is number: a string is needed"},
		{"RequestAddress", `{"PoolID":"p","Address":"10.0.0.1","Options":{"a":[]}}`, `request address 10.0.0.1 of pool p: option "a" has structure`},
		{"ReleaseAddress", `{"PoolID":"p"}`, "release an address of pool p: field Address is missing"},
		{"ReleaseAddress", `{"PoolID":"p","Address":"` + strings.Repeat("1\n", 1000) + `"`, "not valid JSON"},
		{"ReleaseAddress", `{"Address":"` + strings.Repeat(`1\n`, 1000) + `"}`, "field PoolID is missing"},
	} {
		status, reply := r.post("IpamDriver."+c.call, c.body)
		got := refused(t, reply)
		if status != 400 || !strings.Contains(got, c.want) {
			t.Errorf("%s %.200s:\ngot  %d %.300s\nwant %s", c.call, c.body, status, got, c.want)
		}
		if len(got) > 500 || strings.Contains(got, "\n") {
			t.Errorf("%s %.200s: not a short line: %q", c.call, c.body, got)
		}
	}
	if calls := r.addresses.take(); calls != nil {
		t.Errorf("a malformed request was carried out: %q", calls)
	}
}

func FuzzRequestPool(f *testing.F) {
	seed(f, "RequestPool")
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := decodeRequestPool(body)
		_ = r.String()
		if err != nil {
			checkError(t, err)
		} else if r.Space == "" {
			t.Error("no address space let through")
		}
	})
}

func FuzzAddresses(f *testing.F) {
	for _, call := range []string{"RequestAddress", "ReleaseAddress", "ReleasePool"} {
		seed(f, call)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		a, err := decodeRequestAddress(body)
		check(t, a.PoolID, a.String(), err)
		b, err := decodeReleaseAddress(body)
		check(t, b.PoolID, b.String(), err)
		c, err := decodeReleasePool(body)
		check(t, c.PoolID, c.String(), err)
	})
}

func check(t *testing.T, poolID, about string, err error) {
	t.Helper()
	if strings.ContainsAny(about, "\n\r\x00") {
		t.Errorf("the log would get %q", about)
	}
	if err != nil {
		checkError(t, err)
	} else if poolID == "" {
		t.Error("no pool let through")
	}
}
