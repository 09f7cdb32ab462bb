package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a program that runs on a machine until it is stopped.
type Process struct {
	what  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   output
	ended chan struct{}
	err   error // once ended
}

// output is what a program says, on both outputs.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// startLimit is how long a program may take until it is ready, or gone.
const startLimit = 15 * time.Second

// Start starts a program on the machine and waits until it says that it is ready: until the text is
// among what it prints. An empty text is not waited for.
func (m *Machine) Start(ready string, args ...string) (*Process, error) {
	p := m.process(args...)
	if err := p.start(); err != nil {
		return nil, err
	}
	if err := p.wait(ready); err != nil {
		return nil, err
	}
	return p, nil
}

// process prepares a program that is not yet started.
func (m *Machine) process(args ...string) *Process {
	p := &Process{what: m.Name + ": " + strings.Join(args, " "), cmd: m.Command(context.Background(), args...), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	p.cmd.WaitDelay = 0 // it has ended when nobody is left who could say something
	return p
}

func (p *Process) start() (err error) {
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return err
	}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("%s: %w", p.what, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	return nil
}

// wait waits until the program says that it is ready, and stops it when it does not.
func (p *Process) wait(ready string) error {
	err := WaitFor(startLimit, p.what+" to say "+ready, func() (bool, error) {
		select {
		case <-p.ended:
			return ready == "" || strings.Contains(p.Output(), ready), fmt.Errorf("it ended: %s", p.cmd.ProcessState)
		default:
			return strings.Contains(p.Output(), ready), nil
		}
	})
	if err != nil {
		return errors.Join(fmt.Errorf("%w, but %q", err, p.Output()), p.Stop())
	}
	return nil
}

// Output is what the program has printed, on both outputs.
func (p *Process) Output() string { return p.out.String() }

// Finish ends the program's input and waits until it ends by itself: the error is its own.
func (p *Process) Finish(within time.Duration) error {
	if err := p.stdin.Close(); err != nil && !errors.Is(err, fs.ErrClosed) { // which it is once the program has ended
		return fmt.Errorf("%s: %w", p.what, err)
	}
	select {
	case <-p.ended:
		if p.err != nil {
			return fmt.Errorf("%s: %w: %s", p.what, p.err, p.Output())
		}
		return nil
	case <-time.After(within):
		return errors.Join(fmt.Errorf("%s: does not end within %s: %s", p.what, within, p.Output()), p.Stop())
	}
}

// Stop ends the program, with force if it does not go, and waits until it is gone.
func (p *Process) Stop() error {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		select {
		case <-p.ended:
			return nil
		default:
		}
		// To nsenter and to the program that it started.
		if err := syscall.Kill(-p.cmd.Process.Pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("stop %s: %w", p.what, err)
		}
		select {
		case <-p.ended:
			return nil
		case <-time.After(5 * time.Second):
		}
	}
	return fmt.Errorf("%s cannot be stopped", p.what)
}

// Kill ends the program without warning, and waits until nothing is left of it.
func (p *Process) Kill() error {
	// The program only: nsenter then takes note of its end, and ends too.
	nsenter := p.cmd.Process.Pid
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", nsenter, nsenter))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it has ended
	} else if err != nil {
		return fmt.Errorf("kill %s: %w", p.what, err)
	}
	for _, child := range strings.Fields(string(children)) {
		pid, err := strconv.Atoi(child)
		if err != nil {
			return fmt.Errorf("kill %s: %w", p.what, err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill %s: %w", p.what, err)
		}
	}
	select {
	case <-p.ended:
		return nil
	case <-time.After(startLimit):
		return fmt.Errorf("%s: killed, but has not ended", p.what)
	}
}
