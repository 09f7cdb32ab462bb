package plugin

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// line is one line of a recorded conversation with a real engine: a call, or a mark.
type line struct {
	Mark string
	Call string
	Req  json.RawMessage
}

// trace reads a recorded conversation.
func trace(t testing.TB, path string) []line {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var lines []line
	scan := bufio.NewScanner(bytes.NewReader(text))
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		var l line
		if err := json.Unmarshal(scan.Bytes(), &l); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if string(l.Req) == "null" {
			l.Req = nil // an empty body
		}
		lines = append(lines, l)
	}
	return lines
}

func traces(t testing.TB) []string {
	t.Helper()
	paths, err := filepath.Glob("testdata/traces/*.jsonl")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no traces: %v", err)
	}
	return paths
}

// Each recorded conversation is replayed; the golden file shows what reached the services as
// typed calls and what the engine was answered.
func TestTraces(t *testing.T) {
	for _, path := range traces(t) {
		name := strings.TrimSuffix(filepath.Base(path), ".jsonl")
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 0)
			var out strings.Builder
			for _, l := range trace(t, path) {
				if l.Mark != "" {
					fmt.Fprintf(&out, "\n# %s\n", l.Mark)
					continue
				}
				status, reply := r.post(strings.TrimPrefix(l.Call, "/"), string(l.Req))
				fmt.Fprintf(&out, "%s\n", strings.TrimPrefix(l.Call, "/"))
				for _, call := range append(r.networks.take(), r.addresses.take()...) {
					fmt.Fprintf(&out, "  %s\n", call)
				}
				fmt.Fprintf(&out, "  => %d %s\n", status, reply)
			}
			golden := filepath.Join("testdata", "golden", name+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if out.String() != string(want) {
				t.Errorf("differs from %s (go test -update writes it anew):\n%s", golden, difference(string(want), out.String()))
			}
		})
	}
}

// difference shows the first line that differs.
func difference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range min(len(w), len(g)) {
		if w[i] != g[i] {
			return fmt.Sprintf("line %d\nwant %s\ngot  %s", i+1, w[i], g[i])
		}
	}
	return fmt.Sprintf("want %d lines, got %d", len(w), len(g))
}
