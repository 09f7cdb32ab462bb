package kernel

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOutlive: a namespace is not held where the host would not see it: below a mount that only hears of
// the host's, as those of a systemd service do that is kept from files.
func TestOutlive(t *testing.T) {
	dir := t.TempDir()
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with its mount namespace
		result <- func() error {
			in := filepath.Join(dir, "not", "there")
			if err := errors.Join(
				unix.Unshare(unix.CLONE_NEWNS),
				unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
				unix.Mount("tmpfs", dir, "tmpfs", 0, ""),
			); err != nil {
				return err
			}
			if err := outlive(in); err != nil {
				t.Errorf("below a mount of its own: %v", err)
			}
			host, err := os.Open("/proc/thread-self/ns/mnt") // which is there as long as this is open
			if err != nil {
				return err
			}
			defer host.Close()
			if err := errors.Join(unix.Mount("", dir, "", unix.MS_SHARED, ""), unix.Unshare(unix.CLONE_NEWNS)); err != nil {
				return err
			}
			if err := outlive(in); err != nil {
				t.Errorf("below a mount that is shared: %v", err)
			}
			if err := unix.Mount("", dir, "", unix.MS_SLAVE, ""); err != nil {
				return err
			}
			if err := outlive(in); err == nil || !strings.Contains(err.Error(), "does not reach the host") || !strings.Contains(err.Error(), "plugin/dockway-overlay.conf") {
				t.Errorf("below a mount of the host's that is not shared with it: %v", err)
			}
			if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil { // as MountFlags=shared of systemd does
				return err
			}
			if err := outlive(in); err == nil {
				t.Error("taken below a mount that is shared with others only")
			}
			return nil
		}()
	}()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}
