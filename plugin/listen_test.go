package plugin

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

func quiet() *logrus.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return logrus.NewEntry(l)
}

func TestListenMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "plugins", "dockway.sock")
	l, err := Listen(path, quiet())
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v: want 0600", info.Mode(), err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there after Close: %v", err)
	}
}

func TestListenReplacesAStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dockway.sock")
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false) // as after kill -9
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path, quiet())
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
}

func TestListenRefusesASocketInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dockway.sock")
	first, err := Listen(path, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = first.Close() }()
	if _, err := Listen(path, quiet()); err == nil || !strings.Contains(err.Error(), "another dockway answers on "+path) {
		t.Errorf("second: %v", err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Errorf("the first no longer answers: %v", err)
	} else {
		_ = conn.Close()
	}
}

func TestListenRefusesOtherFiles(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, link, dir} {
		if _, err := Listen(path, quiet()); err == nil || !strings.Contains(err.Error(), "is not a socket") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
		t.Errorf("the file in the way now holds %q, %v", text, err)
	}
}

// Another user is turned away even where the socket's mode lets it in.
func TestPeersAreRootOrOurselves(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	r := newRig(t, 0)
	dir := filepath.Dir(r.socket) // in a directory that is this test's own, too
	for path, mode := range map[string]os.FileMode{r.socket: 0o666, dir: 0o755, filepath.Dir(dir): 0o755} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	type outcome struct {
		answer []byte
		err    error
	}
	result := make(chan outcome)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, which is nobody now, ends here
		keep, nobody := -1, 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(keep), uintptr(nobody), uintptr(keep)); errno != 0 {
			result <- outcome{err: errno}
			return
		}
		conn, err := net.Dial("unix", r.socket)
		if err != nil {
			result <- outcome{err: err}
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = conn.Write([]byte("POST /Plugin.Activate HTTP/1.0\r\n\r\n")) // may already be closed
		answer, _ := io.ReadAll(conn)
		result <- outcome{answer: answer}
	}()
	got := <-result
	if got.err != nil || len(got.answer) != 0 {
		t.Errorf("nobody was answered %q, %v", got.answer, got.err)
	}
	if status, _ := r.post("Plugin.Activate", ""); status != 200 {
		t.Errorf("root was answered %d", status)
	}
	if !strings.Contains(r.log.String(), "user 65534 may not speak to dockway") {
		t.Errorf("log:\n%s", r.log)
	}
}

func TestShutdownWaitsForCalls(t *testing.T) {
	r := newRig(t, time.Minute)
	entered, release := make(chan struct{}, 2), make(chan struct{})
	r.networks.enter = func(context.Context) { entered <- struct{}{}; <-release }
	type outcome struct {
		status int
		err    error
	}
	answers := make(chan outcome, 1)
	go func() {
		status, _, err := r.try("NetworkDriver.Leave", `{`+both+`}`)
		answers <- outcome{status, err}
	}()
	<-entered
	stopped := make(chan error, 1)
	go func() { stopped <- r.server.Shutdown(context.Background()) }()
	if err := <-r.served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := net.Dial("unix", r.socket); err == nil {
		t.Error("still accepting")
	}
	select {
	case err := <-stopped:
		t.Fatalf("Shutdown did not wait: %v", err)
	default:
	}
	close(release)
	if got := <-answers; got.err != nil || got.status != 200 {
		t.Errorf("the call under way was answered %d, %v", got.status, got.err)
	}
	if err := <-stopped; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if _, _, err := r.try("NetworkDriver.Leave", `{`+both+`}`); err == nil {
		t.Error("a call was answered after the shutdown")
	}
}

func TestShutdownDoesNotWaitForEver(t *testing.T) {
	r := newRig(t, time.Minute)
	entered, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	r.networks.enter = func(context.Context) { close(entered); <-release }
	go func() { _, _, _ = r.try("NetworkDriver.Leave", `{`+both+`}`) }()
	<-entered
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.server.Shutdown(ctx); err == nil || !strings.Contains(err.Error(), "cut off") {
		t.Errorf("Shutdown: %v", err)
	}
}

func TestShutdownBeforeServe(t *testing.T) {
	s := New(Config{Networks: newNetworks(), Addresses: newAddresses(), Log: quiet()})
	if err := s.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	l, err := Listen(filepath.Join(t.TempDir(), "x.sock"), quiet())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(l); err == nil || !strings.Contains(err.Error(), "already shut down") {
		t.Errorf("Serve: %v", err)
	}
}
