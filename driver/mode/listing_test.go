package mode_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan"
	"github.com/dockway/dockway/driver/plan/nft"
)

// TestListing programs the rules into a namespace and compares what nft lists there, line by
// line, with the golden files, which are what the mode plans (TestGolden).
func TestListing(t *testing.T) {
	inNamespace(t, func() {
		tables := []*nft.Table{mode.InetTable(), mode.BridgeTable()}
		k, err := kernel.New(kernel.Config{Tables: tables})
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close() //nolint:errcheck // the namespace goes with the test
		host := mode.Host([]string{"eth0"})
		if err := k.Do(context.Background(), plan.Diff(nil, host)); err != nil {
			t.Fatal(err)
		}
		for _, table := range tables {
			listed, err := exec.Command("nft", "--stateless", "list", "table", string(table.Family), table.Name).CombinedOutput()
			if err != nil {
				t.Fatalf("nft list: %v: %s", err, listed)
			}
			want, err := os.ReadFile(filepath.Join("testdata", string(table.Family)+".nft"))
			if err != nil {
				t.Fatal(err)
			}
			listed = regexp.MustCompile(`\t\telements = \{[^}]*\}\n`).ReplaceAll(listed, nil)
			if !bytes.Equal(listed, want) {
				t.Errorf("nft lists table %s %s as\n%s\nwhich differs from testdata, first in line %q", table.Family, table.Name, listed, firstDifference(string(listed), string(want)))
			}
		}
		observed, err := k.ObserveAll(context.Background(), host.Keys())
		if err != nil {
			t.Fatal(err)
		}
		if ops := plan.Diff(observed, host); len(ops) > 0 {
			t.Errorf("what was just done is not observed as done: %v", ops)
		}
	})
}

// TestNamespaceListing does so for the tables of an overlay's namespace.
func TestNamespaceListing(t *testing.T) {
	inNamespace(t, func() {
		k, err := kernel.New(kernel.Config{Tables: mode.NamespaceTables()})
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close() //nolint:errcheck // the namespace goes with the test
		for _, table := range mode.NamespaceTables() {
			if err := k.Do(context.Background(), []plan.Op{{Verb: plan.Add, Object: plan.Table{Table: table}}}); err != nil {
				t.Fatal(err)
			}
			listed, err := exec.Command("nft", "--stateless", "list", "table", string(table.Family), table.Name).CombinedOutput()
			if err != nil {
				t.Fatalf("nft list: %v: %s", err, listed)
			}
			want, err := os.ReadFile(filepath.Join("testdata", "namespace-"+string(table.Family)+".nft"))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(listed, want) {
				t.Errorf("nft lists table %s %s as\n%s\nwhich differs from testdata, first in line %q", table.Family, table.Name, listed, firstDifference(string(listed), string(want)))
			}
		}
	})
}

func firstDifference(got, want string) string {
	lines := strings.Split(want, "\n")
	for i, line := range strings.Split(got, "\n") {
		if i >= len(lines) || line != lines[i] {
			return line
		}
	}
	return ""
}

// inNamespace runs f in a network namespace of its own, which ends with it.
func inNamespace(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("a network namespace (needs root): %v", err)
			return
		}
		f()
	}()
	<-done
}
