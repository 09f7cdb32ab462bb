package hostport

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// holders finds out who has a port. It is safe for concurrent use.
type holders struct {
	mu      sync.Mutex
	scanned time.Time
	owners  map[uint32]int // process by the inode of its socket
}

// fresh is how long a scan of all processes serves: one search for a free port meets many ports of
// one process.
const fresh = time.Second

// of says who has the port, as far as it can be seen. diag is what openDiag returned; it is closed.
func (h *holders) of(hp plan.HostPort, diag int) string {
	nobody := fmt.Sprintf("another process of this host (`%s` names it)", ssCommand(hp))
	if diag < 0 {
		return nobody
	}
	defer unix.Close(diag)
	found, err := diagnose(diag, hp)
	if err != nil || len(found) == 0 {
		return nobody
	}
	s := found[0]
	for _, other := range found[1:] {
		if s.weight() < other.weight() {
			s = other
		}
	}
	if s.state == timeWait {
		return fmt.Sprintf("a past connection to %s, which the kernel keeps for a minute (TIME-WAIT)", s.remote)
	}
	who := h.process(s.inode)
	if who == "" {
		who = fmt.Sprintf("another process of this host (uid %d; `%s` names it)", s.uid, ssCommand(hp))
	}
	if s.remote.Port() != 0 {
		who += ", for its connection to " + s.remote.String()
	}
	return who
}

// process names the process that has the socket open; empty when it cannot be seen, such as from a
// container with its own process numbers.
func (h *holders) process(inode uint32) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	pid, known := h.owners[inode]
	if !known || time.Since(h.scanned) > fresh {
		h.owners = socketOwners()
		h.scanned = time.Now()
		if pid, known = h.owners[inode]; !known {
			return ""
		}
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return fmt.Sprintf("process %s (pid %d)", strings.TrimSpace(string(comm)), pid)
}

// socketOwners lists who has which socket open (proc(5), /proc/PID/fd). Processes that vanish
// meanwhile, or must not be looked into, are left out.
func socketOwners() map[uint32]int {
	owners := map[uint32]int{}
	for _, name := range names("/proc") {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", name, "fd")
		for _, fd := range names(dir) {
			link, err := os.Readlink(filepath.Join(dir, fd))
			if err != nil {
				continue
			}
			number, ok := strings.CutPrefix(link, "socket:[")
			if !ok {
				continue
			}
			if inode, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 32); err == nil {
				owners[uint32(inode)] = pid
			}
		}
	}
	return owners
}

func names(dir string) []string {
	d, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer d.Close()
	all, _ := d.Readdirnames(-1) // what could be read
	return all
}

// ssCommand is what an administrator can ask.
func ssCommand(hp plan.HostPort) string {
	return fmt.Sprintf("ss -%snp sport = :%d", map[string]string{tcp: "lt", udp: "lu", sctp: "lS"}[hp.Proto], hp.Host.Port())
}

// weight ranks sockets by how likely they are what is in the way.
func (s diagSocket) weight() int {
	switch {
	case s.state == listening:
		return 3
	case s.inode == 0: // nobody has it open any more
		return 0
	case s.remote.Port() == 0: // bound
		return 2
	}
	return 1
}

// inTheWay reports whether the socket excludes another on host (ip(7), ipv6(7): an IPv6 socket that
// is not for IPv6 only takes IPv4's port as well).
func (s diagSocket) inTheWay(host netip.Addr) bool {
	host = host.Unmap()
	if host.Is4() && s.local.Addr() == netip.IPv6Unspecified() {
		return !s.v6only
	}
	return overlap(s.local.Addr().WithZone(""), host.WithZone(""))
}
