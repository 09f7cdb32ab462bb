package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// BuildProbe gives the path of the probe program, which it builds into the lab's folder if it is
// not there yet.
func (l *Lab) BuildProbe() (string, error) {
	l.building.Lock()
	defer l.building.Unlock()
	path := filepath.Join(l.dir, "probe")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	root, err := Root()
	if err != nil {
		return "", err
	}
	build := exec.Command("go", "build", "-o", path, "./integration/probe")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the probe: %w: %s", err, out)
	}
	return path, nil
}
