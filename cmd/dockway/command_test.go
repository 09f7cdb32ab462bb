package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/driver/policy"
	"github.com/dockway/dockway/driver/store"
	"github.com/dockway/dockway/plugin"
)

// run gives a command line's output.
func runCommand(env map[string]string, args ...string) (string, error) {
	cmd := root(func(key string) string { return env[key] })
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(context.Background())
	return out.String(), err
}

// answer serves fixed JSON by path on a socket.
func answer(t *testing.T, socket string, replies map[string]any) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reply, ok := replies[strings.TrimPrefix(r.URL.Path, "/")]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			reply = map[string]string{"Err": "dockway has no call " + r.URL.Path}
		}
		_ = json.NewEncoder(w).Encode(reply)
	})}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
}

const (
	webID = "15cc7e3b055806eff55bf097d5752d001cd3edf3569b2040ccbb52408096eeea"
	appID = "298a17201eb393d28e218687577ab0cca2d76d1127558c78fd8ea64a0e5a42df"
	endID = "5ac7619e60a39fca22433741a8e6c895bc26984c9f46dadfb3abad3acc3155e2"
)

func sample() map[string]any {
	return map[string]any{
		plugin.StatusPath: driver.Status{Networks: 2, Endpoints: 1, Ports: 3, Problem: "table inet dockway is missing", Repairs: 4, Warnings: []string{"IPv6 is off"}},
		plugin.NetworksPath: []driver.NetworkInfo{
			{ID: webID, Mode: "nat", Subnets: []string{"10.64.0.0/24", "fd00::/64"}, Bridge: "dwb15cc7e3b0558", Endpoints: 1, MTU: 1500},
			{ID: appID, Name: "app", Mode: "nat", Subnets: []string{"10.64.1.0/24"}, Bridge: "dwb298a17201eb3", Internal: true, MTU: 1400},
		},
		plugin.PeersPath: []driver.PeerInfo{
			{Name: "one", Address: netip.MustParseAddr("198.18.0.1"), State: "alive", Facts: 3, Version: "dev", Self: true},
			{Name: "two", Address: netip.MustParseAddr("198.18.0.2"), State: "suspect", RTT: 412345, Facts: 2, Version: "dev"},
		},
		plugin.OverlaysPath: []driver.OverlayInfo{{ID: appID, VSIDs: []uint32{5001}, Entries: []driver.OverlayItem{
			{VSID: 5001, Address: netip.MustParseAddr("10.90.0.2"), MAC: "0a:00:00:00:00:01", VTEP: netip.MustParseAddr("198.18.0.1"), Here: true},
			{VSID: 5001, Address: netip.MustParseAddr("10.90.1.2"), MAC: "0a:00:00:00:00:02", Host: "two", VTEP: netip.MustParseAddr("198.18.0.2")},
		}}},
		plugin.ChangeKeyPath: []driver.KeyReply{{Host: "one"}, {Host: "two", Error: "no answer"}},
		plugin.EndpointsPath: []driver.EndpointInfo{{ID: endID, Network: webID, Address: "10.64.0.2/24", MAC: "02:42:0a:40:00:02", Link: "dwv5ac7619e60a", State: "joined"}},
		plugin.PortsPath: []driver.PortInfo{
			{Network: webID, Endpoint: endID, Protocol: policy.TCP, HostIP: "198.18.0.1", HostPort: 8080, ContainerIP: "10.64.0.2", ContainerPort: 80},
			{Network: webID, Endpoint: endID, Protocol: policy.TCP, HostIP: "::", HostPort: 8080, ContainerIP: "fd00::2", ContainerPort: 80},
			{Network: webID, Endpoint: endID, Protocol: policy.UDP, HostIP: "127.0.0.1", HostPort: 53, ContainerIP: "10.64.0.2", ContainerPort: 53},
		},
	}
}

func TestTables(t *testing.T) {
	dir := t.TempDir()
	socket, engine := filepath.Join(dir, "dockway.sock"), filepath.Join(dir, "docker.sock")
	answer(t, socket, sample())
	answer(t, engine, map[string]any{"networks": []map[string]string{{"Id": webID, "Name": "web"}, {"Id": "f00", "Name": "bridge"}}})
	env := map[string]string{"DOCKWAY_SOCKET": socket, "DOCKER_HOST": "unix://" + engine}
	for _, c := range []struct{ command, want string }{
		{"status", `networks   2
endpoints  1
ports      3
in sync    no: table inet dockway is missing
repairs    4
warning    IPv6 is off
`},
		{"networks", `NAME  NETWORK ID    MODE  SUBNETS                 BRIDGE           MTU   INTERNAL  ENDPOINTS
app   298a17201eb3  nat   10.64.1.0/24            dwb298a17201eb3  1400  yes       0
web   15cc7e3b0558  nat   10.64.0.0/24,fd00::/64  dwb15cc7e3b0558  1500  no        1
`},
		{"endpoints", `NETWORK  ENDPOINT ID   ADDRESS       IPV6 ADDRESS  MAC                LINK            STATE
web      5ac7619e60a3  10.64.0.2/24  -             02:42:0a:40:00:02  dwv5ac7619e60a  joined
`},
		{"ports", `127.0.0.1:53/udp -> 10.64.0.2:53     network web  endpoint 5ac7619e60a3
198.18.0.1:8080/tcp -> 10.64.0.2:80  network web  endpoint 5ac7619e60a3
[::]:8080/tcp -> [fd00::2]:80        network web  endpoint 5ac7619e60a3
`},
		{"peers", `HOST             ADDRESS     STATE    ROUND TRIP  FACTS  VERSION
one (this host)  198.18.0.1  alive    -           3      dev
two              198.18.0.2  suspect  410µs       2      dev
`},
		{"overlay app", `NETWORK  VSID  ADDRESS    MAC                HOST       HOST ADDRESS
app      5001  10.90.0.2  0a:00:00:00:00:01  this host  198.18.0.1
app      5001  10.90.1.2  0a:00:00:00:00:02  two        198.18.0.2
`},
	} {
		got, err := runCommand(env, strings.Fields(c.command)...)
		if err != nil || got != c.want {
			t.Errorf("dockway %s: %v\n%s\nwant\n%s", c.command, err, got, c.want)
		}
	}
}

// An engine that is not there, or is another host's, costs only the names.
func TestNamesWithoutEngine(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "dockway.sock")
	answer(t, socket, sample())
	for _, engine := range []string{"unix:///nowhere/docker.sock", "tcp://192.0.2.1:2375"} {
		got, err := runCommand(map[string]string{"DOCKER_HOST": engine}, "endpoints", "--socket", socket)
		if err != nil || !strings.Contains(got, "15cc7e3b0558  5ac7619e60a3") {
			t.Errorf("%s: %v\n%s", engine, err, got)
		}
	}
}

// What scripts read is what the daemon says.
func TestJSON(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "dockway.sock")
	answer(t, socket, sample())
	for command, path := range map[string]string{"status": plugin.StatusPath, "networks": plugin.NetworksPath, "endpoints": plugin.EndpointsPath, "ports": plugin.PortsPath} {
		want, err := json.Marshal(sample()[path])
		if err != nil {
			t.Fatal(err)
		}
		got, err := runCommand(nil, command, "--json", "--socket", socket)
		if err != nil || strings.TrimSpace(got) != string(want) {
			t.Errorf("dockway %s --json: %v\n%s\nwant\n%s", command, err, got, want)
		}
	}
}

func TestErrors(t *testing.T) {
	dir := t.TempDir()
	other, socket := filepath.Join(dir, "other.sock"), filepath.Join(dir, "dockway.sock")
	answer(t, other, nil)
	answer(t, socket, sample())
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"prots"}, `unknown command "prots" for "dockway"`},
		{[]string{"ports", "web"}, `unknown command "web" for "dockway ports"`},
		{[]string{"ports", "--jsn"}, "unknown flag: --jsn (see dockway ports --help)"},
		{[]string{"ports", "--socket", dir + "/none.sock"}, "ask dockway on " + dir + "/none.sock: "},
		{[]string{"ports", "--socket", other}, "dockway has no call /dockway/v1/ports"},
		{[]string{"overlay", "web", "--socket", socket}, `no overlay network of this host is called "web"`},
		{[]string{"key", "use", "c2VjcmV0", "--socket", socket}, "1 of 2 hosts have not followed"},
		{[]string{"key", "use"}, "accepts 1 arg(s), received 0"},
		{[]string{"serve", "--state-dir", t.TempDir(), "--join", "198.18.0.1", "--gossip-port", "0"}, `GOSSIP_PORT="0" is not a port`},
		{[]string{"serve", "--state-dir", t.TempDir(), "--join", "198.18.0.1", "--vxlan-port", "none"}, `VXLAN_PORT="none" is not a port`},
		{[]string{"serve", "--state-dir", t.TempDir(), "--node-name", "a/b"}, `NODE_NAME: the host's name "a/b" is not valid`},
		{[]string{"serve", "--log-level", "loud"}, `LOG_LEVEL="loud" is not known: use error, warning, info or debug`},
		{[]string{"serve", "--collect-after", "soon"}, `COLLECT_AFTER="soon": give a time of at least`},
		{[]string{"serve", "--default-pools", "10.0.0.0"}, `DEFAULT_POOLS: default pool "10.0.0.0"`},
		{[]string{"serve", "--state-dir", "/dev/null/x"}, "/dev/null/x"},
	} {
		out, err := runCommand(nil, c.args...)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %s", c.args, err, c.want)
		}
		if err != nil && (strings.Contains(err.Error(), "\n") || strings.Contains(out, "Usage")) {
			t.Errorf("%q: more than a line:\n%v\n%s", c.args, err, out)
		}
	}
}

// TestKeygen makes keys that the daemon takes, each another.
func TestKeygen(t *testing.T) {
	seen := map[string]bool{}
	for range 3 {
		out, err := runCommand(nil, "keygen")
		if err != nil {
			t.Fatal(err)
		}
		key, err := parseKey(strings.TrimSpace(out))
		if err != nil || len(key) != keySize || seen[out] {
			t.Errorf("keygen printed %q: %v, seen before: %v", out, err, seen[out])
		}
		seen[out] = true
	}
}

// TestKeysOnRecord: a rotation holds over a restart, and another setting counts more than it.
func TestKeysOnRecord(t *testing.T) {
	record, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer record.Close() //nolint:errcheck // the directory goes with the test
	setting := func(b byte) []byte { return bytes.Repeat([]byte{b}, keySize) }
	load := func(key []byte) *keptKeys {
		t.Helper()
		kept, err := loadKeys(record, key)
		if err != nil {
			t.Fatal(err)
		}
		return kept
	}
	kept := load(setting(1))
	kept.Keys = [][]byte{bytes.Repeat([]byte{2}, keySize)}
	if err := kept.save(record); err != nil {
		t.Fatal(err)
	}
	for b, want := range map[byte]byte{1: 2, 3: 3} {
		if got := load(setting(b)).Keys; len(got) != 1 || got[0][0] != want {
			t.Errorf("with setting %d the key is %v, want %d", b, got, want)
		}
	}
	if got := load(nil).Keys; len(got) != 0 {
		t.Errorf("without a setting the key is %v", got)
	}
	for want := uint64(1); want <= 3; want++ {
		if epoch, err := raiseEpoch(record); err != nil || epoch != want {
			t.Errorf("start %d has epoch %d, %v", want, epoch, err)
		}
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{{}, {"--help"}, {"serve", "--help"}, {"ports", "--help"}} {
		out, err := runCommand(nil, args...)
		if err != nil || !strings.Contains(out, "Examples:") || !strings.Contains(out, "Usage:") {
			t.Errorf("%q: %v\n%s", args, err, out)
		}
	}
	if out, err := runCommand(nil, "version"); err != nil || !strings.HasPrefix(out, "dockway dev (go") {
		t.Errorf("version: %q, %v", out, err)
	}
}

func TestSettingsFromTheEnvironment(t *testing.T) {
	env := map[string]string{"LOG_LEVEL": "debug", "DEFAULT_POOLS": "10.0.0.0/8:24", "DOCKWAY_SOCKET": "/x.sock"}
	for want, flag := range map[string]string{"debug": "log-level", "10.0.0.0/8:24": "default-pools", "/x.sock": "socket"} {
		if got := serveCommand(func(key string) string { return env[key] }).Flag(flag).Value.String(); got != want {
			t.Errorf("--%s is %q, want %q", flag, got, want)
		}
	}
	for want, flag := range map[string]string{"info": "log-level", "/run/docker/plugins/dockway.sock": "socket", "/var/lib/dockway": "state-dir", "/proc/sys": "proc-sys"} {
		if got := serveCommand(func(string) string { return "" }).Flag(flag).Value.String(); got != want {
			t.Errorf("--%s is %q, want %q", flag, got, want)
		}
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	if _, err := find(dir, "", ""); err == nil || !strings.Contains(err.Error(), "no dockway answers below "+dir) {
		t.Errorf("none: %v", err)
	}
	for _, id := range []string{"aaa", "bbb", "ccc"} {
		if err := os.Mkdir(filepath.Join(dir, id), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A plugin that was killed leaves its socket.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "aaa", "dockway.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	if err := stale.Close(); err != nil {
		t.Fatal(err)
	}
	managed := filepath.Join(dir, "bbb", "dockway.sock")
	answer(t, managed, nil)
	d, err := find(dir, "", "")
	if err != nil || d.socket != managed {
		t.Errorf("a managed plugin: %v, %v", d, err)
	}
	service := filepath.Join(dir, "dockway.sock")
	answer(t, service, nil)
	if _, err := find(dir, "", ""); err == nil || !strings.Contains(err.Error(), "several dockways answer: choose one with --socket: "+service+", "+managed) {
		t.Errorf("two: %v", err)
	}
	for _, c := range [][2]string{{managed, "/x"}, {"", managed}} {
		if d, err := find(dir, c[0], c[1]); err != nil || d.socket != managed {
			t.Errorf("named: %v, %v", d, err)
		}
	}
}
