package plugin

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestPanicIsAnAnswer(t *testing.T) {
	r := newRig(t, 0)
	r.networks.enter = func(context.Context) { panic("nil map") }
	status, reply := r.post("NetworkDriver.Leave", `{`+both+`}`)
	if got := refused(t, reply); status != 500 || !strings.Contains(got, "internal error: nil map") {
		t.Errorf("%d %s", status, got)
	}
	if log := r.log.String(); !strings.Contains(log, "level=error") || !strings.Contains(log, "networks).Leave") {
		t.Errorf("the log has no stack:\n%s", log)
	}
	r.networks.enter = nil
	if status, reply := r.post("NetworkDriver.Leave", `{`+both+`}`); status != 200 {
		t.Errorf("after a panic: %d %s", status, reply)
	}
}

// A service that heeds the context answers for itself.
func TestCallHasADeadline(t *testing.T) {
	r := newRig(t, 20*time.Millisecond)
	r.networks.enter = func(ctx context.Context) {
		<-ctx.Done()
		r.networks.err = fmt.Errorf("wait for the network's turn: %w", ctx.Err())
	}
	status, reply := r.post("NetworkDriver.Join", `{`+both+`}`)
	if got := refused(t, reply); status != 500 || got != "wait for the network's turn: context deadline exceeded" {
		t.Errorf("%d %s", status, got)
	}
}

// One that does not cannot hold the engine up.
func TestCallThatHangsIsAnswered(t *testing.T) {
	r := newRig(t, 20*time.Millisecond)
	release := make(chan struct{})
	r.networks.enter = func(context.Context) { <-release }
	status, reply := r.post("NetworkDriver.Join", `{`+both+`}`)
	if got := refused(t, reply); status != 500 || !strings.Contains(got, "no answer within 20ms") {
		t.Errorf("%d %s", status, got)
	}
	close(release)
}

// An engine that goes away does not leave a call half done.
func TestClientThatGoesAwayDoesNotCancel(t *testing.T) {
	r := newRig(t, time.Minute)
	entered, gone, outcome := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	r.networks.enter = func(ctx context.Context) {
		close(entered)
		<-gone
		outcome <- ctx.Err()
	}
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://x/NetworkDriver.Leave", strings.NewReader(`{`+both+`}`))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if resp, err := r.client.Do(req); err == nil {
			_ = resp.Body.Close()
		}
	}()
	<-entered
	cancel()
	<-done
	close(gone)
	if err := <-outcome; err != nil {
		t.Errorf("the call was cancelled: %v", err)
	}
}

// A body that does not come ends the call, not the server; the deadline does not outlive it.
func TestSlowBody(t *testing.T) {
	r := newRig(t, 20*time.Millisecond)
	conn, err := net.Dial("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := fmt.Fprint(conn, "POST /NetworkDriver.Join HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 400") || !strings.Contains(string(answer), "read the request's body") {
		t.Errorf("%q, %v", answer, err)
	}
}

// The deadline for reading a body must not cut off a call that takes longer, nor a later call on
// the same connection.
func TestReadDeadlineIsLifted(t *testing.T) {
	r := newRig(t, 50*time.Millisecond)
	conn, err := net.Dial("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	r.client.Transport = &http.Transport{MaxConnsPerHost: 1, DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	r.networks.enter = func(ctx context.Context) { <-ctx.Done() } // longer than the deadline for the body
	for range 3 {
		if status, reply := r.post("NetworkDriver.Leave", `{`+both+`}`); status != 200 {
			t.Errorf("%d %s", status, reply)
		}
	}
}
