package plugin

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// Listen opens the plugin's socket: for root and the user that dockway runs as, nobody else. A
// socket that nobody answers on any more is replaced; one that somebody answers on is an error.
func Listen(path string, log *logrus.Entry) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make the socket's directory: %w", err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("keep others off %s: %w", path, err), l.Close())
	}
	return &rootOnly{UnixListener: l, log: log}, nil
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for an older socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is in the way and is not a socket: remove it, or choose another path with --socket", path)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		return errors.Join(fmt.Errorf("another dockway answers on %s: stop it, or choose another path with --socket", path), conn.Close())
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("find out whether another dockway answers on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove the socket that a former dockway left: %w", err)
	}
	return nil
}

// rootOnly accepts connections from root and from the user that this process runs as. The
// socket's mode says the same, but is open for a moment after the socket is made.
type rootOnly struct {
	*net.UnixListener
	log *logrus.Entry
}

func (l *rootOnly) Accept() (net.Conn, error) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peer(conn)
		if err == nil && (uid == 0 || int(uid) == os.Geteuid()) {
			return conn, nil
		}
		if err == nil {
			err = fmt.Errorf("user %d may not speak to dockway", uid)
		}
		l.log.WithError(errors.Join(err, conn.Close())).Warn("connection refused")
	}
}

// peer is the user that connected.
func peer(conn *net.UnixConn) (uid uint32, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("ask who connected: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, fmt.Errorf("ask who connected: %w", err)
	}
	if credErr != nil {
		return 0, fmt.Errorf("ask who connected: %w", credErr)
	}
	return cred.Uid, nil
}

// listener remembers its open connections.
type listener struct {
	net.Listener
	mu   sync.Mutex
	open map[*connection]bool // nil: closed
}

type connection struct {
	net.Conn
	listener *listener
}

func newListener(l net.Listener) *listener {
	return &listener{Listener: l, open: map[*connection]bool{}}
}

func (l *listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &connection{Conn: conn, listener: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		return nil, errors.Join(net.ErrClosed, conn.Close())
	}
	l.open[c] = true
	return c, nil
}

func (l *listener) closeConnections() {
	l.mu.Lock()
	open := l.open
	l.open = nil
	l.mu.Unlock()
	for c := range open {
		_ = c.Conn.Close() // its peer has its answer; how the connection ends tells nobody anything
	}
}

func (c *connection) Close() error {
	c.listener.mu.Lock()
	delete(c.listener.open, c)
	c.listener.mu.Unlock()
	return c.Conn.Close()
}
