// Package house holds the house rules of the design as tests: who may import whom, which calls
// are made where, and that every package says in a sentence what it is.
package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/dockway/dockway/"

// mayImport is the import table of docs: what of ours each package may import. A package that is
// not listed here has to be entered, with its place in the order.
var mayImport = map[string][]string{
	"cmd/dockway":     {"plugin", "driver", "driver/mode", "driver/plan", "driver/plan/nft", "driver/store", "driver/kernel", "driver/hostport", "driver/gossip", "driver/gossip/facts", "ipam", "ipam/dhcp"},
	"plugin":          {"driver", "driver/mode", "driver/plan", "driver/policy", "ipam"},
	"driver":          {"driver/mode", "driver/policy", "driver/plan"},
	"driver/mode":     {"driver/policy", "driver/plan", "driver/plan/nft"},
	"driver/policy":   {"driver/plan", "driver/plan/nft"},
	"driver/plan":     {"driver/plan/nft"},
	"driver/plan/nft": {},
	"driver/kernel":   {"driver/kernel/fastpath", "driver/plan", "driver/plan/nft"},
	"driver/hostport": {"driver/plan"},
	"driver/gossip":   {"driver/gossip/facts"},
	"driver/store":    {},
	"ipam":            {"ipam/dhcp"},

	"driver/gossip/facts":    {},
	"driver/kernel/fastpath": {"driver/plan"},
	"ipam/dhcp":              {},
	"integration":            {"integration/lab"},
	"integration/...":        {"integration/lab"},
}

// onlyIn are the packages outside the standard library that only certain packages of ours may
// import: one place speaks each language.
var onlyIn = map[string][]string{
	"github.com/vishvananda/netlink":       {"driver/kernel", "integration", "driver/hostport"},
	"github.com/google/nftables":           {"driver/kernel", "integration"},
	"go.etcd.io/bbolt":                     {"driver/store"},
	"github.com/hashicorp/memberlist":      {"driver/gossip"},
	"github.com/docker/go-plugins-helpers": {"plugin"},
	"github.com/docker/docker":             {"integration", "plugin"},
	"os/exec":                              {"integration"},
	"github.com/spf13/cobra":               {"cmd/dockway"},
	"github.com/cilium/ebpf":               {"driver/kernel", "integration"},
	"github.com/insomniacslk/dhcp":         {"ipam/dhcp"},
	"github.com/gopacket/gopacket":         {"integration"},
}

func TestImports(t *testing.T) {
	for dir, files := range packages(t) {
		allowed, listed := mayImport[dir]
		if !listed && strings.HasPrefix(dir, "integration/") {
			allowed, listed = mayImport["integration/..."], true
		}
		if !listed {
			t.Errorf("package %s is not in the import table: enter it", dir)
		}
		for name, file := range files {
			test := strings.HasSuffix(name, "_test.go")
			for _, spec := range file.Imports {
				path, err := strconv.Unquote(spec.Path.Value)
				if err != nil {
					t.Fatal(err)
				}
				if own, ok := strings.CutPrefix(path, module); ok && !test && !slices.Contains(allowed, own) {
					t.Errorf("%s imports %s, which the table does not allow", name, own)
				}
				for prefix, places := range onlyIn {
					if within(path, prefix) && !test && !slices.ContainsFunc(places, func(p string) bool { return within(dir, p) }) {
						t.Errorf("%s imports %s, which belongs to %s", name, path, strings.Join(places, ", "))
					}
				}
			}
		}
	}
}

// TestForbiddenCalls keeps sleeping out of tests, process exits out of packages, and global
// registries out altogether.
func TestForbiddenCalls(t *testing.T) {
	for dir, files := range packages(t) {
		for name, file := range files {
			virtual := slices.ContainsFunc(file.Imports, func(s *ast.ImportSpec) bool { return s.Path.Value == `"testing/synctest"` })
			ast.Inspect(file, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.FuncDecl:
					if n.Recv == nil && n.Name.Name == "init" {
						t.Errorf("%s has an init function", name)
					}
				case *ast.SelectorExpr:
					pkg, ok := n.X.(*ast.Ident)
					if !ok {
						return true
					}
					switch call := pkg.Name + "." + n.Sel.Name; {
					case call == "time.Sleep" && !virtual && !within(dir, "integration"):
						t.Errorf("%s sleeps: poll with a deadline, or use virtual time", name)
					case call == "os.Exit" || strings.HasPrefix(call, "log.Fatal") || strings.HasPrefix(call, "logrus.Fatal"):
						if file.Name.Name != "main" && !strings.HasSuffix(name, "_test.go") && !within(dir, "integration") {
							t.Errorf("%s calls %s outside main", name, call)
						}
					}
				}
				return true
			})
		}
	}
}

// TestPackageComments wants a package comment of a sentence or more in one file of each package.
func TestPackageComments(t *testing.T) {
	for dir, files := range packages(t) {
		said := false
		for name, file := range files {
			if file.Doc == nil {
				continue
			}
			text := file.Doc.Text()
			if strings.HasSuffix(strings.TrimSpace(text), ".") && (strings.HasPrefix(text, "Package "+file.Name.Name+" ") || file.Name.Name == "main") {
				said = true
			} else {
				t.Errorf("%s: the package comment is no sentence that begins with the package's name", name)
			}
		}
		if !said {
			t.Errorf("package %s has no package comment", dir)
		}
	}
}

// TestNoPlaceOfAMachine keeps paths of a developer's machine out of what is committed.
func TestNoPlaceOfAMachine(t *testing.T) {
	root := top(t)
	walk(t, func(path string) {
		if strings.HasSuffix(path, "house_test.go") {
			return
		}
		text, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range []string{"/work/", "/root/go/"} {
			if strings.Contains(string(text), word) {
				t.Errorf("%s speaks of %q, a place of one machine", path, word)
			}
		}
	})
}

// packages parses every Go file, by directory and path.
func packages(t *testing.T) map[string]map[string]*ast.File {
	t.Helper()
	root := top(t)
	all := map[string]map[string]*ast.File{}
	walk(t, func(path string) {
		if !strings.HasSuffix(path, ".go") {
			return
		}
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, path), nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Dir(path)
		if all[dir] == nil {
			all[dir] = map[string]*ast.File{}
		}
		all[dir][path] = file
	})
	if len(all) < 5 {
		t.Fatalf("found only %d packages: the walk is broken", len(all))
	}
	return all
}

func walk(t *testing.T, visit func(path string)) {
	t.Helper()
	root := top(t)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); name == ".git" || name == "build" || name == "testdata" {
				return filepath.SkipDir
			}
			return nil
		}
		if d.Name() == ".git" { // of a work tree beside the repository
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err == nil && d.Type().IsRegular() {
			visit(rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// top is the folder of go.mod.
func top(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the tests")
		}
		dir = filepath.Dir(dir)
	}
}

func within(path, prefix string) bool { return path == prefix || strings.HasPrefix(path, prefix+"/") }
