package dhcp

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// lab is a host and a LAN with a DHCP server. Each of these has a network namespace of its own:
//
//	host: eth1, a port of the bridge br0, as in an external switch; and the client
//	lan: lan0 198.18.0.1/16, the other end of eth1; and the server
//	container: eth0 with the container's MAC, whose other end is a port of br0
type lab struct {
	*Client
	home, host, lan, container *os.File
	dir                        string

	mu   sync.Mutex
	news []news
}

const (
	uplink    = "eth1"
	serverNet = "198.18.0.1/16"
)

// makeLab makes a lab. It ends with the test.
func makeLab(t *testing.T) *lab {
	t.Helper()
	home, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	b := &lab{home: home, host: namespace(t), lan: namespace(t), container: namespace(t), dir: t.TempDir()}
	t.Cleanup(func() { home.Close() })
	b.ip(t, b.host, "link add br0 type bridge")
	b.ip(t, b.host, "link add "+uplink+" type veth peer name lan0")
	b.move(t, "lan0", b.lan)
	b.ip(t, b.host, "link set "+uplink+" master br0")
	b.ip(t, b.host, "link add port0 type veth peer name eth0 address "+container.String())
	b.move(t, "eth0", b.container)
	b.ip(t, b.host, "link set port0 master br0")
	for _, l := range []string{uplink, "br0", "port0"} {
		b.ip(t, b.host, "link set "+l+" up")
	}
	b.ip(t, b.container, "link set eth0 up")
	b.ip(t, b.lan, "link set lan0 up")
	b.ip(t, b.lan, "address add "+serverNet+" dev lan0")

	b.start(t)
	return b
}

// start starts a client on the host.
func (b *lab) start(t *testing.T) {
	t.Helper()
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	b.inside(t, b.host, func() error {
		c, err := New(Config{Log: logrus.NewEntry(logger), Changed: func(l Lease, e Event) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.news = append(b.news, news{time.Now(), l, e})
		}})
		if err == nil {
			b.Client = c
			t.Cleanup(func() { c.Close() })
		}
		return err
	})
}

// namespace makes a network namespace.
func namespace(t *testing.T) *os.File {
	t.Helper()
	made := make(chan *os.File)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("make a network namespace (as root): %v", err)
			made <- nil
			return
		}
		f, err := os.Open(threadNamespace)
		if err != nil {
			t.Error(err)
		}
		made <- f
	}()
	f := <-made
	if f == nil {
		t.FailNow()
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// inside calls f in a namespace, which is never the machine's own.
func (b *lab) inside(t *testing.T, where *os.File, f func() error) {
	t.Helper()
	if sameNamespace(where) {
		t.Fatal("a command would be run in the machine's own namespace")
	}
	if err := inside(where, f); err != nil {
		t.Fatal(err)
	}
}

// ip runs ip(8).
func (b *lab) ip(t *testing.T, where *os.File, args string) (said string) {
	t.Helper()
	b.inside(t, where, func() error {
		out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
		said = string(out)
		return nil
	})
	return said
}

// move moves a link of the host.
func (b *lab) move(t *testing.T, link string, to *os.File) {
	t.Helper()
	b.inside(t, b.host, func() error {
		cmd := exec.Command("ip", "link", "set", link, "netns", "/proc/self/fd/3")
		cmd.ExtraFiles = []*os.File{to}
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("move %s: %w: %s", link, err, out)
		}
		return nil
	})
}

// process is a server of a test's own.
type process struct {
	*exec.Cmd
	out  *output
	stop func()
}

// output is what a process says.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// program is a server of those that `make setup` unpacks, with the libraries beside it.
func program(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(cache, "dockway", "dhcp", "usr")
	path := filepath.Join(root, "sbin", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("there is no %s (make setup): %v", name, err)
	}
	libraries, err := filepath.Glob(filepath.Join(root, "lib", "*"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+strings.Join(libraries, ":"))
	return cmd
}

// serve runs a server on the LAN until the test ends or it is stopped; ready is what it says when it is.
func (b *lab) serve(t *testing.T, ready string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{Cmd: cmd, out: &output{}}
	cmd.Stdout, cmd.Stderr = p.out, p.out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // with the thread that starts it, so with the test at the latest
	started, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		err := inside(b.lan, func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			started <- nil
			_ = cmd.Wait()
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	p.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			text := p.out.String()
			t.Logf("%s said at last:\n%s", filepath.Base(cmd.Path), text[max(0, len(text)-8000):])
		}
	})
	eventually(t, cmd.Path+" is ready", func() bool { return strings.Contains(p.out.String(), ready) })
	return p
}

// eventually polls.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// dnsmasq serves 198.18.1.0/24 of the LAN, unless the options say something else.
func (b *lab) dnsmasq(t *testing.T, options ...string) *process {
	t.Helper()
	base := []string{
		"--no-daemon", "--conf-file=/dev/null", "--port=0", "--user=root", "--group=root", "--pid-file=",
		"--interface=lan0", "--bind-interfaces", "--log-dhcp", "--no-ping", "--dhcp-leasefile=" + b.file("dnsmasq.leases"),
	}
	if !strings.Contains(strings.Join(options, " "), "--dhcp-range") {
		base = append(base, "--dhcp-range=198.18.1.10,198.18.1.250,255.255.0.0,1h")
	}
	return b.serve(t, "sockets bound exclusively to interface lan0", program(t, "dnsmasq", append(base, options...)...))
}

func (b *lab) file(name string) string { return filepath.Join(b.dir, name) }

// read reads a file of the lab's.
func (b *lab) read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(b.file(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// kea serves the same, with changes to the subnet of its configuration.
func (b *lab) kea(t *testing.T, subnet map[string]any) *process {
	t.Helper()
	s := map[string]any{
		"subnet":         "198.18.0.0/16",
		"interface":      "lan0",
		"pools":          []any{map[string]any{"pool": "198.18.1.10 - 198.18.1.250"}},
		"valid-lifetime": 3600,
		"authoritative":  true,
	}
	for k, v := range subnet {
		s[k] = v
	}
	config, err := json.Marshal(map[string]any{"Dhcp4": map[string]any{
		"interfaces-config": map[string]any{"interfaces": []string{"lan0"}},
		"lease-database":    map[string]any{"type": "memfile", "persist": true, "name": b.file("kea.leases"), "lfc-interval": 0},
		"subnet4":           []any{s},
		"loggers": []any{map[string]any{
			"name": "kea-dhcp4", "severity": "DEBUG", "debuglevel": 45,
			"output_options": []any{map[string]any{"output": "stdout", "flush": true}},
		}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.file("kea.json"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := program(t, "kea-dhcp4", "-c", b.file("kea.json"))
	cmd.Env = append(cmd.Env, "KEA_PIDFILE_DIR="+b.dir, "KEA_LOCKFILE_DIR="+b.dir)
	return b.serve(t, "DHCP4_STARTED", cmd)
}

func (b *lab) obtain(t *testing.T, r Request) Lease {
	t.Helper()
	r.Link = uplink
	if r.MAC == (MAC{}) {
		r.MAC = container
	}
	lease, err := b.Obtain(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

// await waits for an event of a kind, and returns the first of it.
func (b *lab) await(t *testing.T, kind Kind) (found news) {
	t.Helper()
	eventually(t, "event "+string(kind), func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, n := range b.news {
			if n.Kind == kind {
				found = n
				return true
			}
		}
		return false
	})
	return found
}

func address(s string) netip.Addr { return netip.MustParseAddr(s) }
