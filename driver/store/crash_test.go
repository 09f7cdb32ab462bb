package store

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"go.etcd.io/bbolt"
)

// Some tests need a process of their own, to kill it or to mount something where nobody else sees it: the test binary run
// again, with the name of what to do in childVariable.
const childVariable = "DOCKWAY_STORE_TEST_CHILD"

func TestMain(m *testing.M) {
	children := map[string]func(dir string) error{
		"apply": applyForEver,
		"full":  fillTmpfs,
		"ro":    mountReadOnly,
		"user":  openAsNobody,
	}
	if child := os.Getenv(childVariable); child != "" {
		if err := children[child](os.Args[len(os.Args)-1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(t *testing.T, name, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], dir)
	cmd.Env = append(os.Environ(), childVariable+"="+name)
	return cmd
}

// inMountNamespace runs a child with mounts of its own.
func inMountNamespace(t *testing.T, name, dir string) {
	t.Helper()
	cmd := child(t, name, dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// applyForEver moves counters up by one, several together, and says so after each is recorded.
func applyForEver(dir string) error {
	s, err := Open(dir)
	if err != nil {
		return err
	}
	start := 0
	err = s.Load("b", func(_ string, v []byte) error { start, err = strconv.Atoi(string(bytes.TrimSpace(v))); return err })
	if err != nil {
		return err
	}
	for n := start + 1; ; n++ {
		value := fmt.Appendf(nil, "%d%s", n, strings.Repeat(" ", n*97%6000))
		if err := s.Apply(
			Change{"b", "left", value},
			Change{"history", strconv.Itoa(n), value},
			Change{"history", strconv.Itoa(n - 20), nil},
			Change{"b", "right", value},
		); err != nil {
			return err
		}
		fmt.Println(n)
	}
}

// Killed at any moment, from the first on, a record opens again, with all that was acknowledged and no half of a change.
func TestKillNine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(5, 6))
	acknowledged := 0
	for round := range 60 {
		cmd := child(t, "apply", dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		// The child is at work while this counts, so the signal finds it anywhere.
		for range rng.IntN(40) * (round % 4) {
			if !lines.Scan() {
				t.Fatal("the child ended by itself")
			}
			acknowledged = number(t, lines.Text())
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() {
			if text := lines.Text(); strings.TrimSpace(text) != "" {
				acknowledged = number(t, text)
			}
		}
		_ = cmd.Wait()

		s, err := Open(dir)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		got := content(t, s, "b")
		history := content(t, s, "history")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if acknowledged == 0 && len(got) == 0 {
			continue
		}
		left, right := number(t, got["b/left"]), number(t, got["b/right"])
		if left != right || left < acknowledged || left > acknowledged+1 || len(history) != min(left, 20) {
			t.Fatalf("round %d: %d and %d and %d of history, acknowledged %d", round, left, right, len(history), acknowledged)
		}
		acknowledged = left
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func number(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(s))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// What a crash in the middle of the first creation leaves is swept, and a record that appears meanwhile is kept.
func TestCreation(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, FileName+newSuffix+"123")
	if err := os.WriteFile(left, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := mustOpen(t, dir)
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	if err := s.Apply(Change{"b", "k", []byte("v")}); err != nil {
		t.Fatal(err)
	}
	if err := create(s.Path()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := content(t, mustOpen(t, dir), "b"); len(got) != 1 {
		t.Errorf("the record was replaced: %v", got)
	}
}

func TestInUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := mustOpen(t, dir)
	_, err := Open(dir)
	if !IsInUse(err) || !strings.Contains(err.Error(), s.Path()) || !strings.Contains(err.Error(), "another dockway") {
		t.Errorf("error %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(s.Path(), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !IsInUse(err) {
		t.Errorf("error %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestNotAFile(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"directory":     func(path string) error { return os.Mkdir(path, 0o700) },
		"pipe":          func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"dangling link": func(path string) error { return os.Symlink("nowhere", path) },
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, FileName)
		if err := make(path); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	inMountNamespace(t, "full", t.TempDir())
}

func fillTmpfs(dir string) error {
	if err := errors.Join(
		syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""),
		syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"),
	); err != nil {
		return err
	}
	s, err := Open(dir)
	if err != nil {
		return err
	}
	recorded := map[string]bool{}
	load := func() error {
		n := 0
		err := s.Load("b", func(key string, v []byte) error {
			n++
			if !recorded[key] || len(v) != 3000 {
				return fmt.Errorf("%s was never acknowledged", key)
			}
			return nil
		})
		if err == nil && n != len(recorded) {
			err = fmt.Errorf("%d values, acknowledged %d", n, len(recorded))
		}
		return err
	}
	ballast := filepath.Join(dir, "ballast")
	for round := range 3 {
		// Something else takes what is left, at another point each time.
		_ = os.WriteFile(ballast, make([]byte, 60000+round*5000), 0o600) // as much of it as there is room for
		full := error(nil)
		for n := 0; full == nil; n++ {
			key := fmt.Sprintf("%d-%d", round, n)
			if full = s.Apply(Change{"b", key, make([]byte, 3000)}); full == nil {
				recorded[key] = true
			}
		}
		if !errors.Is(full, syscall.ENOSPC) || !strings.Contains(full.Error(), "free some space") || !strings.Contains(full.Error(), s.Path()) {
			return fmt.Errorf("a full disk is reported as: %w", full)
		}
		// Full as it is, all is readable, and a record opens.
		for range 3 {
			if err := s.Apply(Change{"b", "too much", make([]byte, 50000)}); !errors.Is(err, syscall.ENOSPC) {
				return fmt.Errorf("a full disk is reported as: %w", err)
			}
		}
		if err := load(); err != nil {
			return err
		}
		if err := s.Close(); err != nil {
			return err
		}
		if s, err = Open(dir); err != nil {
			return fmt.Errorf("opening on a full disk: %w", err)
		}
		if err := s.Apply(Change{"b", "too much", make([]byte, 50000)}); !errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("a full disk is reported as: %w", err)
		}
		// Once there is space again, the same open record takes changes.
		if err := os.Remove(ballast); err != nil {
			return err
		}
		key := fmt.Sprintf("%d-after", round)
		if err := s.Apply(Change{"b", key, make([]byte, 3000)}); err != nil {
			return fmt.Errorf("with space again: %w", err)
		}
		recorded[key] = true
		for k := range recorded {
			if strings.Contains(k, "-1") {
				if err := s.Apply(Change{"b", k, nil}); err != nil {
					return err
				}
				delete(recorded, k)
			}
		}
		if err := load(); err != nil {
			return err
		}
	}
	if err := s.Close(); err != nil {
		return err
	}
	// A disk that is full from the start leaves nothing behind.
	other := filepath.Join(dir, "other")
	if err := os.Mkdir(other, 0o700); err != nil {
		return err
	}
	_ = os.WriteFile(ballast, make([]byte, 1<<20), 0o600)
	if _, err := Open(other); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("a full disk at creation is reported as: %w", err)
	}
	if left, err := os.ReadDir(other); err != nil || len(left) != 0 {
		return fmt.Errorf("left behind: %v %w", left, err)
	}
	return nil
}

func TestReadOnlyFileSystem(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := mustOpen(t, dir).Close(); err != nil {
		t.Fatal(err)
	}
	inMountNamespace(t, "ro", dir)
}

func mountReadOnly(dir string) error {
	if err := errors.Join(
		syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""),
		syscall.Mount(dir, dir, "", syscall.MS_BIND, ""),
	); err != nil {
		return err
	}
	// It turns read-only under an open record, as file systems do on errors: writes go on through the open file on a bind
	// mount, so only opening is tried here.
	if err := syscall.Mount("", dir, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		return err
	}
	path := filepath.Join(dir, FileName)
	if _, err := Open(dir); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "read-write") {
		return fmt.Errorf("a read-only file system is reported as: %w", err)
	}
	empty := filepath.Join(dir, "empty")
	if _, err := Open(empty); !errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("a read-only file system is reported as: %w", err)
	}
	return nil
}

func TestUnreadable(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		dir := t.TempDir()
		if err := errors.Join(mustOpen(t, dir).Close(), os.Chmod(filepath.Join(dir, FileName), 0), openUnreadable(dir)); err != nil {
			t.Error(err)
		}
		return
	}
	dir, err := os.MkdirTemp("", "dockway-unreadable-") // unlike t.TempDir below nothing that only root enters
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := errors.Join(mustOpen(t, dir).Close(), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	if out, err := child(t, "user", dir).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// openAsNobody gives up being root in a process of its own, whose binary nobody could start.
func openAsNobody(dir string) error {
	if err := errors.Join(syscall.Setgid(65534), syscall.Setuid(65534)); err != nil {
		return err
	}
	return openUnreadable(dir)
}

func openUnreadable(dir string) error {
	_, err := Open(dir)
	if !errors.Is(err, syscall.EACCES) || !strings.Contains(err.Error(), filepath.Join(dir, FileName)) || !strings.Contains(err.Error(), "allowed") {
		return fmt.Errorf("an unreadable record is reported as: %w", err)
	}
	return nil
}
