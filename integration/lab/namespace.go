package lab

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// namespace is the path of the machine's network namespace.
func (m *Machine) namespace() string { return fmt.Sprintf("/proc/%d/ns/net", m.PID()) }

// within runs a function in a network namespace, on a thread that ends with it. Sockets that the
// function opens stay in that namespace.
func within(namespace string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: nobody else is to get this thread
		done <- func() error {
			fd, err := unix.Open(namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("open %s: %w", namespace, err)
			}
			defer unix.Close(fd) //nolint:errcheck // only read
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter %s: %w", namespace, err)
			}
			return f()
		}()
	}()
	return <-done
}
