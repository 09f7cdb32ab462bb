package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// TestMain runs the tests in a mount namespace of their own, so that no mount of theirs outlives them,
// even if they are killed. If the environment says so, it is a process that makes and deletes things
// until it is killed.
func TestMain(m *testing.M) {
	const mounts = "DOCKWAY_TEST_MOUNTS"
	if os.Getenv(restless) == "" && os.Getenv(mounts) == "" {
		os.Setenv(mounts, "own")
		os.Exit(withOwnMounts())
	}
	switch os.Getenv(restless) {
	case "":
		os.Exit(m.Run())
	case restlessSwitch:
		toAndFro(kernel.Config{}, external("eth1"))
	default: // the directory of namespaces
		c := kernel.Config{Namespaces: os.Getenv(restless), NamespaceTables: namespaceTables()}
		toAndFro(c, everything("198.18.0.1")...)
	}
}

// withOwnMounts runs this program again, and tells its exit code.
func withOwnMounts() int {
	runtime.LockOSThread() // whose death the other process does not survive
	again := exec.Command("/proc/self/exe", os.Args[1:]...)
	again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := again.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "these tests need root:", err)
	return 1
}

// toAndFro puts objects and deletes them until the process is killed.
func toAndFro(c kernel.Config, objects ...plan.Object) {
	k, err := kernel.New(c)
	wanted := plan.Of(objects...)
	for err == nil {
		err = k.Do(context.Background(), append(plan.Diff(nil, wanted), plan.Diff(wanted, nil)...))
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

const (
	restless       = "DOCKWAY_TEST_RESTLESS"
	restlessSwitch = "switch"
)
