package hostport

import (
	"errors"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// TestWithoutIPv6 holds a port of every address where the kernel was booted with ipv6.disable=1: a
// seccomp(2) filter on the test's thread answers as that kernel does.
func TestWithoutIPv6(t *testing.T) {
	p, _ := start(t)
	refuseFamily(t, unix.AF_INET6, unix.EAFNOSUPPORT)
	every4, every6 := hostPort(tcp, "0.0.0.0:8080", container4+":80"), hostPort(tcp, "[::]:8080", container4+":80")
	for _, hp := range []plan.HostPort{every4, every6, hostPort(udp, "[::]:8080", container4+":53")} {
		hold(t, p, hp)
		if got, ok := p.Lookup(hp.Key()); !ok || got != hp {
			t.Errorf("held %s, lookup gives %v, %v", hp, got, ok)
		}
	}
	var inUse *plan.PortInUseError
	if err := p.Hold(hostPort(tcp, "[fd00::1]:8080", other4+":80")); !errors.As(err, &inUse) {
		t.Errorf("one address of a port that is held on every one: %v", err)
	}
	// Who asks for one IPv6 address is told that there is none.
	if err := p.Hold(hostPort(tcp, "[fd00::1]:8081", container4+":80")); !errors.Is(err, unix.EAFNOSUPPORT) {
		t.Errorf("an IPv6 address: %v", err)
	}
	release(t, p, every6)
	if _, ok := p.Lookup(every6.Key()); ok {
		t.Error("released, yet held")
	}
}

// refuseFamily has the kernel refuse sockets of an address family to this thread, which must be
// locked and not be given back.
func refuseFamily(t *testing.T, family uint32, refusal unix.Errno) {
	t.Helper()
	const number, argument0 = 0, 16 // offsets in struct seccomp_data; the lower half comes first
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		t.Fatalf("where is the lower half of an argument on %s?", runtime.GOARCH)
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 3, K: unix.SYS_SOCKET},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: argument0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: family},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(refusal)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
		t.Fatalf("seccomp: %v", errno)
	}
}
