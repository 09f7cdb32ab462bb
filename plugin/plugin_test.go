package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/policy"
)

// networks is a network service that writes down what it is asked.
type networks struct {
	mu       sync.Mutex
	calls    []string
	err      error                     // answers every call, if set
	enter    func(ctx context.Context) // runs in every call, if set
	networks map[string]driver.NetworkRequest
	macs     map[string]plan.MAC // reply of CreateEndpoint by endpoint, if not its own
	ifName   string              // in the reply of Join
}

func newNetworks() *networks { return &networks{networks: map[string]driver.NetworkRequest{}} }

func (n *networks) record(ctx context.Context, format string, args ...any) error {
	if n.enter != nil {
		n.enter(ctx)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls = append(n.calls, fmt.Sprintf(format, args...))
	return n.err
}

// take gives the calls since it was last asked.
func (n *networks) take() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	calls := n.calls
	n.calls = nil
	return calls
}

func (n *networks) CreateNetwork(ctx context.Context, r driver.NetworkRequest) error {
	n.mu.Lock()
	n.networks[r.ID] = r
	n.mu.Unlock()
	text := "CreateNetwork " + brief(r.ID) + options(r.Options)
	if r.Internal {
		text += " internal"
	}
	for _, s := range slices.Concat(r.IPv4, r.IPv6) {
		text += fmt.Sprintf("\n    subnet %s gateway %s", s.Pool, orNone(s.Gateway))
		names := make([]string, 0, len(s.Auxiliary))
		for name, a := range s.Auxiliary {
			names = append(names, name+"="+a.String())
		}
		sort.Strings(names)
		if len(names) > 0 {
			text += " auxiliary " + strings.Join(names, " ")
		}
	}
	return n.record(ctx, "%s", text)
}

func (n *networks) DeleteNetwork(ctx context.Context, id string) error {
	return n.record(ctx, "DeleteNetwork %s", brief(id))
}

func (n *networks) CreateEndpoint(ctx context.Context, r driver.EndpointRequest) (driver.EndpointReply, error) {
	err := n.record(ctx, "CreateEndpoint %s on %s\n    address %s address6 %s mac %s%s", brief(r.ID), brief(r.NetworkID), orNone(r.Address), orNone(r.Address6), r.MAC, options(r.Options))
	if mac, ok := n.macs[r.ID]; ok {
		return driver.EndpointReply{MAC: mac}, err
	}
	if r.MAC != (plan.MAC{}) {
		return driver.EndpointReply{}, err
	}
	return driver.EndpointReply{MAC: plan.MAC{2, 0x42, 0, 0, 0, 1}}, err
}

func (n *networks) DeleteEndpoint(ctx context.Context, network, id string) error {
	return n.record(ctx, "DeleteEndpoint %s on %s", brief(id), brief(network))
}

func (n *networks) Join(ctx context.Context, network, id string) (driver.JoinReply, error) {
	err := n.record(ctx, "Join %s on %s", brief(id), brief(network))
	n.mu.Lock()
	defer n.mu.Unlock()
	reply := driver.JoinReply{SrcName: "dwc" + id[:min(11, len(id))], DstPrefix: "eth", DstName: n.ifName}
	if r, ok := n.networks[network]; ok && !r.Internal {
		for _, s := range r.IPv4 {
			reply.Gateway = s.Gateway
		}
		for _, s := range r.IPv6 {
			reply.Gateway6 = s.Gateway
		}
	}
	return reply, err
}

func (n *networks) Leave(ctx context.Context, network, id string) error {
	return n.record(ctx, "Leave %s on %s", brief(id), brief(network))
}

func (n *networks) Publish(ctx context.Context, network, id string, ports []policy.PortMapping) error {
	text := []string{fmt.Sprintf("Publish %s on %s", brief(id), brief(network))}
	for _, p := range ports {
		text = append(text, p.String())
	}
	return n.record(ctx, "%s", strings.Join(text, "\n    "))
}

func (n *networks) Unpublish(ctx context.Context, network, id string) error {
	return n.record(ctx, "Unpublish %s on %s", brief(id), brief(network))
}

func (n *networks) Status() driver.Status { return driver.Status{Networks: 1, InSync: true} }
func (n *networks) Networks() []driver.NetworkInfo {
	return []driver.NetworkInfo{{ID: "n", Name: "web", Subnets: []string{"198.18.9.0/24"}, Spaces: []string{"dockway-local"}}}
}
func (n *networks) Endpoints() []driver.EndpointInfo { return nil }
func (n *networks) Ports() []driver.PortInfo {
	return []driver.PortInfo{{Network: "n", Endpoint: "e", Protocol: policy.TCP, HostPort: 8080}}
}
func (n *networks) Overlays() []driver.OverlayInfo { return nil }

// cluster is of one host, and refuses one key.
type cluster struct{}

func (cluster) Peers() []driver.PeerInfo {
	return []driver.PeerInfo{{Name: "one", ID: "one/1", State: "alive", Self: true}}
}
func (cluster) Keys() []string { return []string{"0123456789abcdef"} }
func (cluster) ChangeKey(_ context.Context, verb, key string) ([]driver.KeyReply, error) {
	if key == "bad" {
		return nil, errors.New("not a key")
	}
	return []driver.KeyReply{{Host: verb}}, nil
}

func orNone[T interface {
	IsValid() bool
	String() string
}](v T) string {
	if !v.IsValid() {
		return "none"
	}
	return v.String()
}

func options(m map[string]string) string {
	var out []string
	for k, v := range m {
		out = append(out, fmt.Sprintf("%s=%s", k, v))
	}
	sort.Strings(out)
	return strings.Join(append([]string{" options"}, out...), " ")
}

// rig is a server on a socket, and a client of it.
type rig struct {
	t         *testing.T
	networks  *networks
	addresses *addresses
	server    *Server
	socket    string
	log       *logBuffer
	client    *http.Client
	served    chan error
}

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func newRig(t *testing.T, limit time.Duration) *rig {
	t.Helper()
	r := &rig{t: t, networks: newNetworks(), addresses: newAddresses(), log: &logBuffer{}, served: make(chan error, 1)}
	logger := logrus.New()
	logger.SetOutput(r.log)
	logger.SetLevel(logrus.DebugLevel)
	log := logrus.NewEntry(logger)
	r.socket = filepath.Join(t.TempDir(), "dockway.sock")
	l, err := Listen(r.socket, log)
	if err != nil {
		t.Fatal(err)
	}
	r.server = New(Config{Networks: r.networks, Addresses: r.addresses, Cluster: cluster{}, Log: log, Limit: limit})
	go func() { r.served <- r.server.Serve(l) }()
	r.client = client(r.socket)
	t.Cleanup(func() {
		r.client.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = r.server.Shutdown(ctx) // a second time in some tests
	})
	return r
}

func client(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
}

// post asks as an engine does: without a content type.
func (r *rig) post(call, body string) (status int, reply string) {
	r.t.Helper()
	status, reply, err := r.try(call, body)
	if err != nil {
		r.t.Errorf("%s: %v", call, err)
	}
	return status, reply
}

func (r *rig) try(call, body string) (status int, reply string, err error) {
	req, err := http.NewRequest(http.MethodPost, "http://plugin.moby.localhost/"+call, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Accept", "application/vnd.docker.plugins.v1.2+json")
	resp, err := r.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, strings.TrimSpace(string(text)), err
}

// refused is the message of an error answer.
func refused(t *testing.T, reply string) string {
	t.Helper()
	var r struct{ Err string }
	if err := json.Unmarshal([]byte(reply), &r); err != nil || r.Err == "" {
		t.Errorf("answer %.200q has no Err: %v", reply, err)
	}
	return r.Err
}

const (
	netID = "15cc7e3b055806eff55bf097d5752d001cd3edf3569b2040ccbb52408096eeea"
	epID  = "5ac7619e60a39fca22433741a8e6c895bc26984c9f46dadfb3abad3acc3155e2"
	both  = `"NetworkID":"` + netID + `","EndpointID":"` + epID + `"`
)

func TestActivate(t *testing.T) {
	r := newRig(t, 0)
	status, reply := r.post("Plugin.Activate", "")
	if want := `{"Implements": ["NetworkDriver", "IpamDriver"]}`; status != 200 || reply != want {
		t.Errorf("Plugin.Activate: %d %s, want %s", status, reply, want)
	}
}

func TestCreateNetworkOptions(t *testing.T) {
	r := newRig(t, 0)
	status, reply := r.post("NetworkDriver.CreateNetwork", `{"NetworkID":"n1","Unknown":{"a":[1]},"Options":{
		"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":false,"com.docker.network.internal":false,"com.docker.network.later":{"x":1},
		"com.docker.network.generic":{"mode":"nat","disable_icc":true,"mtu":1400,"none":null,"com.docker.network.windowsshim.vlanid":"7",
			"com.docker.network.driver.mtu":"1300","com.docker.network.enable_ipv6":"true","com.docker.network.advertise_addr_ms":"5"}},
		"IPv4Data":[{"Pool":"10.1.0.0/24"},{"Pool":"fd00::1/64","Gateway":"fd00::1/64","AuxAddresses":{"b":"fd00::3/64","a":"fd00::2"}}],"IPv6Data":null}`)
	if status != 200 || reply != "{}" {
		t.Fatalf("%d %s", status, reply)
	}
	want := "CreateNetwork n1 options com.docker.network.driver.mtu=1300 com.docker.network.windowsshim.vlanid=7 disable_icc=true mode=nat mtu=1400 none=" +
		"\n    subnet 10.1.0.0/24 gateway none\n    subnet fd00::/64 gateway fd00::1 auxiliary a=fd00::2 b=fd00::3"
	if got := r.networks.take()[0]; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestCreateEndpointOptions(t *testing.T) {
	r := newRig(t, 0)
	status, reply := r.post("NetworkDriver.CreateEndpoint", `{`+both+`,"Interface":null,"Options":{
		"acl":"allow","rate":7,"com.docker.network.windowsshim.acl":"x","com.docker.network.portmap":[{"Proto":6}],"com.docker.network.endpoint.ifname":"foo0",
		"com.docker.network.endpoint.dnsservers":["1.1.1.1"],"com.docker.network.endpoint.macaddress":"AkLerQAB","com.docker.network.later":{}}}`)
	if want := `{"Interface":{"MacAddress":"02:42:00:00:00:01"}}`; status != 200 || reply != want {
		t.Fatalf("%d %s, want %s", status, reply, want)
	}
	want := "CreateEndpoint 5ac7619e60a3 on 15cc7e3b0558\n    address none address6 none mac 00:00:00:00:00:00" +
		" options acl=allow com.docker.network.endpoint.ifname=foo0 com.docker.network.windowsshim.acl=x rate=7"
	if got := r.networks.take()[0]; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// The engine refuses what it already has, even if it is the same.
func TestCreateEndpointAnswersNoMoreThanAsked(t *testing.T) {
	r := newRig(t, 0)
	r.networks.macs = map[string]plan.MAC{epID: {2, 0x42, 0, 0, 0, 9}}
	for iface, want := range map[string]string{
		`{"Address":"10.1.0.2/24","AddressIPv6":"","MacAddress":"02:42:00:00:00:09"}`: `{"Interface":{}}`,
		`{"Address":"10.1.0.2/24","AddressIPv6":"fd00::2/64","MacAddress":""}`:        `{"Interface":{"MacAddress":"02:42:00:00:00:09"}}`,
	} {
		if status, reply := r.post("NetworkDriver.CreateEndpoint", `{`+both+`,"Interface":`+iface+`}`); status != 200 || reply != want {
			t.Errorf("%s: %d %s, want %s", iface, status, reply, want)
		}
	}
}

func TestJoinAnswers(t *testing.T) {
	r := newRig(t, 0)
	v4 := []mode.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24"), Gateway: netip.MustParseAddr("10.1.0.1")}}
	v6 := []mode.Subnet{{Pool: netip.MustParsePrefix("fd00::/64"), Gateway: netip.MustParseAddr("fd00::1")}}
	const name = `{"InterfaceName":{"SrcName":"dwc5ac7619e60a","DstPrefix":"eth"},`
	for _, c := range []struct {
		network driver.NetworkRequest
		want    string
	}{
		{driver.NetworkRequest{Internal: true, IPv4: v4}, name + `"DisableGatewayService":false}`},
		{driver.NetworkRequest{IPv4: v4}, name + `"Gateway":"10.1.0.1","DisableGatewayService":false}`},
		{driver.NetworkRequest{IPv6: v6}, name + `"GatewayIPv6":"fd00::1","DisableGatewayService":false}`},
		{driver.NetworkRequest{IPv4: v4, IPv6: v6}, name + `"Gateway":"10.1.0.1","GatewayIPv6":"fd00::1","DisableGatewayService":false}`},
	} {
		r.networks.networks[netID] = c.network
		if status, reply := r.post("NetworkDriver.Join", `{`+both+`,"SandboxKey":"/run/docker/netns/1c92f04f2e38","Options":{}}`); status != 200 || reply != c.want {
			t.Errorf("%d %s, want %s", status, reply, c.want)
		}
	}
	r.networks.ifName = "lan0"
	want := `{"InterfaceName":{"SrcName":"dwc5ac7619e60a","DstPrefix":"eth","DstName":"lan0"}`
	if status, reply := r.post("NetworkDriver.Join", `{`+both+`}`); status != 200 || !strings.HasPrefix(reply, want) {
		t.Errorf("%d %s, want %s", status, reply, want)
	}
}

func TestPublish(t *testing.T) {
	r := newRig(t, 0)
	status, reply := r.post("NetworkDriver.ProgramExternalConnectivity", `{`+both+`,"Options":{"com.docker.network.driver.private.no_proxy_6to4":true,
		"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8090},
		{"Proto":17,"Port":53,"HostIP":"127.0.0.1","HostPort":0},{"Proto":132,"Port":1,"HostIP":"::","HostPort":7,"HostPortEnd":7},{"Proto":6,"Port":2,"HostIP":"::ffff:1.2.3.4"}]}}`)
	if status != 200 || reply != "{}" {
		t.Fatalf("%d %s", status, reply)
	}
	want := "Publish 5ac7619e60a3 on 15cc7e3b0558\n    *:8080-8090:80/tcp\n    127.0.0.1:0:53/udp\n    :::7:1/sctp\n    1.2.3.4:0:2/tcp"
	if got := r.networks.take()[0]; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for _, options := range []string{`null`, `{}`, `{"com.docker.network.portmap":null}`, `{"com.docker.network.portmap":[]}`} {
		if status, reply := r.post("NetworkDriver.ProgramExternalConnectivity", `{`+both+`,"Options":`+options+`}`); status != 200 {
			t.Errorf("options %s: %d %s", options, status, reply)
		}
		if got, want := r.networks.take(), "Publish 5ac7619e60a3 on 15cc7e3b0558"; len(got) != 1 || got[0] != want {
			t.Errorf("options %s: %q, want %s", options, got, want)
		}
	}
}

func TestAllocateNetworkEchoesOptions(t *testing.T) {
	r := newRig(t, 0)
	if status, reply := r.post("NetworkDriver.AllocateNetwork", `{"NetworkID":"n1","Options":{"mode":"overlay","vsid":"5001"},"IPv6Data":null}`); status != 200 || reply != `{"Options":{"mode":"overlay","vsid":"5001"}}` {
		t.Errorf("%d %s", status, reply)
	}
	if got := r.networks.take(); got != nil {
		t.Errorf("the network service was asked: %q", got)
	}
}

func TestErrorsOfTheServiceReachTheEngine(t *testing.T) {
	r := newRig(t, 0)
	r.networks.err = fmt.Errorf("host port 0.0.0.0:8080/tcp is in use by nginx")
	for _, call := range []string{"CreateEndpoint", "DeleteEndpoint", "Join", "Leave", "ProgramExternalConnectivity", "RevokeExternalConnectivity", "CreateNetwork", "DeleteNetwork"} {
		status, reply := r.post("NetworkDriver."+call, `{`+both+`}`)
		if got := refused(t, reply); status != 500 || got != r.networks.err.Error() {
			t.Errorf("%s: %d %s", call, status, got)
		}
	}
	if !strings.Contains(r.log.String(), `level=warning msg="call failed" about="endpoint 5ac7619e60a3 on network 15cc7e3b0558" call=NetworkDriver.Join error="host port 0.0.0.0:8080/tcp is in use by nginx" took=`) {
		t.Errorf("log:\n%s", r.log)
	}
}

func TestInspection(t *testing.T) {
	r := newRig(t, 0)
	for path, want := range map[string]string{
		StatusPath:    `{"networks":1,"endpoints":0,"ports":0,"in_sync":true,"problem":"","repairs":0,"warnings":null,"registered":false,"goroutines":0}`,
		NetworksPath:  `[{"id":"n","name":"web","mode":"","subnets":["198.18.9.0/24"],"address_spaces":["dockway-local"],"bridge":"","endpoints":0,"internal":false,"mtu":0}]`,
		EndpointsPath: `[]`,
		PortsPath:     `[{"network":"n","endpoint":"e","proto":"tcp","host_ip":"","host_port":8080,"container_ip":"","container_port":0}]`,
		OverlaysPath:  `[]`,
		PeersPath:     `[{"name":"one","id":"one/1","address":"","state":"alive","rtt_ns":0,"facts":0,"version":"","self":true}]`,
		KeysPath:      `["0123456789abcdef"]`,
	} {
		resp, err := r.client.Get("http://dockway/" + path)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		text = regexp.MustCompile(`"goroutines":[1-9]\d*`).ReplaceAll(text, []byte(`"goroutines":0`))
		if err != nil || resp.StatusCode != 200 || string(text) != want {
			t.Errorf("%s: %d %s %v, want %s", path, resp.StatusCode, text, err, want)
		}
		if status, reply := r.post(path, "{}"); status != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: %d %s", path, status, reply)
		}
	}
}

// TestGoroutines: the status counts them all.
func TestGoroutines(t *testing.T) {
	r := newRig(t, 0)
	const more = 200 // more than what other tests leave behind, and is just ending
	wait := make(chan struct{})
	defer close(wait)
	for range more {
		go func() { <-wait }()
	}
	resp, err := r.client.Get("http://dockway/" + StatusPath)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // only read
	var s Status
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil || s.Goroutines <= more {
		t.Errorf("%d more goroutines, and the status counts %d, %v", more, s.Goroutines, err)
	}
}

// TestRegistered: an engine that asks what the drivers can do has taken note of this process.
func TestRegistered(t *testing.T) {
	r := newRig(t, 0)
	for _, ask := range []struct {
		call string
		want bool
	}{{"NetworkDriver.GetCapabilities", false}, {"IpamDriver.GetCapabilities", true}} {
		if status, reply := r.post(ask.call, "{}"); status != http.StatusOK {
			t.Fatalf("%s: %d %s", ask.call, status, reply)
		}
		if got := r.server.known.Load(); got != ask.want {
			t.Errorf("after %s it is registered: %t, want %t", ask.call, got, ask.want)
		}
	}
}

// TestChangeKey: what each host made of a change is told, and the log never has the key.
func TestChangeKey(t *testing.T) {
	r := newRig(t, 0)
	if status, reply := r.post(ChangeKeyPath, `{"verb":"use","key":"c2VjcmV0"}`); status != http.StatusOK || reply != `[{"host":"use","error":""}]` {
		t.Errorf("use: %d %s", status, reply)
	}
	if status, reply := r.post(ChangeKeyPath, `{"verb":"add","key":"bad"}`); status != http.StatusInternalServerError || refused(t, reply) != "not a key" {
		t.Errorf("a bad key: %d %s", status, reply)
	}
	if status, reply := r.post(ChangeKeyPath, `{"verb":7}`); status != http.StatusBadRequest {
		t.Errorf("a verb that is a number: %d %s", status, reply)
	}
	if strings.Contains(r.log.String(), "c2VjcmV0") {
		t.Errorf("the log has the key:\n%s", r.log)
	}
}

// 64 calls at once: each is answered for itself, and the counts fit.
func TestConcurrentCalls(t *testing.T) {
	r := newRig(t, 0)
	var group sync.WaitGroup
	var together sync.WaitGroup
	together.Add(64)
	r.networks.enter = func(context.Context) { together.Done(); together.Wait() }
	for i := range 64 {
		group.Go(func() {
			id := fmt.Sprintf("e%d", i)
			status, reply, err := r.try("NetworkDriver.Join", `{"NetworkID":"n1","EndpointID":"`+id+`"}`)
			if want := `"SrcName":"dwc` + id + `"`; err != nil || status != 200 || !strings.Contains(reply, want) {
				t.Errorf("%s: %d %s %v", id, status, reply, err)
			}
		})
	}
	group.Wait()
	if got := len(r.networks.take()); got != 64 {
		t.Errorf("%d calls arrived, want 64", got)
	}
}
