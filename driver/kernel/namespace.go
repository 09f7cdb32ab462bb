package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

const threadNamespace = "/proc/thread-self/ns/net"

// namespacePrefix is the mark of ownership of a network namespace, with the directory that it is in.
const namespacePrefix = "dw"

// inside calls f on a thread that is in the Kernel's network namespace. It goes back where it was: a
// thread that stays, such as a process's first, which never ends, would hold the namespace.
func (k *Kernel) inside(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if sameNamespace(k.namespace) {
		return f()
	}
	return elsewhere(func() error { return unix.Setns(int(k.namespace.Fd()), unix.CLONE_NEWNET) }, f)
}

// elsewhere calls f after the calling thread, which has to be locked, has entered another network
// namespace, and takes it back from there.
func elsewhere(enter, f func() error) error {
	home, err := os.Open(threadNamespace)
	if err != nil {
		return err
	}
	defer home.Close()
	if err := enter(); err != nil {
		return fmt.Errorf("enter network namespace: %w", needsAdmin(err))
	}
	err = f()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		runtime.LockOSThread() // for good: nobody else may get this thread
		err = errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
	}
	return err
}

func sameNamespace(file *os.File) bool {
	var here, there unix.Stat_t
	return unix.Stat(threadNamespace, &here) == nil && unix.Fstat(int(file.Fd()), &there) == nil && here.Ino == there.Ino
}

// pins are network namespaces that are kept by a mount each in a directory, as ip-netns(8) does it.
// They end with the mount, once nothing is in them.
type pins struct{ dir string }

var errNoNamespaces = errors.New("there is no directory for network namespaces: none can be made")

// path is where a namespace is kept.
func (p pins) path(name string) (string, error) {
	switch {
	case p.dir == "":
		return "", fmt.Errorf("network namespace %s: %w", name, errNoNamespaces)
	case !strings.HasPrefix(name, namespacePrefix) || strings.ContainsAny(name, "/\x00"):
		return "", fmt.Errorf("network namespace %q: the name of one of dockway's begins with %q", name, namespacePrefix)
	}
	return filepath.Join(p.dir, name), nil
}

// find tells which namespace is kept under a name: its inode, or 0 when there is none.
func (p pins) find(name string) (inode uint64, err error) {
	path, err := p.path(name)
	if err != nil {
		return 0, err
	}
	var s unix.Stat_t
	var f unix.Statfs_t
	if err := unix.Lstat(path, &s); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return 0, nil
		}
		return 0, fmt.Errorf("network namespace %s: %w", path, err)
	}
	if s.Mode&unix.S_IFMT != unix.S_IFREG || unix.Statfs(path, &f) != nil || f.Type != unix.NSFS_MAGIC {
		return 0, nil
	}
	return s.Ino, nil
}

// list names the namespaces that are kept. A directory that is not there has none.
func (p pins) list() ([]string, error) {
	if p.dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(p.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), namespacePrefix) {
			continue
		}
		switch inode, err := p.find(e.Name()); {
		case err != nil:
			return nil, err
		case inode != 0:
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// sweep removes the files that namespaces were to be mounted on when a process was killed. Only who has not
// begun to make any may call it.
func (p pins) sweep() error {
	entries, err := os.ReadDir(p.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := errors.Join(err, p.check()); err != nil {
		return err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !strings.HasPrefix(e.Name(), namespacePrefix) || !info.Mode().IsRegular() || info.Size() > 0 {
			continue
		}
		if inode, err := p.find(e.Name()); err != nil || inode != 0 {
			continue
		}
		if err := os.Remove(filepath.Join(p.dir, e.Name())); err != nil {
			return fmt.Errorf("remove what is left of a network namespace: %w", err)
		}
	}
	return nil
}

// check refuses a directory in which somebody else could put a namespace of theirs.
func (p pins) check() error {
	var s unix.Stat_t
	if err := unix.Lstat(p.dir, &s); err != nil {
		return fmt.Errorf("directory for network namespaces: %s: %w", p.dir, err)
	}
	switch {
	case s.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("directory for network namespaces: %s is no directory (a symbolic link is none): remove it, or name another", p.dir)
	case s.Uid != uint32(os.Geteuid()):
		return fmt.Errorf("directory for network namespaces: %s belongs to user %d: remove it, or name another", p.dir, s.Uid)
	case s.Mode&0o077 == 0:
		return nil
	}
	if err := os.Chmod(p.dir, 0o700); err != nil {
		return fmt.Errorf("directory for network namespaces: %w", err)
	}
	return nil
}

// open opens a namespace that is kept.
func (p pins) open(name string) (*os.File, error) {
	path, err := p.path(name)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	kind, err := unix.IoctlRetInt(int(file.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return nil, errors.Join(fmt.Errorf("%s is no network namespace: unmount it and remove it", path), err, file.Close())
	}
	return file, nil
}

// make makes a namespace, with its loopback link up; one that is there is fine. It is kept from the
// moment that it is mounted: before that, it ends with this process.
func (p pins) make(name string) error {
	path, err := p.path(name)
	if err != nil {
		return err
	}
	if err := outlive(p.dir); err != nil {
		return fmt.Errorf("make network namespace %s: %w", name, err)
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("directory for network namespaces: %w", err)
	}
	if err := p.check(); err != nil {
		return err
	}
	if inode, err := p.find(name); err != nil || inode != 0 {
		return err
	}
	file, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	file.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return elsewhere(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() error {
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("bring up the loopback link of a network namespace: %w", err)
		}
		if err := unix.Mount(threadNamespace, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount network namespace on %s: %w", path, needsAdmin(err))
		}
		return nil
	})
}

// loopbackUp brings up the loopback link of the calling thread's network namespace.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_LOOPBACK | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

// remove lets a namespace go; one that is not there is fine.
func (p pins) remove(name string) error {
	path, err := p.path(name)
	if err != nil {
		return err
	}
	for { // several mounts may lie on each other
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, fs.ErrNotExist) { // no mount
			break
		}
		if err != nil {
			return fmt.Errorf("unmount network namespace %s: %w", path, needsAdmin(err))
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network namespace: %w", err)
	}
	return nil
}
