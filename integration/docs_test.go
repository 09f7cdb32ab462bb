package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

// TestExamples runs the docker and dockway commands of the README and of the pages in docs, in
// order, on a host: what a reader copies has to work.
func TestExamples(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	h := onHost(t, shared.hosts[lab.Moby])
	if _, err := theWire(); err != nil { // the pages name its links
		t.Fatal(err)
	}
	h.docker("tag", lab.Image, "nginx")
	h.network("nat") // as `make install` makes it
	ran := 0
	for _, page := range []string{"README.md", "docs/modes/nat.md", "docs/ipam.md", "docs/operations.md", "docs/modes/transparent.md", "docs/modes/l2bridge.md", "docs/modes/l2tunnel.md"} {
		text, err := os.ReadFile(filepath.Join(root, page))
		if err != nil {
			t.Fatal(err)
		}
		t.Run(page, func(t *testing.T) {
			for _, command := range examples(string(text)) {
				out, err := h.Script("PATH=" + filepath.Join(root, "build") + ":$PATH\n" + command)
				if err != nil {
					t.Errorf("%s: %v", page, err)
					continue
				}
				ran++
				if strings.HasPrefix(command, "docker run") {
					t.Cleanup(func() { h.docker("rm", "-f", out) })
				} else if strings.HasPrefix(command, "docker network create") {
					t.Cleanup(func() { h.docker("network", "rm", out) })
				}
			}
		})
	}
	if ran < 10 {
		t.Errorf("only %d commands were found", ran)
	}
}

// examples are the commands in a page's fenced blocks that a user of an installed dockway types.
func examples(page string) []string {
	var out []string
	for i, block := range strings.Split(page, "```") {
		if i%2 == 0 {
			continue
		}
		block = strings.ReplaceAll(block, "\\\n", " ")
		for _, line := range strings.Split(block, "\n") {
			line, _, _ = strings.Cut(line, "   #")
			line = strings.TrimSpace(line)
			for _, program := range []string{"docker network ", "docker run ", "dockway "} {
				if strings.HasPrefix(line, program) {
					// An ellipsis stands for the reader's own image.
					out = append(out, strings.ReplaceAll(line, "…", "nginx"))
				}
			}
		}
	}
	return out
}
