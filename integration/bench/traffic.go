package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The traffic of the benchmark: one byte there and one back, or bytes in one direction, by blocking
// system calls on one processor, so that neither a scheduler nor a poller is measured.

// latency is what a client measured.
type latency struct {
	P50 time.Duration `json:"p50"`
	N   int           `json:"n"`
}

// pin keeps the calling goroutine's thread on one processor, before all others of its control group
// there, which needs CAP_SYS_NICE.
func pin(cpu int) error {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	const first = -20
	return errors.Join(unix.SchedSetaffinity(0, &set), unix.Setpriority(unix.PRIO_PROCESS, 0, first))
}

// What a server does with a connection, and on which port.
var servers = []struct {
	name string
	port int
	do   func(conn int)
}{{"echo", 80, echo}, {"sink", 81, sink}, {"source", 82, source}}

// chunk is how much is read or written at once. A client takes the time of a piece, which is more than
// its buffers hold.
const (
	chunk   = 128 << 10
	buffers = 4 * chunk
	piece   = 1_000_000_000 / 250
)

// portOf is where a client measures something.
func portOf(what string) int {
	switch what {
	case "send":
		return servers[1].port
	case "receive":
		return servers[2].port
	}
	return servers[0].port
}

// serveAll serves on every port, until it is ended. Only one of the servers is to be busy at a time.
func serveAll(cpu int) error {
	ended := make(chan error)
	for _, s := range servers {
		go func() { ended <- serve(s.port, cpu, s.do) }()
	}
	return <-ended
}

// serve takes one connection after the other, until it is ended.
func serve(port int, cpu int, do func(conn int)) error {
	if err := pin(cpu); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: port}); err != nil {
		return err
	}
	if err := unix.Listen(fd, 1024); err != nil {
		return err
	}
	for {
		conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return err
		}
		do(conn)
		unix.Close(conn) //nolint:errcheck // the client measures, not we
	}
}

// echo sends single bytes back.
func echo(conn int) {
	_ = unix.SetsockoptInt(conn, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	var b [1]byte
	for {
		if n, err := unix.Read(conn, b[:]); n != 1 || err != nil {
			return
		}
		if n, err := unix.Write(conn, b[:]); n != 1 || err != nil {
			return
		}
	}
}

// sink takes all that comes.
func sink(conn int) {
	b := make([]byte, chunk)
	for n, err := 1, error(nil); n > 0 && err == nil; {
		n, err = unix.Read(conn, b)
	}
}

// source sends without end.
func source(conn int) {
	b := make([]byte, chunk)
	for err := error(nil); err == nil; {
		_, err = unix.Write(conn, b)
	}
}

// measure is the client: requests on one connection (rr), a connection for each (crr), or pieces
// of a stream there (send) or from there (receive).
func measure(kind string, server netip.AddrPort, cpu int, duration time.Duration) (latency, error) {
	if err := pin(cpu); err != nil {
		return latency{}, err
	}
	var took []time.Duration
	var conn int
	var err error
	if kind != "crr" {
		if conn, err = connect(server); err != nil {
			return latency{}, err
		}
	}
	for end := time.Now().Add(duration); time.Now().Before(end); {
		start := time.Now()
		if kind == "crr" {
			if conn, err = connect(server); err != nil {
				return latency{}, err
			}
		}
		switch kind {
		case "send":
			err = pass(conn, unix.Write)
		case "receive":
			err = pass(conn, unix.Read)
		default:
			err = ask(conn)
		}
		if err != nil {
			return latency{}, err
		}
		if kind == "crr" {
			unix.Close(conn) //nolint:errcheck // reset by linger
		}
		took = append(took, time.Since(start))
	}
	took = took[len(took)/10:] // the first tenth warms up
	slices.Sort(took)
	return latency{P50: took[len(took)/2], N: len(took)}, nil
}

func connect(server netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	// Closing resets: no port of the client waits in TIME_WAIT, so none runs out.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, err
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	for _, option := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, buffers); err != nil {
			return 0, err
		}
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(server.Port()), Addr: server.Addr().As4()}); err != nil {
		return 0, fmt.Errorf("connect to %s: %w", server, err)
	}
	return fd, nil
}

// pass takes a piece through a connection.
func pass(conn int, do func(int, []byte) (int, error)) error {
	b := buffer[:]
	for left := int(piece); left > 0; {
		n, err := do(conn, b[:min(len(b), left)])
		if err != nil {
			return err
		}
		if n == 0 {
			return errors.New("the server closed the connection")
		}
		left -= n
	}
	return nil
}

var buffer [chunk]byte

func ask(conn int) error {
	b := [1]byte{'x'}
	if _, err := unix.Write(conn, b[:]); err != nil {
		return err
	}
	n, err := unix.Read(conn, b[:])
	if err == nil && n != 1 {
		err = errors.New("the server closed the connection")
	}
	return err
}

func printJSON(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }
