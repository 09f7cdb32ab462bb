package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// What to do where namespaces cannot be made, or would end with dockway.
const howToOutlive = "of the systemd service, install plugin/dockway-overlay.conf as /etc/systemd/system/dockway.service.d/overlay.conf, then systemctl daemon-reload and systemctl restart dockway; elsewhere run dockway as root with that capability, in the host's mount namespace or below a mount that is shared with it (docs/plugin.md)"

// needsAdmin explains what the kernel refuses to a process without CAP_SYS_ADMIN.
func needsAdmin(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: network namespaces need CAP_SYS_ADMIN: %s", err, howToOutlive)
	}
	return err
}

// outlive reports why a namespace that is held in a directory would not outlive this process, or could
// not be made at all.
func outlive(dir string) error {
	var caps [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]); err == nil && caps[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return needsAdmin(unix.EPERM)
	}
	if inHostsMounts() {
		return nil
	}
	mount, err := mountOf(dir)
	if err != nil {
		return err
	}
	for _, field := range strings.Fields(mount)[6:] {
		if field == "-" {
			break
		}
		// It hears of the host's mounts, and the host of none of its (mount_namespaces(7)).
		if strings.HasPrefix(field, "master:") {
			return fmt.Errorf("what is mounted below %s does not reach the host, and network namespaces there would end with dockway; they need CAP_SYS_ADMIN too: %s", dir, howToOutlive)
		}
	}
	return nil
}

// inHostsMounts reports whether this process surely is in the first process's mount namespace.
func inHostsMounts() bool {
	first, err := os.Readlink("/proc/1/ns/mnt")
	own, ownErr := os.Readlink("/proc/thread-self/ns/mnt")
	return err == nil && ownErr == nil && first == own && os.Getpid() != 1
}

// mountOf is the line of mountinfo (proc(5)) of the mount that a directory is on, or is made on
// when it is not there.
func mountOf(dir string) (string, error) {
	file, err := os.Open(dir)
	for errors.Is(err, fs.ErrNotExist) && dir != "/" && dir != "." {
		dir = filepath.Dir(dir)
		file, err = os.Open(dir)
	}
	if err != nil {
		return "", fmt.Errorf("directory for network namespaces: %w", err)
	}
	defer file.Close()
	info, err := os.ReadFile(fmt.Sprintf("/proc/thread-self/fdinfo/%d", file.Fd()))
	if err != nil {
		return "", fmt.Errorf("mount of %s: %w", dir, err)
	}
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("mount of %s: %w", dir, err)
	}
	_, id, _ := strings.Cut(string(info), "mnt_id:")
	id, _, _ = strings.Cut(strings.TrimSpace(id), "\n")
	for line := range strings.Lines(string(mounts)) {
		if strings.HasPrefix(line, id+" ") && len(strings.Fields(line)) > 6 {
			return line, nil
		}
	}
	return "", fmt.Errorf("mount of %s: number %q is not among this process's mounts", dir, id)
}
