package plugin

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// withBody are the calls that mean nothing without a body.
var withBody = []string{
	"NetworkDriver.AllocateNetwork", "NetworkDriver.FreeNetwork", "NetworkDriver.CreateNetwork", "NetworkDriver.DeleteNetwork",
	"NetworkDriver.CreateEndpoint", "NetworkDriver.EndpointOperInfo", "NetworkDriver.DeleteEndpoint", "NetworkDriver.Join", "NetworkDriver.Leave",
	"NetworkDriver.ProgramExternalConnectivity", "NetworkDriver.RevokeExternalConnectivity",
	"IpamDriver.RequestPool", "IpamDriver.ReleasePool", "IpamDriver.RequestAddress", "IpamDriver.ReleaseAddress",
	ChangeKeyPath,
}

// What is wrong for every call alike.
func TestMalformedBodies(t *testing.T) {
	r := newRig(t, 0)
	for _, call := range withBody {
		for _, c := range []struct{ name, body, want string }{
			{"empty", "", "the request's body is empty"},
			{"blank", " \n\t", "the request's body is empty"},
			{"null", "null", "a JSON object is needed"},
			{"array", "[]", "a JSON object is needed"},
			{"string", `"x"`, "a JSON object is needed"},
			{"number", "7", "a JSON object is needed"},
			{"cut off", `{"NetworkID":"n1"`, "not valid JSON at byte"},
			{"trailing", `{"NetworkID":"n1"} {"NetworkID":"n2"}`, "not valid JSON at byte"},
			{"trailing garbage", `{"NetworkID":"n1","PoolID":"x"}garbage`, "not valid JSON at byte"},
			{"binary", "{\x00\x01\xff}", "not valid JSON at byte"},
			{"nested", `{"Options":` + strings.Repeat(`{"a":`, 100_000) + `1` + strings.Repeat("}", 100_000) + `}`, "exceeded max depth"},
			{"nested elsewhere", `{"Unknown":` + strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000) + `}`, "exceeded max depth"},
			{"nothing said", `{}`, " is missing"},
		} {
			if call == "IpamDriver.RequestPool" && c.name == "nothing said" {
				c.want = "AddressSpace"
			}
			status, reply := r.post(call, c.body)
			got := refused(t, reply)
			if status != http.StatusBadRequest || !strings.Contains(got, c.want) {
				t.Errorf("%s, %s: %d %.300s, want %s", call, c.name, status, got, c.want)
			}
			if len(got) > 500 {
				t.Errorf("%s, %s: the message has %d bytes", call, c.name, len(got))
			}
		}
	}
	if calls := append(r.networks.take(), r.addresses.take()...); calls != nil {
		t.Errorf("a malformed request was carried out: %q", calls)
	}
}

func TestHugeBodies(t *testing.T) {
	r := newRig(t, 0)
	for name, body := range map[string]string{
		"a name":  `{"NetworkID":"` + strings.Repeat("n", maxBody) + `"}`,
		"nothing": strings.Repeat(" ", maxBody+1),
	} {
		status, reply := r.post("NetworkDriver.DeleteNetwork", body)
		if got := refused(t, reply); status != http.StatusBadRequest || !strings.Contains(got, "more than 16777216 bytes") {
			t.Errorf("%s: %d %s", name, status, got)
		}
	}
	if calls := r.networks.take(); calls != nil {
		t.Errorf("a huge request was carried out: %q", calls)
	}
}

// A container can publish every port there is.
func TestPublishEveryPort(t *testing.T) {
	r := newRig(t, time.Minute) // what it takes is not what is asked here
	var exposed, mapped strings.Builder
	for _, proto := range []int{6, 17} {
		for port := 1; port <= 65535; port++ {
			fmt.Fprintf(&exposed, `,{"Proto":%d,"Port":%d}`, proto, port)
			fmt.Fprintf(&mapped, `,{"Proto":%d,"IP":"","Port":%d,"HostIP":"","HostPort":%d,"HostPortEnd":%d}`, proto, port, port, port)
		}
	}
	body := `{` + both + `,"Options":{"com.docker.network.endpoint.exposedports":[` + exposed.String()[1:] + `],"com.docker.network.portmap":[` + mapped.String()[1:] + `]}}`
	if status, reply := r.post("NetworkDriver.ProgramExternalConnectivity", body); status != 200 {
		t.Fatalf("%d %.300s", status, reply)
	}
	if got := strings.Count(r.networks.take()[0], "\n"); got != 2*65535 {
		t.Errorf("%d ports arrived, want %d", got, 2*65535)
	}
}

func TestMalformedRequests(t *testing.T) {
	const (
		createNetwork  = "NetworkDriver.CreateNetwork"
		createEndpoint = "NetworkDriver.CreateEndpoint"
		join           = "NetworkDriver.Join"
		program        = "NetworkDriver.ProgramExternalConnectivity"
	)
	network := func(rest string) string { return `{"NetworkID":"` + netID + `",` + rest + `}` }
	endpoint := func(rest string) string { return `{` + both + `,` + rest + `}` }
	ports := func(rest string) string {
		return endpoint(`"Options":{"com.docker.network.portmap":` + rest + `}`)
	}
	r := newRig(t, 0)
	for _, c := range []struct{ call, body, want string }{
		{createNetwork, `{"NetworkID":7}`, "create: field NetworkID is number: a string is needed"},
		{createNetwork, `{"NetworkID":"../../etc"}`, `field NetworkID is "../../etc": an ID has`},
		{createNetwork, `{"NetworkID":"` + strings.Repeat("n", 129) + `"}`, "an ID has up to 128 letters and digits"},
		{createNetwork, network(`"Options":[]`), "create network 15cc7e3b0558: field Options is array: an object is needed"},
		{createNetwork, network(`"Options":{"com.docker.network.generic":"x"}`), "option com.docker.network.generic: the value is string: an object is needed"},
		{createNetwork, network(`"Options":{"com.docker.network.internal":"yes"}`), "option com.docker.network.internal: the value is string: true or false is needed"},
		{createNetwork, network(`"Options":{"com.docker.network.generic":{"mtu":{"a":1}}}`), `option "mtu" has structure: a string is needed`},
		{createNetwork, network(`"Options":{"com.docker.network.generic":{"mtu":[1]}}`), `option "mtu" has structure: a string is needed`},
		{createNetwork, network(`"IPv4Data":{}`), "field IPv4Data is object: an array is needed"},
		{createNetwork, network(`"IPv4Data":[{"Pool":7}]`), "field IPv4Data.Pool is number: a string is needed"},
		{createNetwork, network(`"IPv4Data":[{}]`), `field Pool: "" is not a subnet such as 10.80.0.0/24`},
		{createNetwork, network(`"IPv4Data":[null]`), `field Pool: "" is not a subnet such as 10.80.0.0/24`},
		{createNetwork, network(`"IPv4Data":[{"Pool":"10.0.0.0/33"}]`), `field Pool: "10.0.0.0/33" is not a subnet`},
		{createNetwork, network(`"IPv6Data":[{"Pool":"::ffff:10.0.0.0/104"}]`), `is not a subnet`},
		{createNetwork, network(`"IPv6Data":[{"Pool":"fe80::%eth0/64"}]`), `is not a subnet`},
		{createNetwork, network(`"IPv4Data":[{"Pool":"10.0.0.0/24","Gateway":"x"}]`), `field Gateway of 10.0.0.0/24: "x" is not an address`},
		{createNetwork, network(`"IPv4Data":[{"Pool":"10.0.0.0/24","Gateway":"10.0.0.1/99"}]`), `"10.0.0.1/99" is not an address`},
		{createNetwork, network(`"IPv4Data":[{"Pool":"10.0.0.0/24","Gateway":"10.0.1.1/24"}]`), `10.0.1.1 is not in the subnet`},
		{createNetwork, network(`"IPv4Data":[{"Pool":"10.0.0.0/24","AuxAddresses":{"r":"10.0.1.1/24"}}]`), `field AuxAddresses of 10.0.0.0/24: "r": 10.0.1.1 is not in the subnet`},
		{createNetwork, network(`"IPv4Data":[{"Pool":"10.0.0.0/24","AuxAddresses":["10.0.0.1"]}]`), `field IPv4Data.AuxAddresses is array: an object is needed`},

		{createEndpoint, `{"NetworkID":"n1"}`, "create network n1: field EndpointID is missing"},
		{createEndpoint, `{"NetworkID":"n1","EndpointID":"a b"}`, `field EndpointID is "a b"`},
		{createEndpoint, endpoint(`"Interface":[]`), "create endpoint 5ac7619e60a3 on network 15cc7e3b0558: field Interface is array: an object is needed"},
		{createEndpoint, endpoint(`"Interface":{"Address":"10.0.0.2"}`), `field Interface.Address: "10.0.0.2" is not an address with its subnet's length such as`},
		{createEndpoint, endpoint(`"Interface":{"Address":"fd00::2/64"}`), `field Interface.Address: fd00::2/64 is not an IPv4 address`},
		{createEndpoint, endpoint(`"Interface":{"AddressIPv6":"10.0.0.2/24"}`), `field Interface.AddressIPv6: 10.0.0.2/24 is not an IPv6 address`},
		{createEndpoint, endpoint(`"Interface":{"AddressIPv6":"::ffff:10.0.0.2/100"}`), `is not an address with its subnet's length`},
		{createEndpoint, endpoint(`"Interface":{"MacAddress":"02:42"}`), `field Interface.MacAddress: "02:42" is not an Ethernet address`},
		{createEndpoint, endpoint(`"Interface":{"MacAddress":"02:42:00:00:00:00:00:01"}`), `is not an Ethernet address`},
		{createEndpoint, endpoint(`"Interface":{"MacAddress":"01:00:5e:00:00:01"}`), `is not the address of one host`},
		{createEndpoint, endpoint(`"Interface":{"MacAddress":"ff:ff:ff:ff:ff:ff"}`), `is not the address of one host`},
		{createEndpoint, endpoint(`"Interface":{"MacAddress":"00:00:00:00:00:00"}`), `is not the address of one host`},
		{createEndpoint, endpoint(`"Interface":{"MacAddress":{"a":1}}`), `field Interface.MacAddress is object: a string is needed`},
		{createEndpoint, endpoint(`"Options":{"acl":["x"]}`), `option "acl" has structure`},

		{join, endpoint(`"NetworkID":false`), "field NetworkID is bool: a string is needed"},
		{program, endpoint(`"Options":7`), "field Options is number: an object is needed"},
		{program, ports(`{}`), "publish ports of endpoint 5ac7619e60a3 on network 15cc7e3b0558: option com.docker.network.portmap: the value is object: an array is needed"},
		{program, ports(`[{"Proto":"tcp"}]`), "Proto is string: a whole number is needed"},
		{program, ports(`[{"Proto":6.5}]`), "Proto is number 6.5: a whole number is needed"},
		{program, ports(`[{"Proto":1e99}]`), "a whole number is needed"},
		{program, ports(`[{"Proto":6,"Port":65536}]`), "Port is number 65536: a whole number from 0 to 65535 is needed"},
		{program, ports(`[{"Proto":6,"Port":-1}]`), "a whole number from 0 to 65535 is needed"},
		{program, ports(`[{"Proto":6,"Port":` + strings.Repeat("9", 10_000) + `}]`), "a whole number from 0 to 65535 is needed"},
		{program, ports(`[{"Proto":6,"Port":0}]`), "container port 0 is not a port"},
		{program, ports(`[{"Proto":1,"Port":80}]`), "container port 80: protocol number 1 cannot be published: use tcp (6), udp (17) or sctp (132)"},
		{program, ports(`[{"Proto":6,"Port":80,"HostPort":9,"HostPortEnd":8}]`), "host port range ends before it begins"},
		{program, ports(`[{"Proto":6,"Port":80,"HostIP":"here"}]`), `container port 80/tcp: host address "here" is not an address`},
		{program, ports(`[{"Proto":6,"Port":80,"HostIP":"224.0.0.1"}]`), "not an address that a host can own"},
		{program, ports(`[{"Proto":6,"Port":80,"HostIP":"fe80::1%eth0"}]`), "not an address that a host can own"},
	} {
		status, reply := r.post(c.call, c.body)
		got := refused(t, reply)
		if status != http.StatusBadRequest || !strings.Contains(got, c.want) {
			t.Errorf("%s %.200s:\ngot  %d %.300s\nwant %s", c.call, c.body, status, got, c.want)
		}
		if len(got) > 500 {
			t.Errorf("%s %.200s: the message has %d bytes", c.call, c.body, len(got))
		}
	}
	if calls := r.networks.take(); calls != nil {
		t.Errorf("a malformed request was carried out: %q", calls)
	}
}

// Calls whose body does not matter are answered whatever it is.
func TestBodiesThatDoNotMatter(t *testing.T) {
	r := newRig(t, 0)
	for _, call := range []string{"NetworkDriver.GetCapabilities", "IpamDriver.GetCapabilities", "IpamDriver.GetDefaultAddressSpaces", "NetworkDriver.DiscoverNew", "NetworkDriver.DiscoverDelete"} {
		for _, body := range []string{"", "{}", "null", "garbage"} {
			if status, reply := r.post(call, body); status != 200 {
				t.Errorf("%s %q: %d %s", call, body, status, reply)
			}
		}
	}
}

func TestUnknownCallsAndMethods(t *testing.T) {
	r := newRig(t, 0)
	status, reply := r.post("NetworkDriver.GwAllocCheck", "{}")
	if got := refused(t, reply); status != http.StatusNotFound || got != `dockway has no call "/NetworkDriver.GwAllocCheck"` {
		t.Errorf("%d %s", status, got)
	}
	resp, err := r.client.Get("http://x/NetworkDriver.Join")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed || resp.Header.Get("Allow") != http.MethodPost {
		t.Errorf("GET: %d, allowed %q", resp.StatusCode, resp.Header.Get("Allow"))
	}
}
