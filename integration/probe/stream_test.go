package main

import (
	"net"
	"strings"
	"testing"
)

// TestReceive: bytes that are lost, come twice or come in another order are found.
func TestReceive(t *testing.T) {
	var right []byte
	for word := range 600 {
		right = append(right, 0, 0, 0, 0, 0, 0, byte(word>>8), byte(word))
	}
	for _, c := range []struct {
		what  string
		sends []byte
		wrong bool
	}{
		{"all", right, false},
		{"nothing", nil, false},
		{"a word lost", append(append([]byte{}, right[:4000]...), right[4008:]...), true},
		{"a piece twice", append(append([]byte{}, right[:2048]...), right[1024:]...), true},
		{"a byte lost", append(append([]byte{}, right[:4007]...), right[4008:]...), true},
	} {
		here, there := net.Pipe()
		go func() {
			_, _ = there.Write(c.sends) // the reader may have had enough
			_ = there.Close()
		}()
		var r report
		err := receive(here, &r)
		if c.wrong != (err != nil && strings.Contains(err.Error(), "lost or twice")) {
			t.Errorf("%s: %v", c.what, err)
		}
		if !c.wrong && r.Received != int64(len(c.sends)) {
			t.Errorf("%s: %d of %d bytes", c.what, r.Received, len(c.sends))
		}
		_ = here.Close()
	}
}
