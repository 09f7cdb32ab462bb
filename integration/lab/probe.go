package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// BuildProbe builds the probe program into the lab's folder.
func (l *Lab) BuildProbe() (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(l.dir, "probe")
	build := exec.Command("go", "build", "-o", path, "./integration/probe")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the probe: %w: %s", err, out)
	}
	return path, nil
}
