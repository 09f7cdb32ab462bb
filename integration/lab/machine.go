package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Main has to be called first in a program that uses the lab: when the program runs as the first
// process of a machine, Main does not return.
func Main() {
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

// furnish gives a machine what a host has: its own /proc, /sys, /run, name, resolver, loopback.
func furnish(name, disk string) error {
	mount := func(source, target, kind string, flags uintptr) error {
		if err := unix.Mount(source, target, kind, flags, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", source, target, err)
		}
		return nil
	}
	hold := filepath.Join(disk, "cgroup")
	resolv := filepath.Join(disk, "resolv.conf")
	if err := errors.Join(os.MkdirAll(hold, 0o755), os.WriteFile(resolv, []byte("nameserver 127.0.0.1\n"), 0o644)); err != nil {
		return err
	}
	steps := []func() error{
		func() error { return mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE) },
		func() error { return mount("/sys/fs/cgroup", hold, "", unix.MS_BIND|unix.MS_REC) },
		func() error { return mount("proc", "/proc", "proc", 0) },
		func() error { return mount("sysfs", "/sys", "sysfs", 0) },
		func() error { return mount(hold, "/sys/fs/cgroup", "", unix.MS_BIND|unix.MS_REC) },
		func() error { return unix.Unmount(hold, unix.MNT_DETACH) },
		func() error { return mount("tmpfs", "/run", "tmpfs", 0) },
		func() error { return mount(resolv, "/etc/resolv.conf", "", unix.MS_BIND) },
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
