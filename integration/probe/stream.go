package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"
)

const streamUsage = `probe stream serve ADDRESS            numbered bytes both ways on one TCP connection, until the client or stdin ends; prints a report
probe stream to ADDRESS               the client of it, until a line on stdin`

// A side sends a piece of numbered words each pause.
const (
	piece = 512 * 8
	pause = 5 * time.Millisecond
)

// report is what one side of a stream says at its end, in JSON.
type report struct {
	Sent     int64         `json:"sent"`        // bytes
	Received int64         `json:"received"`    // bytes, in order, none lost or twice
	Longest  time.Duration `json:"longest_gap"` // ns, between two arrivals
	Error    string        `json:"error,omitempty"`
}

func serveStream(address string, timeout time.Duration) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	return stream(conn, stopOnLine(), timeout)
}

func stopOnLine() <-chan struct{} {
	stop := make(chan struct{})
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // the end of stdin ends it too
		close(stop)
	}()
	return stop
}

func streamTo(address string, timeout time.Duration) error {
	conn, err := net.DialTimeout("tcp", address, timeout)
	if err != nil {
		return err
	}
	fmt.Println("streaming")
	return stream(conn, stopOnLine(), timeout)
}

// stream sends and receives until stop, or until the other side has ended its half, and prints what
// has become of it. After stop the other side has the timeout to finish.
func stream(conn net.Conn, stop <-chan struct{}, timeout time.Duration) error {
	defer conn.Close() //nolint:errcheck // both halves are at their end
	var r report
	var sent atomic.Int64
	ended := make(chan struct{}) // the other side's half
	go func() {
		<-stop
		_ = conn.SetDeadline(time.Now().Add(timeout)) // it may be closed
	}()
	sending := make(chan error, 1)
	go func() { sending <- send(conn, stop, ended, &sent) }()
	receiving := receive(conn, &r)
	close(ended)
	if receiving != nil {
		_ = conn.Close() // the sender may wait for room
	}
	err := errors.Join(receiving, <-sending)
	r.Sent = sent.Load()
	if err != nil {
		r.Error = err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return err
	}
	return err
}

// send numbers words until stop or until the other side has ended, and ends its own half.
func send(conn net.Conn, stop, ended <-chan struct{}, sent *atomic.Int64) error {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	b := make([]byte, piece)
	for going := true; going; {
		for i := 0; i < piece; i += 8 {
			binary.BigEndian.PutUint64(b[i:], uint64(sent.Load()+int64(i))/8)
		}
		n, err := conn.Write(b)
		sent.Add(int64(n))
		if err != nil {
			return fmt.Errorf("send after %d bytes: %w", sent.Load(), err)
		}
		select {
		case <-stop:
			going = false
		case <-ended:
			going = false
		case <-tick.C:
		}
	}
	half, ok := conn.(*net.TCPConn)
	if !ok {
		return fmt.Errorf("%T has no halves", conn)
	}
	return half.CloseWrite()
}

// receive compares what comes with the numbers, to the end of the other side's half.
func receive(conn net.Conn, r *report) error {
	b, want := make([]byte, 1<<16), make([]byte, 8)
	last := time.Now()
	for {
		n, err := conn.Read(b)
		r.Longest, last = max(r.Longest, time.Since(last)), time.Now()
		for _, got := range b[:n] {
			binary.BigEndian.PutUint64(want, uint64(r.Received/8))
			if got != want[r.Received%8] {
				return fmt.Errorf("byte %d is another one: lost or twice", r.Received)
			}
			r.Received++
		}
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("receive after %d bytes: %w", r.Received, err)
		}
	}
}
