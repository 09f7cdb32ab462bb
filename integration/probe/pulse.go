package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"
)

const pulseUsage = `probe pulse serve ADDRESS             receive numbered datagrams until a line on stdin; prints which came, and when
probe pulse to ADDRESS                send one each millisecond, until a line on stdin; prints when`

// beat is the time from one datagram to the next.
const beat = time.Millisecond

// A datagram has the run that it belongs to, which is the time of its start, and its number.
const pulseSize = 16

// sentReport is what the sender prints.
type sentReport struct {
	Run    int64   `json:"run"`              // nanoseconds since 1970: the start
	At     []int64 `json:"at"`               // when each datagram was sent, in nanoseconds since the start
	Failed []int   `json:"failed,omitempty"` // the numbers of those that the kernel did not take
}

// receivedReport is what the receiver prints.
type receivedReport struct {
	Run     int64   `json:"run"`     // of the first datagram
	Numbers []int   `json:"numbers"` // in the order of their arrival
	At      []int64 `json:"at"`      // when each arrived, in nanoseconds since the start
	Strange int     `json:"strange"` // datagrams that are not of the run
}

// servePulse receives until stop.
func servePulse(address string) error {
	conn, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	if udp, ok := conn.(*net.UDPConn); ok {
		if err := udp.SetReadBuffer(1 << 20); err != nil {
			return err
		}
	}
	fmt.Println("listening")
	go func() {
		<-stopOnLine()
		_ = conn.Close() // which ends the loop
	}()
	var r receivedReport
	b := make([]byte, 2048)
	for {
		n, _, err := conn.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return json.NewEncoder(os.Stdout).Encode(r)
		} else if err != nil {
			return err
		}
		now := time.Now().UnixNano()
		run, number, ok := parsePulse(b[:n])
		if ok && r.Run == 0 {
			r.Run = run
		}
		if !ok || run != r.Run {
			r.Strange++
			continue
		}
		r.Numbers, r.At = append(r.Numbers, number), append(r.At, now-run)
	}
}

func parsePulse(b []byte) (run int64, number int, ok bool) {
	if len(b) != pulseSize {
		return 0, 0, false
	}
	return int64(binary.BigEndian.Uint64(b)), int(binary.BigEndian.Uint64(b[8:])), true
}

// sendPulse sends until stop. After a delay it sends what is due at once; what cannot be sent, as
// without a route, is skipped.
func sendPulse(address string) error {
	conn, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing is to come
	stop := stopOnLine()
	fmt.Println("sending")
	start := time.Now()
	r := sentReport{Run: start.UnixNano()}
	tick := time.NewTicker(beat)
	defer tick.Stop()
	b := binary.BigEndian.AppendUint64(nil, uint64(r.Run))
	for {
		select {
		case <-stop:
			return json.NewEncoder(os.Stdout).Encode(r)
		case <-tick.C:
		}
		for due := int(time.Since(start) / beat); len(r.At) < due; {
			number := len(r.At)
			r.At = append(r.At, int64(time.Since(start)))
			if _, err := conn.Write(binary.BigEndian.AppendUint64(slices.Clone(b), uint64(number))); err != nil {
				r.Failed = append(r.Failed, number)
			}
		}
	}
}
