package integration

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
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
	t.Cleanup(func() { // the pages put the host into a cluster
		if err := h.SetPlugin("JOIN=", "GOSSIP_KEY="); err != nil {
			t.Error(err)
		}
	})
	h.docker("tag", lab.Image, "nginx")
	h.network("nat") // as `make install` makes it
	// What pages ask into variables is there for all that follow: the key that the cluster has when
	// operations.md changes it is the one that was set last.
	variables := map[string]string{"PATH": filepath.Join(root, "build") + ":$PATH"}
	ran := 0
	for _, page := range []string{"README.md", "docs/modes/nat.md", "docs/ipam.md", "docs/modes/transparent.md", "docs/modes/l2bridge.md", "docs/modes/l2tunnel.md", "docs/modes/overlay.md", "docs/operations.md"} {
		text, err := os.ReadFile(filepath.Join(root, page))
		if err != nil {
			t.Fatal(err)
		}
		t.Run(page, func(t *testing.T) {
			variables["old"] = variables["key"]
			for _, command := range examples(string(text)) {
				script := ""
				for _, name := range slices.Sorted(maps.Keys(variables)) {
					script += name + "=" + variables[name] + "\n"
				}
				variable := assignment.FindStringSubmatch(command)
				if variable != nil {
					command = variable[2]
				}
				out, err := h.Script(script + command)
				if err != nil {
					t.Errorf("%s: %v", page, err)
					continue
				}
				ran++
				switch {
				case variable != nil:
					variables[variable[1]] = out
				case strings.HasPrefix(command, "docker run"):
					t.Cleanup(func() { h.docker("rm", "-f", out) })
				case strings.HasPrefix(command, "docker network create"):
					t.Cleanup(func() { h.docker("network", "rm", out) })
				}
			}
		})
	}
	if ran < 10 {
		t.Errorf("only %d commands were found", ran)
	}
}

// assignment is a variable that a command's output goes into, and the command.
var assignment = regexp.MustCompile(`^(\w+)=\$\((.*)\)$`)

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
			command := line
			if variable := assignment.FindStringSubmatch(line); variable != nil {
				command = variable[2]
			}
			for _, program := range []string{"docker network ", "docker run ", "docker plugin ", "dockway "} {
				if strings.HasPrefix(command, program) {
					// An ellipsis stands for the reader's own image, NET for any network or all.
					out = append(out, strings.NewReplacer("…", "nginx", " NET ", " ").Replace(line))
				}
			}
		}
	}
	return out
}
