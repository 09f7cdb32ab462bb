package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// sysctlPath is where a setting is: sysctl(8) separates names by dots or slashes, by slashes when
// a part has a dot in it.
func (k *Kernel) sysctlPath(name string) string {
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	return filepath.Join(k.procSys, name)
}

// readSysctl reads a setting. Of a link without IPv6, IPv6 is read as what it is: off.
func (k *Kernel) readSysctl(name string) (value string, found bool, err error) {
	err = k.inside(func() error {
		b, err := os.ReadFile(k.sysctlPath(name))
		if err == nil {
			value, found = strings.TrimSpace(string(b)), true
			return nil
		}
		value, found = k.withoutIPv6(name)
		if found || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	return value, found, err
}

// withoutIPv6 answers for IPv6 settings of a link that is there but has no IPv6, because its MTU is
// too small or the kernel has none: disable_ipv6 is 1 there, and everything else 0.
func (k *Kernel) withoutIPv6(name string) (value string, ok bool) {
	rest, isIPv6 := strings.CutPrefix(strings.TrimPrefix(k.sysctlPath(name), k.procSys), "/net/ipv6/conf/")
	link, setting, _ := strings.Cut(rest, "/")
	if !isIPv6 {
		return "", false
	}
	for family, there := range map[string]bool{"ipv4": true, "ipv6": false} {
		_, err := os.Stat(filepath.Join(k.procSys, "net", family, "conf", link))
		if (err == nil) != there {
			return "", false
		}
	}
	if setting == "disable_ipv6" {
		return "1", true
	}
	return "0", true
}

// writeSysctl is putSysctl of a change of a switch.
func (k *Kernel) writeSysctl(s plan.Sysctl) error {
	if k.interrupt != nil {
		if n, err := k.interrupt(1); n == 0 {
			return err
		}
	}
	return k.putSysctl(s)
}

// putSysctl writes a setting that has another value.
func (k *Kernel) putSysctl(s plan.Sysctl) error {
	value, found, err := k.readSysctl(s.Name)
	if err != nil || found && value == s.Value || s.From != "" && value != s.From {
		return err
	}
	return k.inside(func() error {
		f, err := os.OpenFile(k.sysctlPath(s.Name), os.O_WRONLY, 0)
		if errors.Is(err, unix.EROFS) {
			return fmt.Errorf("%w: give the container or unit that dockway runs in a writable %s", err, filepath.Join(k.procSys, "net"))
		}
		if err != nil {
			return err
		}
		_, err = f.WriteString(s.Value)
		return errors.Join(err, f.Close())
	})
}

func (k *Kernel) observeSysctl(name string, out plan.State) error {
	value, found, err := k.readSysctl(name)
	if err != nil {
		return fmt.Errorf("sysctl %s: %w", name, err)
	}
	if found {
		out.Add(plan.Sysctl{Name: name, Value: value})
	}
	return nil
}
