package kernel_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

func external(uplink string) plan.Switch {
	return plan.Switch{Name: "dwx1", Alias: "dockway network=x1", Uplink: uplink, Up: true, Moved: true}
}

// A lan is a network namespace in which the other end of an uplink is.
type lan struct {
	namespace string
	work      chan func()
}

func newLAN(t *testing.T) *lan {
	t.Helper()
	l := &lan{work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread, and the namespace with it, ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		l.namespace = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		ready <- err
		for f := range l.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(l.work) })
	return l
}

// in calls f on a thread in the LAN.
func (l *lan) in(f func()) {
	done := make(chan struct{})
	l.work <- func() { defer close(done); f() }
	<-done
}

// commands runs one command a line in the test's namespace.
func commands(t testing.TB, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if args := strings.Fields(line); len(args) > 0 {
			run(t, args[0], args[1:]...)
		}
	}
}

func (l *lan) commands(t testing.TB, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		args := strings.Fields(line)
		if len(args) == 0 {
			continue
		}
		l.in(func() {
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", line, err, out)
			}
		})
	}
}

// plug makes an uplink whose other end is in the LAN.
func (l *lan) plug(t testing.TB) {
	t.Helper()
	commands(t, "ip link add eth1 address 02:aa:00:00:00:01 type veth peer lan0 netns "+l.namespace)
	l.commands(t, `
		ip link set lo up
		ip link set lan0 addrgenmode none up
		ip addr add 198.18.0.1/24 dev lan0
		ip addr add fd00::1/64 dev lan0 nodad
		ip addr add fe80::1/64 dev lan0 nodad`)
}

// hostSetup is a host that uses everything a move could lose.
const hostSetup = `

	ip link set lo up
	ip link add eth2 type veth peer eth3
	ip link set eth2 up
	ip link set eth3 up
	sysctl -qw net/ipv4/conf/eth1/rp_filter=1 net/ipv4/conf/eth1/accept_source_route=1 net/ipv4/conf/eth1/log_martians=1 net/ipv4/conf/eth1/promote_secondaries=0
	sysctl -qw net/ipv6/conf/eth1/accept_ra=2 net/ipv6/conf/eth1/hop_limit=63 net/ipv4/neigh/eth1/gc_stale_time=61
	ip link set eth1 up
	ip addr add 198.18.0.2/24 brd + dev eth1
	ip addr add 198.18.0.3/24 brd 198.18.0.255 dev eth1 label eth1:0
	ip addr add 198.18.0.4/24 dev eth1 label eth1:abcdefghij
	ip addr add 198.18.1.2/24 dev eth1 metric 77 valid_lft 3600 preferred_lft 1800
	ip addr add 198.18.4.2/24 dev eth1 valid_lft 3600 preferred_lft 0
	ip addr add 198.18.2.2/24 dev eth1 noprefixroute
	ip addr add 198.18.3.1 peer 198.18.3.2/32 dev eth1 scope link
	ip addr add 198.18.5.1/32 dev eth1 scope host
	ip addr add 198.18.0.9/24 dev eth2
	ip addr add fd00::2/64 dev eth1 nodad
	ip addr add fd00::3/64 dev eth1 valid_lft 3600 preferred_lft 1800 mngtmpaddr
	ip addr add fd00:1::1/128 dev eth1 noprefixroute
	ip addr add fd00:2::1 peer fd00:2::2/128 dev eth1
	ip addr add fd00::9/64 dev eth2 nodad
	ip route add default via 198.18.0.1 dev eth1 metric 100 proto dhcp src 198.18.0.3
	ip route add default via 198.18.0.1 dev eth1 table 100 mtu lock 1400 advmss 1300 initcwnd 20
	ip route add 198.19.0.0/24 via 198.18.0.1 dev eth1 tos 0x10
	ip route add 198.19.0.0/24 dev eth1 scope link
	ip route append 198.19.0.0/24 via 198.18.0.7 dev eth1
	ip route add 198.19.1.0/24 nexthop via 198.18.0.1 dev eth1 weight 3 nexthop via 198.18.0.1 dev eth2
	ip route add 198.19.2.0/24 via 203.0.113.1 dev eth1 onlink
	ip route add 198.19.3.0/24 via inet6 fe80::1 dev eth1
	ip route add 198.19.4.0/24 dev eth2
	ip route append 198.19.4.0/24 dev eth1
	ip route add 198.19.5.254 dev eth1 scope link
	ip route add 198.19.6.0/24 via 198.19.5.254 dev eth1
	ip route add local 198.19.7.0/24 dev eth1 table local proto static
	ip route add 198.18.2.0/24 dev eth1 proto kernel scope link src 198.18.2.2 metric 100
	ip route add unreachable 198.19.8.0/24
	ip nexthop add id 7 via 198.18.0.1 dev eth1 proto static
	ip nexthop add id 8 via fd00::1 dev eth1
	ip nexthop add id 9 group 7
	ip route add 198.19.9.0/24 nhid 7
	ip route add 198.19.10.0/24 nhid 9
	ip -6 route add fd01:9::/64 nhid 8
	ip -6 route add default via fe80::1 dev eth1 proto ra metric 1024 expires 1800 pref high
	ip -6 route add default via fe80::1 dev eth1 table 100
	ip -6 route add fd01:1::/64 via fd00::1 dev eth1 mtu 1400 hoplimit 9 src fd00::2
	ip -6 route add fd01:2::/64 nexthop via fd00::1 dev eth1 weight 3 nexthop via fd00::1 dev eth2
	ip -6 route add fd01:3::/64 dev eth2 metric 5
	ip -6 route append fd01:3::/64 dev eth1 metric 5
	ip -6 route add fd01:4::/64 dev eth1 expires 1000
	ip neigh add 198.18.0.66 lladdr 02:aa:00:00:00:66 dev eth1 nud permanent
	ip neigh add fd00::66 lladdr 02:aa:00:00:00:66 dev eth1 nud permanent
	ip neigh add proxy 198.18.0.67 dev eth1
	ip neigh add proxy fd00::67 dev eth1
`

var (
	times   = regexp.MustCompile(`\b([0-9]+)sec`)
	indexes = regexp.MustCompile(`(?m)^[0-9]+: `)
)

// hostState is what the host has, in the words of ip(8), times left out.
func hostState(t testing.TB) string {
	t.Helper()
	var b strings.Builder
	for _, command := range []string{
		"ip -d -o addr show dev eth1", "ip -d -o link show dev eth1", "ip -4 -d route show table all", "ip -6 -d route show table all", "ip -d nexthop",
		"ip neigh show dev eth1 nud permanent", "ip neigh show proxy dev eth1",
	} {
		args := strings.Fields(command)
		fmt.Fprintln(&b, run(t, args[0], args[1:]...))
	}
	return times.ReplaceAllString(b.String(), "Nsec") + settings(t, "eth1")
}

// settings are all of a link.
func settings(t testing.TB, link string) string {
	t.Helper()
	var b strings.Builder
	for _, kind := range []string{"ipv4/conf", "ipv4/neigh", "ipv6/conf", "ipv6/neigh"} {
		dir := filepath.Join("/proc/sys/net", kind, link)
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			value, _ := os.ReadFile(filepath.Join(dir, e.Name())) // stable_secret: none, as long as none is set
			fmt.Fprintf(&b, "%s/%s=%s\n", kind, e.Name(), bytes.TrimSpace(value))
		}
	}
	return b.String()
}

// movable is the part of the state that moves, as if on eth1.
func movable(t testing.TB, link string) string {
	t.Helper()
	var out []string
	for _, command := range []string{"ip -d -o addr show dev " + link, "ip -4 -d route show table all", "ip -6 -d route show table all", "ip -d nexthop", "ip neigh show dev " + link + " nud permanent", "ip neigh show proxy dev " + link} {
		args := strings.Fields(command)
		text := run(t, args[0], args[1:]...)
		text = indexes.ReplaceAllString(times.ReplaceAllString(text, "Nsec"), "")
		for line := range strings.Lines(strings.ReplaceAll(text, link, "eth1")) {
			// Every link has the one, and carrier comes and goes in its time.
			if !strings.Contains(line, "ff00::/8") {
				out = append(out, strings.TrimSpace(strings.ReplaceAll(line, " linkdown", "")))
			}
		}
	}
	return strings.Join(out, "\n")
}

// newHost is a host with an uplink, whose link-local address has been proved.
func newHost(t *testing.T) *lan {
	t.Helper()
	inNamespace(t)
	l := newLAN(t)
	l.plug(t)
	commands(t, hostSetup)
	proved(t)
	return l
}

func proved(t *testing.T) {
	t.Helper()
	eventually(t, "all addresses are proved", func() bool {
		return strings.Contains(run(t, "ip", "-6", "addr", "show", "dev", "eth1"), "fe80::") &&
			!strings.Contains(run(t, "ip", "addr"), "tentative")
	})
}

func same(t testing.TB, what, before, after string) {
	t.Helper()
	if before != after {
		b, a := strings.Split(before, "\n"), strings.Split(after, "\n")
		missing := slices.DeleteFunc(slices.Clone(b), func(line string) bool { return slices.Contains(a, line) })
		extra := slices.DeleteFunc(slices.Clone(a), func(line string) bool { return slices.Contains(b, line) })
		if len(missing)+len(extra) == 0 {
			extra = []string{"the same in another order: " + lineDiff(before, after)}
		}
		t.Errorf("%s:\nmissing\n %s\nextra\n %s", what, strings.Join(missing, "\n "), strings.Join(extra, "\n "))
	}
}

func TestSwitch(t *testing.T) {
	l := newHost(t)
	k := open(t, kernel.Config{})
	s := external("eth1")
	before, moving := hostState(t), movable(t, "eth1")
	do(t, k, add(s)...)
	holds(t, k, s)
	same(t, "not all moved", moving, movable(t, "dwx1"))
	if got := run(t, "ip", "addr", "show", "dev", "eth1"); strings.Contains(got, "inet") || !strings.Contains(got, "master dwx1") {
		t.Errorf("the uplink: %s", got)
	}
	for _, w := range []string{"address 02:aa:00:00:00:01", "mtu 1500", "forward_delay 0", "stp_state 0", "alias dockway network=x1", "link/ether 02:aa:00:00:00:01"} {
		if got := run(t, "ip", "-d", "link", "show", "dwx1"); !strings.Contains(got, w) && !strings.HasPrefix(w, "address") {
			t.Errorf("the switch lacks %q: %s", w, got)
		}
	}
	_, had, _ := strings.Cut(before, "ipv4/conf/")
	_, has, _ := strings.Cut(settings(t, "dwx1"), "ipv4/conf/")
	same(t, "not all settings", had, has)

	do(t, k, add(s)...) // again is fine
	same(t, "moved again", moving, movable(t, "dwx1"))
	if all := observeAll(t, k); len(all) != 1 || all[s.Key()] != plan.Object(s) {
		t.Errorf("all there is:\n%s", all)
	}
	if got := observe(t, k, address("dwx1", "198.18.0.2/24")); len(got) > 0 {
		t.Errorf("an address of the host's is taken for ours: %s", got)
	}
	for _, op := range append(remove(address("dwx1", "198.18.0.2/24")), add(address("dwx1", "198.18.0.7/24"))...) {
		if err := k.Do(context.Background(), []plan.Op{op}); err == nil || !strings.Contains(err.Error(), "the host's") {
			t.Errorf("%s: %v", op, err)
		}
	}
	for _, lasting := range []string{
		`198.18.1.2/24 .* valid_lft 3[56]..sec preferred_lft 1[78]..sec`, `fd00::3/64 .* valid_lft 3[56]..sec preferred_lft 1[78]..sec`,
		`default via fe80::1 .* expires 1[78]..sec`,
	} {
		if got := run(t, "ip", "-o", "addr", "show", "dev", "dwx1") + run(t, "ip", "-6", "route", "show", "dev", "dwx1"); !regexp.MustCompile(lasting).MatchString(got) {
			t.Errorf("%s does not last as long as it should: %s", lasting, got)
		}
	}
	l.answers(t, "198.18.0.2")

	do(t, k, remove(s)...)
	if left := observeAll(t, k); len(left) > 0 {
		t.Errorf("still there: %s", left)
	}
	flush(t, k)
	same(t, "not as it was", before, hostState(t))
	do(t, k, remove(s)...) // again is fine
	same(t, "not as it was", before, hostState(t))
}

// answers checks that the host is reached at an address from the LAN, at last.
func (l *lan) answers(t testing.TB, address string) {
	t.Helper()
	listening, err := net.ListenPacket("udp", net.JoinHostPort(address, "7"))
	if err != nil {
		t.Fatal(err)
	}
	defer listening.Close()
	go func() {
		buf := make([]byte, 100)
		for {
			n, from, err := listening.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = listening.WriteTo(buf[:n], from)
		}
	}()
	var client net.Conn
	l.in(func() { client, err = net.Dial("udp", net.JoinHostPort(address, "7")) })
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	buf := make([]byte, 100)
	eventually(t, address+" answers", func() bool {
		if _, err := client.Write([]byte("x")); err != nil {
			return false
		}
		_ = client.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := client.Read(buf)
		return err == nil && n == 1
	})
}

// TestSwitchKeepsConnections sends through the uplink, both ways, while it is moved.
func TestSwitchKeepsConnections(t *testing.T) {
	l := newHost(t)
	k := open(t, kernel.Config{})
	for _, address := range []string{"198.18.0.2", "fd00::2"} {
		listener, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		accepted := make(chan net.Conn)
		go func() {
			conn, err := listener.Accept()
			if err != nil {
				t.Error(err)
			}
			accepted <- conn
		}()
		var client net.Conn
		l.in(func() { client, err = net.Dial("tcp", listener.Addr().String()) })
		if err != nil {
			t.Fatal(err)
		}
		server := <-accepted
		ends := make(chan error, 4)
		var received [2]counter
		stop := make(chan struct{})
		for i, conn := range []net.Conn{client, server} {
			go func() { ends <- send(conn, stop) }()
			go func() { ends <- received[i].receive(conn) }()
		}
		progress := func(what string) {
			t.Helper()
			for i := range received {
				from := received[i].load()
				eventually(t, what+": bytes arrive over "+address, func() bool { return received[i].load() > from+1<<16 })
			}
		}
		progress("before")
		for range 3 {
			do(t, k, add(external("eth1"))...)
			progress("moved")
			do(t, k, remove(external("eth1"))...)
			progress("moved back")
			flush(t, k)
			progress("deleted")
		}
		close(stop)
		for range 4 {
			select {
			case err := <-ends:
				if err != nil {
					t.Errorf("over %s: %v", address, err)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("the connection over %s did not end", address)
			}
		}
		client.Close()
		server.Close()
	}
}

// send writes numbered bytes until it is to stop.
func send(conn net.Conn, stop <-chan struct{}) error {
	buf := make([]byte, 1<<12)
	for i := range buf {
		buf[i] = byte(i)
	}
	for {
		select {
		case <-stop:
			return conn.(*net.TCPConn).CloseWrite()
		default:
			if _, err := conn.Write(buf); err != nil {
				return err
			}
		}
	}
}

// advertise sends a router advertisement (RFC 4861) for fd00:a::/64, to be used for seconds.
func (l *lan) advertise(t testing.TB, seconds int) {
	t.Helper()
	life := func(n int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(n)) }
	packet := slices.Concat([]byte{134, 0, 0, 0, 64, 0}, life(seconds)[2:], life(0), life(0),
		[]byte{3, 4, 64, 0xc0}, life(seconds), life(seconds), life(0), netip.MustParseAddr("fd00:a::").AsSlice())
	l.in(func() {
		card, err := net.InterfaceByName("lan0")
		if err != nil {
			t.Error(err)
			return
		}
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Close(fd)
		if err := errors.Join(
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255),
			unix.Sendto(fd, packet, 0, &unix.SockaddrInet6{Addr: netip.MustParseAddr("ff02::1").As16(), ZoneId: uint32(card.Index)}),
		); err != nil {
			t.Error(err)
		}
	})
}

// TestAdvertisedAddresses: what a router advertises is renewed by it, before and after.
func TestAdvertisedAddresses(t *testing.T) {
	inNamespace(t)
	l := newLAN(t)
	l.plug(t)
	commands(t, `
		sysctl -qw net/ipv6/conf/eth1/accept_ra=2
		ip link set eth1 up`)
	proved(t)
	k := open(t, kernel.Config{})
	seconds := 1000
	renewed := func(link string) {
		t.Helper()
		seconds += 100
		want := fmt.Sprintf(`fd00:a::\S* .*valid_lft (%d|%d)sec`, seconds, seconds-1)
		eventually(t, link+" is told its address by the router", func() bool {
			l.advertise(t, seconds)
			return regexp.MustCompile(want).MatchString(run(t, "ip", "-o", "addr", "show", "dev", link))
		})
		want = fmt.Sprintf(`(?m)^default via fe80::1 dev %s .*expires (%d|%d)sec`, link, seconds, seconds-1)
		if got := run(t, "ip", "-6", "route"); !regexp.MustCompile(want).MatchString(got) || strings.Count(got, "fe80::1") != 1 {
			t.Errorf("routes on %s: %s", link, got)
		}
	}
	renewed("eth1")
	for range 2 {
		do(t, k, add(external("eth1"))...)
		holds(t, k, external("eth1"))
		renewed("dwx1")
		do(t, k, remove(external("eth1"))...)
		flush(t, k)
		renewed("eth1")
	}
}

// TestMoveMeetsAddress: an address that comes up on the link that it is just moved to is taken as moved.
func TestMoveMeetsAddress(t *testing.T) {
	newHost(t)
	k := open(t, kernel.Config{})
	s := external("eth1")
	do(t, k, add(s)...)
	k.BeforeChange(func() { commands(t, "ip addr add 198.18.0.2/24 dev eth1") })
	do(t, k, remove(s)...)
	flush(t, k)
	if got := run(t, "ip", "addr", "show", "dev", "eth1"); strings.Count(got, "198.18.0.2/24") != 1 || exists(t, "dwx1") {
		t.Errorf("the host did not get its address back: %s", got)
	}
}

// TestSwitchWithoutIPv6 is on a kernel that has none.
func TestSwitchWithoutIPv6(t *testing.T) {
	inNamespace(t)
	l := newLAN(t)
	l.plug(t)
	root := t.TempDir()
	if err := errors.Join(os.Mkdir(root+"/net", 0o755), os.Symlink("/proc/sys/net/ipv4", root+"/net/ipv4")); err != nil {
		t.Fatal(err)
	}
	commands(t, `
		sysctl -qw net/ipv6/conf/eth1/disable_ipv6=1
		ip link set eth1 up
		ip addr add 198.18.0.2/24 dev eth1
		ip route add default via 198.18.0.1`)
	k := open(t, kernel.Config{ProcSys: root})
	before, s := hostState(t), external("eth1")
	do(t, k, add(s)...)
	holds(t, k, s)
	if got := run(t, "ip", "route", "show", "default"); !strings.Contains(got, "via 198.18.0.1 dev dwx1") {
		t.Errorf("routes: %s", got)
	}
	l.answers(t, "198.18.0.2")
	do(t, k, remove(s)...)
	flush(t, k)
	same(t, "not as it was", before, hostState(t))
}

// A counter receives what send sends.
type counter struct{ n atomic.Int64 }

func (c *counter) load() int64 { return c.n.Load() }

func (c *counter) receive(conn net.Conn) error {
	buf := make([]byte, 1<<12)
	for {
		n, err := conn.Read(buf)
		at := c.n.Load()
		for i, b := range buf[:n] {
			if b != byte(at+int64(i)) {
				return fmt.Errorf("byte %d is %d", at+int64(i), b)
			}
		}
		c.n.Add(int64(n))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
