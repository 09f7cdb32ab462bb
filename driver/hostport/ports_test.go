package hostport

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

func TestHoldReleaseHeld(t *testing.T) {
	p, _ := start(t)
	a := hostPort(tcp, "0.0.0.0:8080", container4+":80")
	b := hostPort(tcp, "[::]:8080", container4+":80")
	c := hostPort(udp, "0.0.0.0:8080", container4+":53")
	for _, hp := range []plan.HostPort{b, a, c, a} { // a twice: it is held already
		hold(t, p, hp)
	}
	if got, want := fmt.Sprint(p.Held()), fmt.Sprint([]plan.HostPort{a, b, c}); got != want {
		t.Errorf("held:\n%s\nwant\n%s", got, want)
	}
	other := a
	other.Target = c.Target
	hold(t, p, other)
	if got, ok := p.Lookup(a.Key()); !ok || got != other {
		t.Errorf("after a change of target, lookup gives %v, %v", got, ok)
	}
	release(t, p, a) // whatever its target
	if _, ok := p.Lookup(a.Key()); ok {
		t.Error("released, yet held")
	}
	release(t, p, a)
	release(t, p, hostPort(sctp, "0.0.0.0:1", container4+":1"))
	l, err := net.Listen("tcp4", "0.0.0.0:8080")
	if err != nil {
		t.Fatalf("a released port is free: %v", err)
	}
	l.Close()
}

func TestLookupOfOtherKeys(t *testing.T) {
	p, _ := start(t)
	for _, k := range []plan.Key{{}, {Kind: plan.KindHostPort}, {Kind: plan.KindHostPort, Name: "tcp x"}, {Kind: plan.KindBridge, Name: "tcp 0.0.0.0:1"}} {
		if hp, ok := p.Lookup(k); ok {
			t.Errorf("%s: %v", k, hp)
		}
	}
}

func TestClosed(t *testing.T) {
	p, _ := start(t)
	hold(t, p, hostPort(tcp, "0.0.0.0:80", container4+":80"))
	for range 2 {
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Hold(hostPort(tcp, "0.0.0.0:80", container4+":80")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("hold after close: %v", err)
	}
	if err := p.Release(hostPort(tcp, "0.0.0.0:80", container4+":80")); err != nil || p.Held() != nil {
		t.Errorf("after close: %v, %v", err, p.Held())
	}
}

// TestNamespace checks that sockets are made where New was called, whoever calls Hold.
func TestNamespace(t *testing.T) {
	p, _ := start(t)
	hp := hostPort(tcp, "127.0.0.1:8080", container4+":80")
	var err error
	var wg sync.WaitGroup
	wg.Go(func() {
		namespace(t) // another one
		if err = p.Hold(hp); err == nil {
			if _, dialErr := net.Dial("tcp", "127.0.0.1:8080"); dialErr == nil {
				err = errors.New("the port is held in the caller's namespace")
			}
		}
	})
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	dialTCP(t, "127.0.0.1:8080").Close()
}

func TestErrors(t *testing.T) {
	p, _ := start(t)
	for _, c := range []struct {
		hp   plan.HostPort
		want string
		is   error
	}{
		{hostPort(tcp, "10.9.9.9:80", container4+":80"), "hold host port 10.9.9.9:80/tcp: 10.9.9.9 is not an address of this host: bind: cannot assign requested address", unix.EADDRNOTAVAIL},
		{hostPort(udp, "[fd00:9::9]:80", container4+":80"), "hold host port [fd00:9::9]:80/udp: fd00:9::9 is not an address of this host: bind: cannot assign requested address", unix.EADDRNOTAVAIL},
		{hostPort(tcp, "[fe80::9]:80", container4+":80"), "hold host port [fe80::9]:80/tcp: a link-local address wants its link, such as fe80::9%eth0: bind: invalid argument", unix.EINVAL},
		{hostPort(tcp, "[fe80::9%none]:80", container4+":80"), "hold host port [fe80::9%none]:80/tcp: link none of address fe80::9%none: route ip+net: no such network interface", nil},
		{hostPort("icmp", "0.0.0.0:80", container4+":80"), `hold host port 0.0.0.0:80/icmp: unknown protocol "icmp": want tcp, udp or sctp`, nil},
		{hostPort(tcp, "0.0.0.0:0", container4+":80"), "hold host port 0.0.0.0:0/tcp: the host's side wants an address and a port", nil},
		{hostPort(tcp, "0.0.0.0:80", container4+":0"), "hold host port 0.0.0.0:80/tcp: target 198.18.7.2:0: want an address and a port", nil},
		{hostPort(tcp, "0.0.0.0:80", "127.0.0.1:80"), "hold host port 0.0.0.0:80/tcp: target 127.0.0.1:80: 127.0.0.1 is never the address of a container", nil},
		{hostPort(tcp, "0.0.0.0:80", "[::]:80"), "hold host port 0.0.0.0:80/tcp: target [::]:80: :: is never the address of a container", nil},
	} {
		err := p.Hold(c.hp)
		if err == nil || err.Error() != c.want || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s:\n got %v\nwant %s", c.hp, err, c.want)
		}
	}
	if held := p.Held(); len(held) != 0 {
		t.Errorf("held in spite of an error: %v", held)
	}
	// What cannot be had by a test that runs as root in one process.
	host := hostPort(tcp, "0.0.0.0:80", container4+":80").Host
	for err, want := range map[error]string{
		unix.EACCES:       "port 80 is privileged and CAP_NET_BIND_SERVICE is missing: permission denied",
		unix.EMFILE:       fmt.Sprintf("this process may open no more than %d files (RLIMIT_NOFILE): too many open files", fileLimit()),
		unix.ENFILE:       "this host may open no more files (fs.file-max): too many open files in system",
		unix.EAFNOSUPPORT: "the kernel does not have this address family: address family not supported by protocol",
		unix.EIO:          "input/output error",
	} {
		if got := explain(err, host); got.Error() != want || !errors.Is(got, err) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestSCTP holds a port whether or not the kernel has the protocol.
func TestSCTP(t *testing.T) {
	p, _ := start(t)
	a := hostPort(sctp, "0.0.0.0:38412", container4+":38412")
	hold(t, p, a)
	hold(t, p, hostPort(sctp, "[::]:38412", container4+":38412"))
	err := p.Hold(hostPort(sctp, "127.0.0.1:38412", other4+":38412"))
	var inUse *plan.PortInUseError
	if !errors.As(err, &inUse) || !strings.Contains(err.Error(), "dockway's host port 0.0.0.0:38412/sctp, published for 198.18.7.2:38412") {
		t.Errorf("second holder: %v", err)
	}
	if held := p.Held(); len(held) != 2 {
		t.Errorf("held: %v", held)
	}
	release(t, p, a)
	hold(t, p, hostPort(sctp, "127.0.0.1:38412", other4+":38412"))
}

// TestManyPorts holds 10,000 ports and checks that a port costs a descriptor and no goroutine.
func TestManyPorts(t *testing.T) {
	if _, err := raiseFileLimit(); err != nil {
		t.Fatal(err)
	}
	p, _ := start(t)
	const many = 10000
	files, routines := openFiles(t), runtime.NumGoroutine()
	for _, hp := range ports(many) {
		hold(t, p, hp)
	}
	if n := len(p.Held()); n != many {
		t.Errorf("%d are held", n)
	}
	if n := openFiles(t) - files; n != many {
		t.Errorf("%d descriptors", n)
	}
	if n := runtime.NumGoroutine(); n != routines {
		t.Errorf("%d goroutines, before %d", n, routines)
	}
	listenTCP(t, container4+":80", echo("a"))
	for _, port := range []string{"20000", "24999"} {
		if got := readWord(t, dialTCP(t, "127.0.0.1:"+port)); got != "a" {
			t.Errorf("port %s: %q", port, got)
		}
	}
	for _, hp := range ports(many) {
		release(t, p, hp)
	}
	until(t, "all descriptors are closed", func() error { return same(0, len(p.Held())) })
}

// ports makes n host ports, TCP and UDP in turn.
func ports(n int) []plan.HostPort {
	all := make([]plan.HostPort, n)
	for i := range all {
		all[i] = hostPort([]string{tcp, udp}[i%2], fmt.Sprintf("0.0.0.0:%d", 20000+i/2), container4+":80")
	}
	return all
}

// TestSideBySide holds and releases from 64 goroutines, on one port and on many.
func TestSideBySide(t *testing.T) {
	p, _ := start(t)
	var wg sync.WaitGroup
	errs := make(chan error, 64)
	for i := range 64 {
		wg.Go(func() {
			mine := hostPort(tcp, fmt.Sprintf("127.0.0.1:%d", 3000+i), container4+":80")
			shared := hostPort(tcp, "0.0.0.0:2000", fmt.Sprintf("%s:%d", container4, 1+i))
			for range 20 {
				for _, hp := range []plan.HostPort{mine, shared} {
					if err := p.Hold(hp); err != nil {
						errs <- err
						return
					}
				}
				p.Lookup(mine.Key())
				_ = p.Release(shared)
				_ = p.Release(mine)
			}
			if err := p.Hold(mine); err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	if n := len(p.Held()); n != 64 {
		t.Errorf("%d ports are held, want 64", n)
	}
}

func TestCloseWhileHolding(t *testing.T) {
	p, _ := start(t)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for port := range 50 {
				if err := p.Hold(hostPort(udp, fmt.Sprintf("0.0.0.0:%d", 2000+100*i+port), container4+":80")); errors.Is(err, net.ErrClosed) {
					return
				} else if err != nil {
					t.Error(err)
				}
			}
		})
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

func TestNewRaisesFileLimit(t *testing.T) {
	namespace(t)
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: before.Max / 2, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	log, _ := logger()
	p, err := New(log)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if got := fileLimit(); got != before.Max {
		t.Errorf("limit of open files is %d, want %d", got, before.Max)
	}
}

// BenchmarkHeldPort reports what a held port takes of this process's memory, when 10,000 are held;
// the kernel's socket comes on top.
func BenchmarkHeldPort(b *testing.B) {
	if _, err := raiseFileLimit(); err != nil {
		b.Fatal(err)
	}
	namespace(b)
	log, _ := logger()
	all := ports(10000)
	for b.Loop() {
		before := heap()
		p, err := newPorts(log, limitsFor(20000))
		if err != nil {
			b.Fatal(err)
		}
		for _, hp := range all {
			hold(b, p, hp)
		}
		b.ReportMetric(float64(heap()-before)/float64(len(all)), "B/port")
		if err := p.Close(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(all)), "ns/port")
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
