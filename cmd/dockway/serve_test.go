package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/store"
)

// asMain makes this test binary the command itself.
const asMain = "DOCKWAY_TEST_AS_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asMain) != "" {
		go tellGoroutines()
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// tellGoroutines tells, when it is asked with SIGUSR1, how many goroutines there are.
func tellGoroutines() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	for range asked {
		conn, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
		if err == nil {
			_, err = fmt.Fprintf(conn, "GOROUTINES=%d", runtime.NumGoroutine())
			err = errors.Join(err, conn.Close())
		}
		if err != nil {
			panic(err)
		}
	}
}

// process is dockway serve in a network namespace of its own.
type process struct {
	t              *testing.T
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer // to be read when it has ended
	socket         string
	notified       *net.UnixConn
	ended          chan struct{}
}

func launch(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can make network namespaces")
	}
	ready := filepath.Join(t.TempDir(), "notify.sock")
	notified, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: ready, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, socket: filepath.Join(dir, "dockway.sock"), notified: notified, ended: make(chan struct{})}
	p.cmd = exec.Command(os.Args[0], append([]string{"serve", "--socket", p.socket, "--state-dir", filepath.Join(dir, "state")}, args...)...)
	p.cmd.Env = []string{asMain + "=1", "NOTIFY_SOCKET=" + ready}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // ProcessState says how it ended
		_ = notified.Close()
	}()
	t.Cleanup(func() { p.signal(syscall.SIGKILL) })
	return p
}

// start launches dockway serve and waits until it says that it is ready.
func start(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	p := launch(t, dir, args...)
	if got := p.says(); got != "READY=1" {
		p.signal(syscall.SIGKILL)
		t.Fatalf("it says %q\n%s%s", got, &p.stdout, &p.stderr)
	}
	return p
}

// says is what it tells systemd next; "" if it ends.
func (p *process) says() string {
	buf := make([]byte, 100)
	if err := p.notified.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return ""
	}
	n, _ := p.notified.Read(buf)
	return string(buf[:n])
}

// signal sends a signal that ends it, and gives its exit status.
func (p *process) signal(s syscall.Signal) int {
	_ = p.cmd.Process.Signal(s) // it may have ended
	return p.wait()
}

func (p *process) wait() int {
	select {
	case <-p.ended:
	case <-time.After(30 * time.Second):
		p.t.Error("still running after 30 s")
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
	return p.cmd.ProcessState.ExitCode()
}

// post makes one of the engine's calls.
func (p *process) post(call, body string) string {
	p.t.Helper()
	client := unixClient(p.socket)
	defer client.CloseIdleConnections()
	resp, err := client.Post("http://x/"+call, "", strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		p.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		p.t.Errorf("%s: %d %s", call, resp.StatusCode, text)
	}
	return string(text)
}

// cli gives what a command prints, without asking this machine's own engine for names.
func (p *process) cli(command string) string {
	p.t.Helper()
	out, err := runCommand(map[string]string{"DOCKER_HOST": "unix:///nowhere"}, command, "--socket", p.socket)
	if err != nil {
		p.t.Error(err)
	}
	return out
}

// One endpoint's life, over a kill -9 and a restart.
func TestServe(t *testing.T) {
	const both = `"NetworkID":"` + webID + `","EndpointID":"` + endID + `"`
	dir := t.TempDir()
	p := start(t, dir, "--log-level", "debug")
	if got := p.post("Plugin.Activate", ""); !strings.Contains(got, "NetworkDriver") {
		t.Errorf("Plugin.Activate: %s", got)
	}
	if got, want := p.post("IpamDriver.RequestPool", `{"AddressSpace":"dockway-local"}`), `"Pool":"10.64.0.0/24"`; !strings.Contains(got, want) {
		t.Errorf("RequestPool: %s, want %s", got, want)
	}
	p.post("NetworkDriver.CreateNetwork", `{"NetworkID":"`+webID+`","Options":{"com.docker.network.generic":{"network_name":"web"}},"IPv4Data":[{"Pool":"10.64.0.0/24","Gateway":"10.64.0.1/24"}]}`)
	p.post("NetworkDriver.CreateEndpoint", `{`+both+`,"Interface":{"Address":"10.64.0.2/24"}}`)
	p.post("NetworkDriver.Join", `{`+both+`}`)
	p.post("NetworkDriver.ProgramExternalConnectivity", `{`+both+`,"Options":{"com.docker.network.portmap":[{"Proto":6,"Port":80,"HostPort":8080,"HostPortEnd":8080,"HostIP":"0.0.0.0"}]}}`)
	const ports = "0.0.0.0:8080/tcp -> 10.64.0.2:80  network web  endpoint 5ac7619e60a3\n"
	if got := p.cli("ports"); got != ports {
		t.Errorf("dockway ports: %s", got)
	}
	p.signal(syscall.SIGKILL)
	if log := p.stdout.String(); !strings.Contains(log, `msg="call answered" about="endpoint 5ac7619e60a3 on network 15cc7e3b0558" call=NetworkDriver.Join took=`) {
		t.Errorf("stdout:\n%s", log)
	}
	if log := p.stderr.String(); log != "" {
		t.Errorf("stderr:\n%s", log)
	}

	p = start(t, dir)
	if got := p.cli("networks"); !strings.Contains(got, "web   15cc7e3b0558  nat") {
		t.Errorf("after kill -9, dockway networks:\n%s", got)
	}
	if got := p.post("IpamDriver.RequestPool", `{"AddressSpace":"dockway-local"}`); strings.Contains(got, `"10.64.0.0/24"`) {
		t.Errorf("after kill -9 the same pool again: %s", got)
	}
	for _, call := range []string{"RevokeExternalConnectivity", "Leave", "DeleteEndpoint", "DeleteNetwork"} {
		p.post("NetworkDriver."+call, `{`+both+`}`)
	}
	if got := p.cli("networks"); strings.Contains(got, "web") {
		t.Errorf("after DeleteNetwork, dockway networks:\n%s", got)
	}
	if status := p.signal(syscall.SIGTERM); status != 0 {
		t.Errorf("SIGTERM: exit status %d\n%s", status, &p.stderr)
	}
	if _, err := os.Stat(p.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if !strings.Contains(p.stdout.String(), "dockway dev answers on "+p.socket) || !strings.Contains(p.stdout.String(), "stopping") {
		t.Errorf("stdout:\n%s", &p.stdout)
	}
}

// in runs a script in the process's network namespace.
func (p *process) in(script string) string {
	p.t.Helper()
	out, err := exec.Command("nsenter", "-t", strconv.Itoa(p.cmd.Process.Pid), "-n", "sh", "-ec", script).CombinedOutput()
	if err != nil {
		p.t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

// TestServeChoosesPools: subnets are chosen from what is configured, but for what the host has a route to.
func TestServeChoosesPools(t *testing.T) {
	p := start(t, t.TempDir(), "--default-pools", "10.99.0.0/22:24,fd00:99::/62:64")
	p.in(`ip link add lan0 type veth peer name lan1; ip link set lan0 up; ip link set lan1 up
ip route add 10.99.1.128/25 dev lan0; ip -6 route add fd00:99::/64 dev lan0`)
	for _, c := range []struct{ v6, want string }{
		{"false", "10.99.0.0/24"}, {"false", "10.99.2.0/24"}, {"false", "10.99.3.0/24"}, {"true", "fd00:99:0:1::/64"},
	} {
		if got := p.post("IpamDriver.RequestPool", `{"AddressSpace":"dockway-local","V6":`+c.v6+`}`); !strings.Contains(got, `"Pool":"`+c.want+`"`) {
			t.Errorf("chosen: %s, want %s", got, c.want)
		}
	}
}

// life is all that an engine asks for a container that comes and goes.
func (p *process) life(pool string, n int) {
	id := fmt.Sprintf("%x", sha256.Sum256([]byte(strconv.Itoa(n))))
	both := `"NetworkID":"` + webID + `","EndpointID":"` + id + `"`
	_, address, _ := strings.Cut(p.post("IpamDriver.RequestAddress", `{"PoolID":"`+pool+`"}`), `"Address":"`)
	address, _, _ = strings.Cut(address, `"`)
	p.post("NetworkDriver.CreateEndpoint", `{`+both+`,"Interface":{"Address":"`+address+`"}}`)
	p.post("NetworkDriver.Join", `{`+both+`}`)
	p.post("NetworkDriver.ProgramExternalConnectivity", fmt.Sprintf(`{%s,"Options":{"com.docker.network.portmap":[{"Proto":6,"Port":80,"HostPort":%d},{"Proto":17,"Port":80}]}}`, both, 10000+n))
	p.post("NetworkDriver.EndpointOperInfo", `{`+both+`}`)
	for _, call := range []string{"RevokeExternalConnectivity", "Leave", "DeleteEndpoint"} {
		p.post("NetworkDriver."+call, `{`+both+`}`)
	}
	bare, _, _ := strings.Cut(address, "/")
	p.post("IpamDriver.ReleaseAddress", `{"PoolID":"`+pool+`","Address":"`+bare+`"}`)
}

// TestServeLeaksNothing: after hundreds of containers there are as many goroutines, files, links and elements as
// before. (With an engine they are a thousand.)
func TestServeLeaksNothing(t *testing.T) {
	p := start(t, t.TempDir())
	_, pool, _ := strings.Cut(p.post("IpamDriver.RequestPool", `{"AddressSpace":"dockway-local","Pool":"198.19.64.0/20"}`), `"PoolID":"`)
	pool, _, _ = strings.Cut(pool, `"`)
	p.post("NetworkDriver.CreateNetwork", `{"NetworkID":"`+webID+`","IPv4Data":[{"Pool":"198.19.64.0/20","Gateway":"198.19.64.1/20"}]}`)
	p.post("IpamDriver.RequestAddress", `{"PoolID":"`+pool+`","Address":"198.19.64.1","Options":{"RequestAddressType":"com.docker.network.gateway"}}`)
	lives := func(from, to int) {
		t.Helper()
		var next atomic.Int64
		next.Store(int64(from))
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for n := int(next.Add(1)) - 1; n < to && !t.Failed(); n = int(next.Add(1)) - 1 {
					p.life(pool, n)
				}
			})
		}
		wg.Wait()
	}
	count := func() string {
		t.Helper()
		if err := p.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		said := p.says()
		if !strings.HasPrefix(said, "GOROUTINES=") {
			t.Fatalf("asked for its goroutines, it says %q", said)
		}
		return said + "\n" + p.in(fmt.Sprintf("ip -o link | wc -l; nft -s list ruleset | cksum; ss -Htuan | wc -l; ls -l /proc/%d/fd | sed -n 's/.* -> \\([a-z]*\\).*/\\1/p' | sort | uniq -c", p.cmd.Process.Pid))
	}
	// settled is the count when it is the same for some time.
	settled := func() string {
		t.Helper()
		last, same := count(), 0
		for deadline := time.Now().Add(30 * time.Second); same < 10 && time.Now().Before(deadline); {
			now := count()
			if same++; now != last {
				last, same = now, 0
			}
		}
		return last
	}
	lives(0, 50) // whatever is made once and kept
	before := settled()
	lives(50, 350)
	if after := settled(); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
}

// A record that is damaged is an error on stderr, and is left as it is.
func TestServeRefusesADamagedRecord(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "state", store.FileName)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	garbage := bytes.Repeat([]byte("garbage "), 10_000)
	if err := os.WriteFile(file, garbage, 0o600); err != nil {
		t.Fatal(err)
	}
	p := launch(t, dir)
	if status := p.wait(); status != 1 {
		t.Errorf("exit status %d", status)
	}
	if got := p.stderr.String(); !strings.HasPrefix(got, "dockway: ") || !strings.Contains(got, file) || strings.Count(got, "\n") != 1 {
		t.Errorf("stderr:\n%s", got)
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, garbage) {
		t.Errorf("the record was changed: %v", err)
	}
}

// A second dockway does not take the first one's socket or record.
func TestServeTwice(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir)
	for want, args := range map[string][]string{
		"another dockway answers on": {"--state-dir", filepath.Join(dir, "state2")},
		store.FileName:               {"--socket", filepath.Join(dir, "second.sock")},
	} {
		second := launch(t, dir, args...)
		if status := second.wait(); status != 1 || !strings.Contains(second.stderr.String(), want) {
			t.Errorf("%q: exit status %d, %s", args, status, &second.stderr)
		}
	}
	if got := p.cli("status"); !strings.Contains(got, "networks") {
		t.Errorf("the first says %s", got)
	}
}

// A signal lets the calls under way finish.
func TestServeStopsGracefully(t *testing.T) {
	p := start(t, t.TempDir())
	conn, err := new(net.Dialer).DialContext(context.Background(), "unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	const body = `{"NetworkID":"` + webID + `"}`
	if _, err := io.WriteString(conn, "POST /NetworkDriver.DeleteNetwork HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 80\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	// The server asks for the body when it reads it: the call is under way.
	buf := make([]byte, 1000)
	if n, err := conn.Read(buf); err != nil || !strings.HasPrefix(string(buf[:n]), "HTTP/1.1 100") {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := p.says(); got != "STOPPING=1" {
		t.Errorf("it says %q", got)
	}
	if len(body) != 80 {
		t.Fatalf("the body has %d bytes", len(body))
	}
	if _, err := io.WriteString(conn, body); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
		t.Errorf("%q, %v", answer, err)
	}
	if status := p.wait(); status != 0 {
		t.Errorf("exit status %d\n%s", status, &p.stderr)
	}
}
