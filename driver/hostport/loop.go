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

// loop is one thread that waits for any number of sockets with epoll(7), and runs what other
// goroutines ask of it in between. The thread is in the network namespace in which the loop was
// started and never leaves it: a socket belongs to the namespace of the thread that makes it
// (network_namespaces(7)), and goroutines move between threads.
type loop struct {
	epoll int
	bell  int // an eventfd(2) that ends a wait
	tick  func() time.Duration
	done  chan struct{} // closed when the thread has ended

	watched map[int]watcher // of the thread only
	ending  bool            // of the thread only

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
	err := enter(ns)
	entered <- err
	if err != nil {
		return
	}
	defer close(l.done)
	events := make([]unix.EpollEvent, 128)
	for !l.serve() {
		n, err := unix.EpollWait(l.epoll, events, milliseconds(l.tick()))
		if err != nil && !errors.Is(err, unix.EINTR) {
			panic(fmt.Sprintf("epoll_wait: %v", err)) // a closed or wrong descriptor: a fault of this file
		}
		for _, e := range events[:max(n, 0)] {
			// A socket that was closed in this round is not watched any more; should its number
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
				unix.Read(l.bell, rung[:]) // EAGAIN: nobody rang
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
		unix.Write(l.bell, binary.NativeEndian.AppendUint64(nil, 1)) // it is read long before it is full
	}
	return true
}

// do has f run by the loop and waits for it. It reports false when the loop has ended.
func (l *loop) do(f func()) bool {
	ran := make(chan struct{})
	if !l.post(func() { f(); close(ran) }) {
		return false
	}
	<-ran
	return true
}

// stop ends the loop after the calls that wait already. Like what follows, for the loop's thread.
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
		unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, fd, nil) // cannot fail for a watched descriptor
	}
}

// enter moves the thread into a network namespace, which takes CAP_SYS_ADMIN (setns(2)), unless it
// is there already, as in a program that has only one.
func enter(ns int) error {
	var want, have unix.Stat_t
	if err := unix.Fstat(ns, &want); err != nil {
		return fmt.Errorf("look at the network namespace: %w", err)
	}
	if err := unix.Stat("/proc/thread-self/ns/net", &have); err != nil {
		return fmt.Errorf("look at the thread's network namespace: %w", err)
	}
	if want.Dev == have.Dev && want.Ino == have.Ino {
		return nil
	}
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	return nil
}

// milliseconds rounds up, so that the loop does not come back just before the time.
func milliseconds(d time.Duration) int {
	if d < 0 {
		return -1
	}
	return int((d + time.Millisecond - 1) / time.Millisecond)
}
