package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// copySettings gives a link every setting that another has, those of the kernel to come included.
// The mode in which IPv6 addresses are made moves with the addresses.
func (k *Kernel) copySettings(from, to string) error {
	for _, kind := range []string{"net/ipv4/conf", "net/ipv4/neigh", "net/ipv6/conf", "net/ipv6/neigh"} {
		var names []string
		err := k.inside(func() error {
			entries, err := os.ReadDir(k.sysctlPath(path.Join(kind, from)))
			if errors.Is(err, fs.ErrNotExist) {
				return nil // no IPv6
			}
			for _, e := range entries {
				info, err := e.Info()
				if err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o200 != 0 && e.Name() != "addr_gen_mode" {
					names = append(names, e.Name())
				}
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("read the settings of %s: %w", from, err)
		}
		for _, name := range names {
			value, found, err := k.readSysctl(path.Join(kind, from, name))
			if errors.Is(err, unix.EIO) || err == nil && !found {
				continue // stable_secret: none was ever set
			}
			if err != nil {
				return fmt.Errorf("read setting %s of %s: %w", name, from, err)
			}
			setting := plan.Sysctl{Name: path.Join(kind, to, name), Value: value}
			if old, found, err := k.readSysctl(setting.Name); err == nil && found && old == value {
				continue
			}
			if err := k.writeSysctl(setting); err != nil {
				return fmt.Errorf("copy setting %s of %s: %w", name, from, err)
			}
		}
	}
	return nil
}
