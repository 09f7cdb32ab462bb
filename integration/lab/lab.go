// Package lab makes simulated hosts on one machine: namespaces with engines of their own, joined by
// LANs, of which nothing is left when the process that made them ends, however it ends.
//
// Every machine of the lab has a first process of its own in a PID namespace. The kernel ends
// everything in it when that process ends, and ends that process when the lab's ends; links and
// mounts go with their namespaces. What a killed lab leaves is a folder and empty control groups,
// which the next one removes.
package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Lab is a set of machines and LANs.
type Lab struct {
	log   func(format string, args ...any)
	dir   string
	id    string
	spawn chan func()

	mu       sync.Mutex
	machines []*Machine
	links    int

	building sync.Mutex // of the probe
}

const prefix = "dockway-lab-"

// New makes an empty lab. log hears of its progress.
func New(log func(format string, args ...any)) (*Lab, error) {
	sweep()
	id := strconv.Itoa(os.Getpid())
	dir := filepath.Join(os.TempDir(), prefix+id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	l := &Lab{log: log, dir: dir, id: id, spawn: make(chan func())}
	go func() {
		// The first process of a machine is ended when the thread that started it ends: this one
		// stays as long as the lab.
		runtime.LockOSThread()
		for f := range l.spawn {
			f()
		}
	}()
	return l, nil
}

// Dir is a folder of the lab's, removed at its end.
func (l *Lab) Dir() string { return l.dir }

// Close ends every machine and removes what is left.
func (l *Lab) Close() {
	l.mu.Lock()
	machines := l.machines
	l.machines = nil
	l.mu.Unlock()
	for _, m := range machines {
		m.end()
	}
	close(l.spawn)
	clean(l.dir, l.id)
}

// sweep removes what labs left whose process is gone.
func sweep() {
	left, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
	if err != nil {
		return
	}
	for _, dir := range left {
		id := strings.TrimPrefix(filepath.Base(dir), prefix)
		pid, err := strconv.Atoi(id)
		if err == nil && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			clean(dir, id)
		}
	}
}

// clean removes a lab's folder and control groups. They are empty: their processes are gone.
func clean(dir, id string) {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := os.RemoveAll(dir)
		for _, root := range hierarchies() {
			err = errors.Join(err, removeGroups(filepath.Join(root, prefix+id)))
		}
		if err == nil || time.Now().After(deadline) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Machine is a computer of the lab: network, mount, PID and UTS namespaces of its own.
type Machine struct {
	Name string
	lab  *Lab
	env  []string
	cmd  *exec.Cmd
	dir  string // its disk
}

// Machine starts a machine without an engine.
func (l *Lab) Machine(name string) (*Machine, error) {
	m := &Machine{Name: name, lab: l, dir: filepath.Join(l.dir, name)}
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return nil, err
	}
	if err := m.boot(); err != nil {
		return nil, fmt.Errorf("start machine %s: %w", name, err)
	}
	l.mu.Lock()
	l.machines = append(l.machines, m)
	l.mu.Unlock()
	return m, nil
}

// boot starts the machine's first process, which is this program once more (see Main).
func (m *Machine) boot() error {
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close() //nolint:errcheck // read to its end
	m.cmd = exec.Command("/proc/self/exe")
	m.cmd.Args[0] = prefix + m.lab.id + "/" + m.Name // in a list of processes
	m.cmd.Env = append(os.Environ(), "DOCKWAY_LAB_MACHINE="+m.Name, "DOCKWAY_LAB_DISK="+m.dir)
	m.cmd.ExtraFiles = []*os.File{theirs}
	m.cmd.Stderr = os.Stderr
	m.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
	started := make(chan error)
	m.lab.spawn <- func() { started <- m.cmd.Start() }
	err = errors.Join(<-started, theirs.Close())
	if err != nil {
		return err
	}
	said := make([]byte, 512)
	n, err := ready.Read(said)
	if err == nil && string(said[:n]) != "ready" {
		err = errors.New("it is not ready")
	}
	if err != nil {
		m.end()
		return fmt.Errorf("its first process says %q: %w", said[:n], err)
	}
	return nil
}

// end ends everything on the machine, at once.
func (m *Machine) end() {
	if m.cmd == nil || m.cmd.Process == nil {
		return
	}
	_ = m.cmd.Process.Kill() // it may have ended by itself
	_ = m.cmd.Wait()
	m.cmd = nil
}

// PID is the machine's first process, as this process sees it.
func (m *Machine) PID() int { return m.cmd.Process.Pid }

// Command prepares a program to run on the machine.
func (m *Machine) Command(ctx context.Context, args ...string) *exec.Cmd {
	full := append([]string{"-t", strconv.Itoa(m.PID()), "-m", "-u", "-n", "-p", "--"}, args...)
	cmd := exec.CommandContext(ctx, "nsenter", full...)
	cmd.Env = append(os.Environ(), m.env...)
	// nsenter forks: what it started ends with it, and does not hear a terminal's Ctrl-C.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 2 * time.Second
	return cmd
}

// limit is how long a command may take that is not given a time: one that takes longer hangs.
const limit = 5 * time.Minute

// Run runs a program on the machine and returns what it printed, on both outputs.
func (m *Machine) Run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	out, err := m.Command(ctx, args...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("%s: %s: %w: %s", m.Name, strings.Join(args, " "), err, text)
	}
	return text, nil
}

// Script runs a shell script on the machine.
func (m *Machine) Script(script string) (string, error) { return m.Run("sh", "-ec", script) }

// WaitFor polls until done, and says what was waited for when it takes longer than within.
func WaitFor(within time.Duration, what string, done func() (bool, error)) error {
	deadline := time.Now().Add(within)
	for {
		ok, err := done()
		if ok {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %s for %s: %w", within, what, errors.Join(err, errors.New("it did not come")))
		}
		time.Sleep(10 * time.Millisecond)
	}
}
