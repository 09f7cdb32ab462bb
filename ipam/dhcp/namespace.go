package dhcp

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

const threadNamespace = "/proc/thread-self/ns/net"

// inside calls f on a thread that is in the namespace. All threads of a process usually are; one that is not, as in a test,
// is given up for one that moves there.
func inside(namespace *os.File, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if sameNamespace(namespace) {
		return f()
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		result <- f()
	}()
	return <-result
}

func sameNamespace(file *os.File) bool {
	var here, there unix.Stat_t
	return unix.Stat(threadNamespace, &here) == nil && unix.Fstat(int(file.Fd()), &there) == nil && here.Ino == there.Ino
}
