package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Main has to be called first in a program that uses the lab: when the program runs as the first
// process of a machine, or is to become one whose changes are judged, Main does not return.
func Main() {
	if os.Getenv(gateVariable) != "" {
		fmt.Fprintln(os.Stderr, becomeGated())
		os.Exit(1)
	}
	name := os.Getenv("DOCKWAY_LAB_MACHINE")
	if name == "" {
		return
	}
	ready := os.NewFile(3, "ready")
	if err := furnish(name, os.Getenv("DOCKWAY_LAB_DISK")); err != nil {
		fmt.Fprint(ready, err)
		os.Exit(1)
	}
	fmt.Fprint(ready, "ready")
	_ = ready.Close() // the other end has read it
	for {             // whoever loses its parent becomes ours: let it go when it ends
		var status unix.WaitStatus
		if _, err := unix.Wait4(-1, &status, 0, nil); errors.Is(err, unix.ECHILD) {
			// Nobody is left. A child can come only by losing its parent.
			_ = unix.Nanosleep(&unix.Timespec{Nsec: 50e6}, nil)
		}
	}
}

// furnish gives a machine what a host has: its own /proc, /sys, /run, /etc, /opt, name, resolver,
// loopback. Engines write to all of them.
func furnish(name, disk string) error {
	mount := func(source, target, kind string, flags uintptr) error {
		if err := unix.Mount(source, target, kind, flags, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", source, target, err)
		}
		return nil
	}
	hold := filepath.Join(disk, "cgroup")
	if err := os.MkdirAll(hold, 0o755); err != nil {
		return err
	}
	steps := []func() error{
		func() error { return mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE) },
		func() error { return mount("/sys/fs/cgroup", hold, "", unix.MS_BIND|unix.MS_REC) },
		func() error { return mount("proc", "/proc", "proc", 0) },
		func() error { return mount("sysfs", "/sys", "sysfs", 0) },
		func() error { return mount(hold, "/sys/fs/cgroup", "", unix.MS_BIND|unix.MS_REC) },
		func() error { return unix.Unmount(hold, unix.MNT_DETACH) },
		func() error { // beside v1 it has no controllers, and runc leaves groups at its top
			err := unix.Unmount("/sys/fs/cgroup/unified", unix.MNT_DETACH)
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
				return nil // it is not there
			}
			return err
		},
		func() error { return mount("tmpfs", "/run", "tmpfs", 0) },
		func() error { return ownEtc(mount) },
		func() error { return ownOpt(mount) },
		func() error { return mount("none", "/", "", unix.MS_REC|unix.MS_SHARED) },
		func() error { return unix.Sethostname([]byte(name)) },
		loopbackUp,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

type mounter func(source, target, kind string, flags uintptr) error

// ownEtc gives the machine a copy of /etc, with a resolver of its own in it.
func ownEtc(mount mounter) error {
	if out, err := exec.Command("cp", "-a", "/etc", "/run/etc").CombinedOutput(); err != nil {
		return fmt.Errorf("copy /etc: %w: %s", err, out)
	}
	resolv := "/run/etc/resolv.conf"
	if err := os.Remove(resolv); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.WriteFile(resolv, []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		return err
	}
	return mount("/run/etc", "/etc", "", unix.MS_BIND)
}

// ownOpt gives the machine an /opt that shows what is in the real one, and takes what containerd
// makes there.
func ownOpt(mount mounter) error {
	const real = "/run/opt"
	entries, err := os.ReadDir("/opt")
	if err != nil {
		return err
	}
	if err := os.Mkdir(real, 0o755); err != nil {
		return err
	}
	if err := errors.Join(mount("/opt", real, "", unix.MS_BIND|unix.MS_REC), mount("tmpfs", "/opt", "tmpfs", 0)); err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() || e.Name() == "containerd" {
			continue
		}
		target := filepath.Join("/opt", e.Name())
		if err := os.Mkdir(target, 0o755); err != nil {
			return err
		}
		if err := mount(filepath.Join(real, e.Name()), target, "", unix.MS_BIND|unix.MS_REC); err != nil {
			return err
		}
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // only asked once
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}
