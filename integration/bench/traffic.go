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

// The traffic of the benchmark: one byte there and one back, by blocking system calls on one
// processor, so that neither a scheduler nor a poller is measured.

// latency is what a client measured.
type latency struct {
	P50 time.Duration `json:"p50"`
	N   int           `json:"n"`
}

// pin keeps the calling goroutine's thread on one processor.
func pin(cpu int) error {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(0, &set)
}

// serve echoes single bytes, one connection after the other, until it is ended.
func serve(port int, cpu int) error {
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
		echo(conn)
	}
}

func echo(conn int) {
	defer unix.Close(conn) //nolint:errcheck // the client measures, not we
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

// measure is the client: requests on one connection (rr), or a connection for each (crr).
func measure(kind string, server netip.AddrPort, cpu int, duration time.Duration) (latency, error) {
	if err := pin(cpu); err != nil {
		return latency{}, err
	}
	var took []time.Duration
	var conn int
	var err error
	if kind == "rr" {
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
		if err := ask(conn); err != nil {
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
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(server.Port()), Addr: server.Addr().As4()}); err != nil {
		return 0, fmt.Errorf("connect to %s: %w", server, err)
	}
	return fd, nil
}

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
