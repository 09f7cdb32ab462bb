package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// caller speaks to the plugin as the engine does.
type caller struct {
	client *http.Client
}

// caller finds the plugin's socket on the host. The path is longer than a socket's may be, so there is a link to it.
func (h *host) caller() *caller {
	h.t.Helper()
	id := h.docker("plugin", "inspect", "-f", "{{.Id}}", lab.Plugin)
	dir, err := os.MkdirTemp(shared.lab.Dir(), "socket-")
	if err != nil {
		h.t.Fatal(err)
	}
	link := filepath.Join(dir, "s")
	if err := os.Symlink(fmt.Sprintf("/proc/%d/root/run/docker/plugins/%s", h.PID(), id), link); err != nil {
		h.t.Fatal(err)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 64, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(link, "dockway.sock"))
	}}
	h.t.Cleanup(transport.CloseIdleConnections)
	return &caller{client: &http.Client{Transport: transport, Timeout: 30 * time.Second}}
}

// raw posts a body and gives the answer's status and body.
func (c *caller) raw(method, body string) (int, string, error) {
	resp, err := c.client.Post("http://plugin/"+method, "", strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	said, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(bytes.TrimSpace(said)), err
}

// call posts a request that has to be granted.
func (c *caller) call(method string, request map[string]any) error {
	return c.ask(method, request, &struct{}{})
}

// ask is call of a request whose answer matters.
func (c *caller) ask(method string, request map[string]any, reply any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	status, said, err := c.raw(method, string(body))
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("%s: %d: %s", method, status, said)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(said), reply)
}

// endpointID is as random as those of the engine: links are named by its beginning.
func endpointID(n int) string { return fmt.Sprintf("%x", sha256.Sum256([]byte{byte(n >> 8), byte(n)})) }

// cycle is an endpoint's whole life.
func (c *caller) cycle(network string, n int) error {
	ids := func(more ...any) map[string]any {
		r := map[string]any{"NetworkID": network, "EndpointID": endpointID(n)}
		for i := 0; i < len(more); i += 2 {
			r[more[i].(string)] = more[i+1]
		}
		return r
	}
	address := fmt.Sprintf("198.19.%d.%d/20", 64+n%16, 10+n/16%200)
	ports := []map[string]any{{"Proto": 6, "Port": 80, "HostPort": 20000 + n, "HostPortEnd": 20000 + n}, {"Proto": 17, "Port": 80, "HostPort": 20000 + n, "HostPortEnd": 20000 + n}}
	steps := []struct {
		method  string
		request map[string]any
	}{
		{"CreateEndpoint", ids("Interface", map[string]any{"Address": address}, "Options", map[string]any{})},
		{"Join", ids("SandboxKey", "/run/docker/netns/leak", "Options", map[string]any{})},
		{"ProgramExternalConnectivity", ids("Options", map[string]any{"com.docker.network.portmap": ports})},
		{"RevokeExternalConnectivity", ids()},
		{"Leave", ids()},
		{"DeleteEndpoint", ids()},
	}
	if n%2 == 1 { // not every engine revokes
		steps = append(steps[:3], steps[4:]...)
	}
	for _, s := range steps {
		if err := c.call("NetworkDriver."+s.method, s.request); err != nil {
			return err
		}
	}
	return nil
}

// resources counts what could leak.
func (h *host) resources() string {
	h.t.Helper()
	pid, err := h.PluginPID()
	if err != nil {
		h.t.Fatal(err)
	}
	return h.must(fmt.Sprintf(`echo links $(ip -o link | wc -l)
echo namespaces $(lsns -nt net | wc -l)
echo elements $(nft -s list table inet dockway | cksum) $(nft -s list table bridge dockway | cksum)
echo published $(ss -Htuan | wc -l)
ls -l /proc/%[1]s/fd | sed -n 's/.* -> \([a-z]*\).*/fd \1/p' | sort | uniq -c`, pid)) + "\n" + h.goroutines()
}

// goroutines counts the plugin's.
func (h *host) goroutines() string {
	h.t.Helper()
	out, err := h.Dockway("status", "--json")
	if err != nil {
		h.t.Fatal(err)
	}
	found := regexp.MustCompile(`"goroutines":[0-9]+`).FindString(out)
	if found == "" {
		h.t.Fatalf("dockway status does not count goroutines: %s", out)
	}
	return found
}

// memory is what the plugin takes.
func (h *host) memory() string {
	pid, err := h.PluginPID()
	if err != nil {
		return err.Error()
	}
	return strings.Join(strings.Fields(h.must("grep -E 'VmRSS|Threads' /proc/"+pid+"/status")), " ")
}

// TestNothingLeaks: after a thousand endpoints there is as much of everything as before.
func TestNothingLeaks(t *testing.T) {
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("leak", "--subnet", "198.19.64.0/20")
		network := h.docker("network", "inspect", "-f", "{{.Id}}", "leak")
		docker := func() {
			for range 5 {
				h.docker("run", "--rm", "--network", "leak", "-p", "8160:80", lab.Image, "true")
			}
		}
		cycles := func(from, to int) {
			t.Helper()
			c := h.caller()
			defer c.client.CloseIdleConnections()
			var next atomic.Int64
			next.Store(int64(from))
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					for n := int(next.Add(1)) - 1; n < to && !t.Failed(); n = int(next.Add(1)) - 1 {
						if err := c.cycle(network, n); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
		}
		cycles(0, 50) // whatever is made once and kept
		docker()
		// Connections end late, and goroutines with them.
		before, last := "", ""
		if err := lab.WaitFor(time.Minute, "all to stay as it is", func() (bool, error) {
			before, last = h.resources(), before
			return before == last, nil
		}); err != nil {
			t.Fatalf("%v: last\n%s\nthen\n%s", err, last, before)
		}
		memory := h.memory()
		start := time.Now()
		const count = 1000
		cycles(50, 50+count)
		t.Logf("%d cycles in %s; before %s, after %s", count, time.Since(start).Round(time.Millisecond), memory, h.memory())
		docker()
		var after string
		if err := lab.WaitFor(soon, "all to be let go", func() (bool, error) {
			after = h.resources()
			return after == before, nil
		}); err != nil {
			t.Errorf("%v: before\n%s\nafter\n%s", err, before, after)
		}
		t.Log(after)
	})
}

// TestMalformedCalls: what is no request is refused with a clear error, and changes nothing.
func TestMalformedCalls(t *testing.T) {
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("malformed")
		h.server("malformed-a", "malformed", "-p", "8170:80")
		before, record := h.state(), h.record(t)
		c := h.caller()
		for what, body := range map[string]string{
			"empty":    "",
			"huge":     `{"NetworkID":"` + strings.Repeat("a", 2<<20) + `"}`,
			"deep":     strings.Repeat(`{"Options":`, 100_000) + "1" + strings.Repeat("}", 100_000),
			"deep too": `{"NetworkID":"a","Options":` + strings.Repeat("[", 50_000),
			"mistyped": `{"NetworkID":7,"EndpointID":[],"PoolID":{},"Options":"x","Pool":1,"AddressSpace":2}`,
			"no JSON":  "network, please",
			"half":     `{"NetworkID":"`,
			"an array": `[]`,
		} {
			for _, method := range []string{"NetworkDriver.CreateNetwork", "NetworkDriver.DeleteNetwork", "NetworkDriver.CreateEndpoint", "NetworkDriver.DeleteEndpoint",
				"NetworkDriver.Join", "NetworkDriver.Leave", "NetworkDriver.ProgramExternalConnectivity", "NetworkDriver.RevokeExternalConnectivity",
				"IpamDriver.RequestPool", "IpamDriver.ReleasePool", "IpamDriver.RequestAddress", "IpamDriver.ReleaseAddress"} {
				status, said, err := c.raw(method, body)
				var reply struct{ Err string }
				if err != nil || status < 400 || json.Unmarshal([]byte(said), &reply) != nil || reply.Err == "" || len(said) > 2000 {
					t.Errorf("%s with a body that is %s: %d, %.200s, %v", method, what, status, said, err)
				}
			}
		}
		if after := h.state(); after != before {
			t.Errorf("refused calls changed the state: before\n%s\nafter\n%s", before, after)
		}
		if after := h.record(t); after != record {
			t.Errorf("refused calls changed the record: before\n%s\nafter\n%s", record, after)
		}
		reaches(t, "published port", on(shared.peer), "tcp", h.ip+":8170", peer4)
	})
}

// TestManyCallsAtOnce: 64 callers on ids of their own, and on the same.
func TestManyCallsAtOnce(t *testing.T) {
	eachSurvivor(t, func(t *testing.T, h *host) {
		h.network("many", "--subnet", "198.19.64.0/20")
		network := h.docker("network", "inspect", "-f", "{{.Id}}", "many")
		free := h.state()
		c := h.caller()
		at := func(do func(n int) error) (failed int) {
			var wg sync.WaitGroup
			var failures atomic.Int64
			for n := range 64 {
				wg.Go(func() {
					if err := do(n); err != nil {
						failures.Add(1)
						if !strings.Contains(err.Error(), `{"Err":"`) {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			return int(failures.Load())
		}
		if failed := at(func(n int) error { return c.cycle(network, n) }); failed > 0 {
			t.Errorf("%d of 64 callers with ids of their own failed", failed)
		}
		h.settles("nothing to be left of different ids", free)
		// Of those on one id the first to make the endpoint may be interrupted by the first to delete it.
		t.Logf("%d of 64 callers with the same id were refused something", at(func(int) error { return c.cycle(network, 1) }))
		for _, method := range []string{"Leave", "DeleteEndpoint"} { // those who came last may have failed before
			if err := c.call("NetworkDriver."+method, map[string]any{"NetworkID": network, "EndpointID": endpointID(1)}); err != nil {
				t.Error(err)
			}
		}
		h.settles("nothing to be left of the same id", free)
		// The same request again is granted, to all at once.
		create := map[string]any{"NetworkID": network, "EndpointID": endpointID(2), "Interface": map[string]any{"Address": "198.19.70.7/20", "MacAddress": "02:42:00:00:00:99"}}
		if failed := at(func(int) error { return c.call("NetworkDriver.CreateEndpoint", create) }); failed > 0 {
			t.Errorf("%d of 64 callers with the same request failed", failed)
		}
		if failed := at(func(int) error {
			return c.call("NetworkDriver.DeleteEndpoint", map[string]any{"NetworkID": network, "EndpointID": endpointID(2)})
		}); failed > 0 {
			t.Errorf("%d of 64 callers that delete the same failed", failed)
		}
		h.settles("nothing to be left", free)
	})
}
