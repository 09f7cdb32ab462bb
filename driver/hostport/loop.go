package hostport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// loop is one thread that waits for any number of sockets with epoll(7). What it does when one is
// ready, and what other goroutines do in between, take turns. The thread is in the network namespace
// in which the loop was started and never leaves it: a socket belongs to the namespace of the thread
// that makes it (network_namespaces(7)), and goroutines move between threads.
type loop struct {
	epoll int
	bell  int         // an eventfd(2) that ends a wait
	home  unix.Stat_t // the network namespace
	tick  func() time.Duration
	done  chan struct{} // closed when the thread has ended

	turn    sync.Mutex      // held by who does something: the thread when it does not wait, or do
	watched map[int]watcher // by turn
	ending  bool            // by turn

	mu    sync.Mutex
	calls []func()
	ended bool
}

// watcher is told that its file descriptor can be read, or has failed.
type watcher interface{ ready() }

// startLoop starts a loop in the calling thread's network namespace. tick is called once a round, and
// says how long the next round may wait; negative is for ever.
func startLoop(tick func() time.Duration) (*loop, error) {
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("find the network namespace: %w", err)
	}
	defer ns.Close()
	l := &loop{epoll: -1, bell: -1, tick: tick, done: make(chan struct{}), watched: map[int]watcher{}}
	if err := unix.Fstat(int(ns.Fd()), &l.home); err != nil {
		return nil, fmt.Errorf("look at the network namespace: %w", err)
	}
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err == nil {
		l.bell, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err == nil {
		err = l.watch(l.bell, nil)
	}
	if err == nil {
		entered := make(chan error)
		go l.run(int(ns.Fd()), entered)
		err = <-entered
	}
	if err != nil {
		unix.Close(l.epoll)
		unix.Close(l.bell)
		return nil, err
	}
	return l, nil
}

// run is the loop. Its goroutine ends with its thread locked, so that the thread ends too: it may
// be in another namespace than the process's others.
func (l *loop) run(ns int, entered chan<- error) {
	runtime.LockOSThread()
	err := l.enter(ns)
	entered <- err
	if err != nil {
		return
	}
	defer close(l.done)
	events := make([]unix.EpollEvent, 128)
	l.turn.Lock()
	defer l.turn.Unlock()
	for !l.serve() {
		wait := milliseconds(l.tick())
		l.turn.Unlock()
		n, err := unix.EpollWait(l.epoll, events, wait)
		l.turn.Lock()
		if err != nil && !errors.Is(err, unix.EINTR) {
			panic(fmt.Sprintf("epoll_wait: %v", err)) // a closed or wrong descriptor: a fault of this file
		}
		for _, e := range events[:max(n, 0)] {
			// A socket that was closed meanwhile is not watched any more; should its number
			// have been given out again, its new owner finds nothing to read, which is harmless.
			if w := l.watched[int(e.Fd)]; w != nil {
				w.ready()
			}
		}
	}
}

// serve runs the calls that wait, and reports whether the loop has ended.
func (l *loop) serve() bool {
	for {
		l.mu.Lock()
		calls := l.calls
		l.calls = nil
		if len(calls) == 0 {
			defer l.mu.Unlock()
			if l.ending {
				l.ended = true
				unix.Close(l.epoll)
				unix.Close(l.bell)
			} else {
				var rung [8]byte
				_, _ = unix.Read(l.bell, rung[:]) // EAGAIN: nobody rang
			}
			return l.ended
		}
		l.mu.Unlock()
		for _, call := range calls {
			call()
		}
	}
}

// post has f run by the loop, without waiting. It reports false when the loop has ended.
func (l *loop) post(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return false
	}
	if l.calls = append(l.calls, f); len(l.calls) == 1 {
		_, _ = unix.Write(l.bell, binary.NativeEndian.AppendUint64(nil, 1)) // it is read long before it is full
	}
	return true
}

// do runs f in turn, and reports false when the loop has ended.
func (l *loop) do(f func()) bool {
	l.turn.Lock()
	defer l.turn.Unlock()
	l.mu.Lock()
	ended := l.ended
	l.mu.Unlock()
	if !ended {
		f()
	}
	return !ended
}

// doInside is do for what has to be done in the loop's namespace. Threads usually are there; for one
// that is not, as in a test, the loop's own does it.
func (l *loop) doInside(f func()) bool {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if inside, err := l.inside(); err == nil && inside {
		return l.do(f)
	}
	ran := make(chan struct{})
	if !l.post(func() { f(); close(ran) }) {
		return false
	}
	<-ran
	return true
}

// stop ends the loop after the calls that wait already. Like what follows, it is to be called by
// turn; the loop hears of it when it is posted.
func (l *loop) stop() { l.ending = true }

// watch has w told when fd can be read.
func (l *loop) watch(fd int, w watcher) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return fmt.Errorf("watch a socket: %w", err) // ENOSPC: fs.epoll.max_user_watches, epoll(7)
	}
	l.watched[fd] = w
	return nil
}

// forget ends the watching of fd, which may be unwatched. It is to be called before close(2).
func (l *loop) forget(fd int) {
	if _, ok := l.watched[fd]; ok {
		delete(l.watched, fd)
		_ = unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, fd, nil) // cannot fail for a watched descriptor
	}
}

// enter moves the thread into the loop's namespace, which takes CAP_SYS_ADMIN (setns(2)), unless it
// is there already, as in a program that has only one.
func (l *loop) enter(ns int) error {
	inside, err := l.inside()
	if err != nil || inside {
		return err
	}
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	return nil
}

// inside reports whether the thread is in the loop's namespace.
func (l *loop) inside() (bool, error) {
	var here unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &here); err != nil {
		return false, fmt.Errorf("look at the thread's network namespace: %w", err)
	}
	return here.Dev == l.home.Dev && here.Ino == l.home.Ino, nil
}

// milliseconds rounds up, so that the loop does not come back just before the time.
func milliseconds(d time.Duration) int {
	if d < 0 {
		return -1
	}
	return int((d + time.Millisecond - 1) / time.Millisecond)
}
