package lab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Change is what a program is about to do to the kernel or to a file on the disk: a system call that has not
// begun.
type Change struct {
	Disk bool   // of a file, and not of the kernel's state
	What string // "netlink 0: message 16", "pwrite64"
	Late bool   // it was put off
}

func (c Change) String() string { return c.What }

// What a gate can answer, besides nil and a syscall.Errno.
var (
	ErrKill = errors.New("kill")  // the program is killed, and the change not made
	ErrWait = errors.New("later") // it is put off until no other change comes: of two threads the other is first
)

// Gate judges each change before it is made, one at a time: nil lets it be made, a syscall.Errno has it fail with that. What
// only reads is not asked about.
type Gate func(Change) error

// StartGated is Start of a program whose changes pass a gate. The kernel holds each until it is judged (seccomp's
// notifications), in whichever thread it is. Such a program must not start others.
func (m *Machine) StartGated(gate Gate, ready string, args ...string) (*Process, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close() //nolint:errcheck // read to its end
	self, err := os.Executable()
	if err != nil {
		return nil, errors.Join(err, theirs.Close())
	}
	p := m.process(append([]string{self}, args...)...)
	p.cmd.Env = append(p.cmd.Env, gateVariable+"=1")
	p.cmd.ExtraFiles = []*os.File{theirs}
	err = p.start()
	if err := errors.Join(err, theirs.Close()); err != nil {
		return nil, err
	}
	notices, err := receiveFile(ours)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: gate its system calls: %w: %s", p.what, err, p.Output()), p.Stop())
	}
	go p.guard(notices, gate)
	return p, p.wait(ready)
}

// gateVariable in the environment makes Main install the filter and become the program that is in the arguments.
const gateVariable = "DOCKWAY_LAB_GATE"

// gated are the system calls that are held. What each does is looked at in change.
var gated = []uint32{
	unix.SYS_WRITE, unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_PWRITE64, unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE,
	unix.SYS_BPF, unix.SYS_MOUNT, unix.SYS_UMOUNT2,
}

// becomeGated hands the filter's notices to the parent and runs the program in the arguments. It does not return
// unless that fails.
func becomeGated() error {
	path, err := exec.LookPath(os.Args[1])
	if err != nil {
		return err
	}
	if err := os.Unsetenv(gateVariable); err != nil {
		return err
	}
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}} // the call's number
	for i, nr := range gated {
		program = append(program, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jt: uint8(len(gated) - i)})
	}
	program = append(program,
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
	// The filter holds this thread only, and what it becomes: another one has to send the notices.
	ready, filtered, sent := make(chan struct{}), make(chan int), make(chan error)
	go func() {
		runtime.LockOSThread()
		close(ready) // it has a thread
		sent <- unix.Sendmsg(3, []byte{0}, unix.UnixRights(<-filtered), nil, 0)
	}()
	runtime.LockOSThread()
	<-ready
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	notices, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("filter system calls: %w", errno)
	}
	filtered <- int(notices)
	if err := <-sent; err != nil {
		return fmt.Errorf("send the notices: %w", err)
	}
	unix.CloseOnExec(int(notices))
	unix.CloseOnExec(3)
	return unix.Exec(path, os.Args[1:], os.Environ())
}

func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "gate"), os.NewFile(uintptr(fds[1]), "gate"), nil
}

// receiveFile is the file that is sent through a socket.
func receiveFile(socket *os.File) (*os.File, error) {
	conn, err := net.FileConn(socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // read to its end
	beside := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(make([]byte, 1), beside)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(beside[:n])
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(err, errors.New("nothing came"))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "notices"), nil
}

// notice is the kernel's struct seccomp_notif, verdict its struct seccomp_notif_resp.
type (
	notice struct {
		id   uint64
		pid  uint32
		_    uint32
		nr   int32
		_    uint32
		_    uint64
		args [6]uint64
	}
	verdict struct {
		id    uint64
		value int64
		errno int32
		flags uint32
	}
)

// lull is how long a change that is put off waits for others. It decides on their order only.
const lull = 20 * time.Millisecond

// guard has the gate judge what the program is about to do, until the program ends.
func (p *Process) guard(notices *os.File, gate Gate) {
	defer notices.Close() //nolint:errcheck // nobody is held any more
	g := guarded{pidfd: -1}
	defer g.close()
	fd := int(notices.Fd())
	type held struct {
		id     uint64
		change Change
	}
	var waiting []held
	for {
		var h held
		timeout := -1
		if len(waiting) > 0 {
			timeout = int(lull / time.Millisecond)
		}
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		switch n, err := unix.Poll(ready, timeout); {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n == 0:
			h, waiting = waiting[0], waiting[1:]
			h.change.Late = true
		case err != nil || ready[0].Revents&unix.POLLIN == 0:
			return // nobody is left to notify of
		default:
			var n notice
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n))); errno != 0 {
				continue // who made the call has been killed
			}
			h = held{n.id, g.change(n)}
		}
		v := verdict{id: h.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		if h.change.What != "" {
			var errno syscall.Errno
			switch err := gate(h.change); {
			case errors.Is(err, ErrWait):
				waiting = append(waiting, h)
				continue
			case errors.Is(err, ErrKill):
				_ = p.Kill() // the call is held until then, and is not made
				return
			case errors.As(err, &errno):
				v = verdict{id: h.id, errno: -int32(errno)}
			}
		}
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&v)))
	}
}

// guarded looks into a program that is held.
type guarded struct{ pidfd int }

func (g *guarded) close() {
	if g.pidfd >= 0 {
		_ = unix.Close(g.pidfd)
	}
}

// change tells what a system call would change; What is empty if that is nothing.
func (g *guarded) change(n notice) Change {
	pid, fd := int(n.pid), int(n.args[0])
	switch n.nr {
	case unix.SYS_PWRITE64:
		return Change{Disk: true, What: "pwrite64"}
	case unix.SYS_FDATASYNC:
		return Change{Disk: true, What: "fdatasync"}
	case unix.SYS_FTRUNCATE:
		return Change{Disk: true, What: "ftruncate"}
	case unix.SYS_MOUNT:
		return Change{What: "mount"}
	case unix.SYS_UMOUNT2:
		return Change{What: "umount2"}
	case unix.SYS_BPF:
		switch n.args[0] {
		case unix.BPF_MAP_UPDATE_ELEM, unix.BPF_MAP_DELETE_ELEM, unix.BPF_PROG_ATTACH, unix.BPF_PROG_DETACH, unix.BPF_LINK_CREATE, unix.BPF_LINK_UPDATE:
			return Change{What: fmt.Sprintf("bpf %d", n.args[0])}
		}
		return Change{}
	case unix.SYS_SENDMSG: // of struct msghdr, the first iovec
		header := peek(pid, n.args[1], 32)
		if len(header) < 32 {
			return Change{}
		}
		iovec := peek(pid, binary.NativeEndian.Uint64(header[16:]), 16)
		if len(iovec) < 16 {
			return Change{}
		}
		return g.message(pid, fd, binary.NativeEndian.Uint64(iovec), binary.NativeEndian.Uint64(iovec[8:]))
	}
	// write and sendto
	return g.message(pid, fd, n.args[1], n.args[2])
}

// message tells what something that is written to a file or a socket changes.
func (g *guarded) message(pid, fd int, address, size uint64) Change {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
	if err != nil {
		return Change{} // it has been killed
	}
	if strings.HasPrefix(path, "/proc/sys/") {
		return Change{What: "sysctl " + strings.TrimPrefix(path, "/proc/sys/")}
	}
	if !strings.HasPrefix(path, "socket:") {
		return Change{}
	}
	protocol, ok := g.netlink(pid, fd)
	if !ok {
		return Change{}
	}
	data := peek(pid, address, min(size, 1<<16))
	for len(data) >= unix.SizeofNlMsghdr {
		length, kind := binary.NativeEndian.Uint32(data), binary.NativeEndian.Uint16(data[4:])
		if changes(protocol, kind) {
			return Change{What: fmt.Sprintf("netlink %d: message %d", protocol, kind)}
		}
		if length < unix.SizeofNlMsghdr || uint64(length) > uint64(len(data)) {
			break
		}
		data = data[min(len(data), int(length+3)&^3):]
	}
	return Change{}
}

// changes tells whether a netlink message does more than ask.
func changes(protocol int, kind uint16) bool {
	switch protocol {
	case unix.NETLINK_ROUTE:
		return kind >= unix.RTM_BASE && kind&3 != 2 // RTM_GET…
	case unix.NETLINK_NETFILTER:
		// nftables takes changes only within a batch. Of connections, all but IPCTNL_MSG_CT_NEW and _DELETE ask.
		return kind == unix.NFNL_MSG_BATCH_BEGIN || kind == unix.NFNL_SUBSYS_CTNETLINK<<8 || kind == unix.NFNL_SUBSYS_CTNETLINK<<8|2
	}
	return false
}

// netlink is the protocol of a netlink socket.
func (g *guarded) netlink(pid, fd int) (protocol int, ok bool) {
	if g.pidfd < 0 {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0, false
		}
		_, rest, _ := bytes.Cut(status, []byte("\nTgid:"))
		var process int
		if _, err := fmt.Sscan(string(rest), &process); err != nil {
			return 0, false
		}
		if g.pidfd, err = unix.PidfdOpen(process, 0); err != nil {
			return 0, false
		}
	}
	copied, err := unix.PidfdGetfd(g.pidfd, fd, 0)
	if err != nil {
		return 0, false
	}
	defer unix.Close(copied) //nolint:errcheck // only asked
	if domain, err := unix.GetsockoptInt(copied, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_NETLINK {
		return 0, false
	}
	protocol, err = unix.GetsockoptInt(copied, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return protocol, err == nil
}

// peek reads a program's memory, as much of it as there is.
func peek(pid int, address, size uint64) []byte {
	if size == 0 {
		return nil
	}
	data := make([]byte, size)
	local := []unix.Iovec{{Base: &data[0], Len: size}}
	n, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: uintptr(address), Len: int(size)}}, 0)
	if err != nil {
		return nil
	}
	return data[:n]
}
