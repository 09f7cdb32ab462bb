package lab

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// hierarchies are the roots of the machine's control group trees: one with cgroup v2, one for each
// controller with v1.
func hierarchies() []string {
	const top = "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(top, "cgroup.procs")); err == nil {
		return []string{top}
	}
	entries, err := os.ReadDir(top)
	if err != nil {
		return nil
	}
	var roots []string
	for _, e := range entries {
		if e.IsDir() { // and no link, as cpu,cpuacct may be
			roots = append(roots, filepath.Join(top, e.Name()))
		}
	}
	return roots
}

// engineGroup makes the control groups of a host's engine, below which the engine's plugins get
// theirs. Containers go beside it: with cgroup v2, a group with processes has no children.
func (m *Machine) engineGroup() (string, error) {
	group := filepath.Join(prefix+m.lab.id, m.Name, "engine")
	for _, root := range hierarchies() {
		if err := os.MkdirAll(filepath.Join(root, group), 0o755); err != nil {
			return "", err
		}
		if filepath.Base(root) != "cpuset" {
			continue
		}
		// A new cpuset is empty, and takes no process.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			all, err := os.ReadFile(filepath.Join(root, file))
			if err != nil {
				return "", err
			}
			at := root
			for _, name := range strings.Split(group, "/") {
				at = filepath.Join(at, name)
				if err := os.WriteFile(filepath.Join(at, file), all, 0o644); err != nil {
					return "", err
				}
			}
		}
	}
	return group, nil
}

func removeGroups(root string) error {
	children, err := os.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, c := range children {
		if c.IsDir() {
			err = errors.Join(err, removeGroups(filepath.Join(root, c.Name())))
		}
	}
	return errors.Join(err, os.Remove(root))
}
