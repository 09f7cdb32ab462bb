package fastpath_test

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel/fastpath"
	"github.com/dockway/dockway/driver/plan"
)

const roleVariable = "FASTPATH_ROLE"

// TestMain is also the main function of the benchmark's clients and servers, which are processes of
// their own: blocking calls on one thread, without the runtime in between.
func TestMain(m *testing.M) {
	if role := strings.Fields(os.Getenv(roleVariable)); len(role) > 0 {
		debug.SetGCPercent(-1)
		play(role)
		return
	}
	os.Exit(m.Run())
}

func play(role []string) {
	if role[0] == "attach" { // HOOK HOST NAMESPACE: and then hang
		n, _ := strconv.Atoi(role[2])
		h := &host{n: n, containers: make([]*place, 2)}
		file, err := os.Open(role[3])
		must(err)
		path, err := openers[role[1]](file, "dwb1")
		must(err)
		must(h.attachAll(path))
		fmt.Println("ready")
		select {}
	}
	address := netip.MustParseAddrPort(role[1])
	switch role[0] {
	case "serve":
		serve(address)
	case "rr", "crr", "stream":
		d, _ := time.ParseDuration(role[2])
		fmt.Println(map[string]func(netip.AddrPort, time.Duration) float64{"rr": requests, "crr": connections, "stream": stream}[role[0]](address, d))
	}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func socket(a netip.AddrPort) int {
	domain := unix.AF_INET
	if a.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(err)
	must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	must(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	return fd
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// transfer is read(2) or write(2), at the cost of the call alone.
func transfer(call uintptr, fd int, b []byte) int {
	n, _, errno := unix.RawSyscall(call, uintptr(fd), addressOf(b), uintptr(len(b)))
	if errno != 0 {
		return -1
	}
	return int(n)
}

// serve answers one connection after the other: a request of one byte by the same, and of more by nothing.
func serve(a netip.AddrPort) {
	l := socket(a)
	must(unix.Bind(l, sockaddr(a)))
	must(unix.Listen(l, 16))
	fmt.Println("ready")
	b := make([]byte, 1<<18)
	for {
		fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(l), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		if errno != 0 {
			panic(errno)
		}
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		for {
			n := transfer(unix.SYS_READ, int(fd), b)
			if n <= 0 {
				break
			}
			if n == 1 {
				transfer(unix.SYS_WRITE, int(fd), b[:1])
			}
		}
		_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
	}
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// requests gives the median of microseconds that a request of one byte and its answer take.
func requests(a netip.AddrPort, d time.Duration) float64 {
	fd := socket(a)
	must(unix.Connect(fd, sockaddr(a)))
	b := make([]byte, 1)
	var all []float64
	for start := time.Now(); time.Since(start) < d; {
		at := time.Now()
		if transfer(unix.SYS_WRITE, fd, b) != 1 || transfer(unix.SYS_READ, fd, b) != 1 {
			panic("connection lost")
		}
		all = append(all, float64(time.Since(at).Nanoseconds())/1000)
	}
	return median(all)
}

// connections is requests with a connection for each, which is reset after it.
func connections(a netip.AddrPort, d time.Duration) float64 {
	b := make([]byte, 1)
	var all []float64
	for start := time.Now(); time.Since(start) < d; {
		at := time.Now()
		fd := socket(a)
		must(unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		must(unix.Connect(fd, sockaddr(a)))
		if transfer(unix.SYS_WRITE, fd, b) != 1 || transfer(unix.SYS_READ, fd, b) != 1 {
			panic("connection lost")
		}
		must(unix.Close(fd))
		all = append(all, float64(time.Since(at).Nanoseconds())/1000)
	}
	return median(all)
}

// stream gives Gbit/s of payload.
func stream(a netip.AddrPort, d time.Duration) float64 {
	fd := socket(a)
	must(unix.Connect(fd, sockaddr(a)))
	b := make([]byte, 1<<17)
	total, start := 0, time.Now()
	for time.Since(start) < d {
		n := transfer(unix.SYS_WRITE, fd, b)
		if n <= 0 {
			panic("connection lost")
		}
		total += n
	}
	return float64(total) * 8 / time.Since(start).Seconds() / 1e9
}

// start starts a role in the place, on one CPU.
func (p *place) start(t testing.TB, cpu int, role string) (*exec.Cmd, io.Reader) {
	t.Helper()
	c := exec.Command("taskset", "-c", strconv.Itoa(cpu), "/proc/self/exe")
	c.Args[3] = os.Args[0]
	c.Env = append(os.Environ(), roleVariable+"="+role, "GOMAXPROCS=1")
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.do(t, c.Start)
	return c, out
}

func (p *place) server(t testing.TB, cpu int, address string) {
	t.Helper()
	c, out := p.start(t, cpu, "serve "+address)
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	if _, err := io.ReadFull(out, make([]byte, len("ready"))); err != nil {
		t.Fatal(err)
	}
}

func (p *place) client(t testing.TB, cpu int, role string) float64 {
	t.Helper()
	c, out := p.start(t, cpu, role)
	text, _ := io.ReadAll(out)
	if err := c.Wait(); err != nil {
		t.Fatalf("%s: %v", role, err)
	}
	v, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func addressOf(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }

// What Docker's engine puts beside an overlay: connection tracking for its own bridge networks on the
// host, and for its name server in every container. Both drivers have it.
const (
	engineHost = `table ip nat {
	chain DOCKER { iifname docker0 return; }
	chain PREROUTING { type nat hook prerouting priority dstnat; fib daddr type local jump DOCKER; }
	chain OUTPUT { type nat hook output priority -100; ip daddr != 127.0.0.0/8 fib daddr type local jump DOCKER; }
	chain POSTROUTING { type nat hook postrouting priority srcnat; ip saddr 172.17.0.0/16 oifname != docker0 masquerade; }
}
table ip filter {
	chain FORWARD { type filter hook forward priority filter; policy drop; oifname docker0 ct state established,related accept; }
}`
	engineContainer = `table ip nat {
	chain OUTPUT { type nat hook output priority -100; ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:40000; }
	chain POSTROUTING { type nat hook postrouting priority srcnat; ip saddr 127.0.0.11 udp sport 40000 snat to :53; }
}`
	// What makes the hosts of the lab peers, as gossip does.
	peers = `
add element inet dockway vxlan { 4790 }
add element inet dockway tunnel4 { 198.18.0.1 . 198.18.0.2, 198.18.0.2 . 198.18.0.1 }`
)

// load loads rules of nft(8).
func (p *place) load(t testing.TB, rules string) {
	t.Helper()
	p.run(t, "nft -f - <<'END'\n"+rules+"\nEND")
}

func (h *host) engine(t testing.TB) {
	t.Helper()
	h.under.load(t, engineHost)
	for _, c := range h.containers {
		c.load(t, engineContainer)
	}
}

// dockway is what a host with dockway has besides: Docker's packets pass it too, if both are there.
func (h *host) dockway(t testing.TB) {
	t.Helper()
	inet, err := os.ReadFile("../../mode/testdata/inet.nft")
	if err != nil {
		t.Fatal(err)
	}
	h.under.load(t, string(inet)+peers)
}

// docker makes the overlay as Docker's driver does: learning, and with an address, bridge-nf on.
func (h *host) docker(t testing.TB) {
	t.Helper()
	h.bridgeNF(t, true)
	h.over.run(t, `bridge link set dev dwx1 learning on flood on neigh_suppress off
ip link set dwx1 type vxlan learning
ip addr add 198.19.255.254/16 dev dwb1
for i in 0 1; do bridge link set dev dwv$i learning on; done`)
}

func (h *host) ours(t testing.TB) {
	t.Helper()
	h.bridgeNF(t, false)
	h.rules(t)
	h.dockway(t)
}

// A shape is a way from a client to a server.
type shape struct {
	name           string
	base           string // what it is compared with
	client, server *place
	address        string
}

func shapes(t testing.TB) []shape {
	bare := twoHosts(t, 0)
	bare[0].engine(t)
	bare[1].engine(t)
	all := []shape{{"underlay", "", bare[0].under, bare[1].under, wire(1)}}
	add := func(name string, port int, prepare func(h *host)) {
		hosts := twoHostsAt(t, 2, port)
		for _, h := range hosts {
			h.engine(t)
			prepare(h)
		}
		client, server := hosts[0].containers[0], hosts[1].containers[0]
		all = append(all,
			shape{name, "docker", client, server, ip4(1, 0)},
			shape{name + ", one host", "docker, one host", client, hosts[0].containers[1], ip4(0, 1)})
	}
	add("docker", 4789, func(h *host) { h.docker(t) })
	add("docker beside dockway", 4789, func(h *host) { h.docker(t); h.dockway(t) })
	add("bridge and rules", 4790, func(h *host) { h.ours(t) })
	add("fast", 4790, func(h *host) { h.ours(t); h.attach(t, h.open(t, fastpath.Open)) })
	add("fast, clsact", 4790, func(h *host) { h.ours(t); h.attach(t, h.open(t, fastpath.OpenClsact)) })
	slices.SortStableFunc(all, func(a, b shape) int { return strings.Compare(a.base, b.base) })
	return all
}

// BenchmarkShapes compares ways from container to container, in µs for request and answer of one byte
// (rr), the same with a connection for each (crr), and Gbit/s (stream), with the factor by which each
// is better than Docker's. Client and server are on one processor, so a stream's rate is what all of
// it costs. The shapes take their rounds in turn, and what counts is the median of the rounds' medians.
// ROUNDS is their number, SLICE the time of each, KINDS what is measured. It is to be run once:
//
//	go test -run '^$' -bench Shapes -benchtime 1x ./driver/kernel/fastpath
func BenchmarkShapes(b *testing.B) {
	rounds, err := strconv.Atoi(cmp.Or(os.Getenv("ROUNDS"), "9"))
	if err != nil {
		b.Fatal(err)
	}
	slice := cmp.Or(os.Getenv("SLICE"), "300ms")
	kinds := strings.Fields(cmp.Or(os.Getenv("KINDS"), "rr crr stream"))

	all := shapes(b)
	for _, s := range all {
		s.server.server(b, 0, s.address+":7")
	}
	result := map[string][]float64{}
	for range rounds {
		for _, kind := range kinds {
			for _, s := range all {
				v := s.client.client(b, 0, kind+" "+s.address+":7 "+slice)
				result[kind+s.name] = append(result[kind+s.name], v)
			}
		}
	}
	var table strings.Builder
	for _, s := range all {
		fmt.Fprintf(&table, "%-32s", s.name)
		for _, kind := range kinds {
			v := median(result[kind+s.name])
			fmt.Fprintf(&table, "  %s %6.2f", kind, v)
			if base := median(result[kind+s.base]); base > 0 {
				better := base / v
				if kind == "stream" {
					better = v / base
				}
				fmt.Fprintf(&table, " %.3fx", better)
			}
		}
		table.WriteString("\n")
	}
	fmt.Print(table.String())
}

// BenchmarkAttach attaches a port of a bridge that knows 50,000 MACs.
func BenchmarkAttach(b *testing.B) {
	h := twoHosts(b, 1)[0]
	p := h.open(b, fastpath.Open)
	h.attach(b, p)
	var many []plan.MAC
	for i := range 50_000 {
		many = append(many, plan.MAC{2, 1, 0, 0, byte(i >> 8), byte(i)})
	}
	if err := p.Put("dwx1", many...); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := p.Attach(h.port(0)); err != nil {
			b.Fatal(err)
		}
	}
}
