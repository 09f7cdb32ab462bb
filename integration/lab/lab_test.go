package lab_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

func TestMain(m *testing.M) {
	lab.Main()
	if os.Getenv("LAB_TO_KILL") != "" {
		if err := labToKill(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// labToKill makes a lab with everything in it, says so, and lives until it is killed.
func labToKill() error {
	l, err := lab.New(func(string, ...any) {})
	if err != nil {
		return err
	}
	lan, err := l.LAN("lan")
	if err != nil {
		return err
	}
	root, err := lab.Root()
	if err != nil {
		return err
	}
	probe, err := l.BuildProbe()
	if err != nil {
		return err
	}
	made := make(chan error)
	for i, engine := range []lab.Engine{lab.Debian, lab.Moby} {
		go func() {
			h, err := l.Host(string(engine), engine)
			if err == nil {
				err = errors.Join(h.Plug(lan, "eth0", fmt.Sprintf("198.18.0.%d/24", i+1)), h.LoadImage(probe),
					h.InstallPlugin(filepath.Join(root, "build", "plugin")))
			}
			if err == nil {
				_, err = h.Docker("run", "-d", "--name", "web", "-p", "80:80", lab.Image, "/probe", "serve", "tcp", ":80")
			}
			made <- err
		}()
	}
	if err := errors.Join(<-made, <-made); err != nil {
		return err
	}
	fmt.Println("ready", os.Getpid())
	select {}
}

// TestKilled: a lab that is killed leaves no process, mount, link or file outside its own folder and
// control groups, and the next lab removes these.
func TestKilled(t *testing.T) {
	before := state(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	child := exec.CommandContext(ctx, "/proc/self/exe")
	child.Env = append(os.Environ(), "LAB_TO_KILL=1")
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = child.Process.Kill(), child.Wait() }() // if the test gives up before
	line, err := bufio.NewReader(out).ReadString('\n')
	id := fmt.Sprint(child.Process.Pid)
	if err != nil || line != "ready "+id+"\n" {
		t.Fatalf("the lab does not start: %q %v", line, err)
	}
	mine := "dockway-lab-" + id
	if len(processes(t, mine)) < 6 {
		t.Fatalf("two engines and a first process each are expected: %q", processes(t, mine))
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // until then, its PID exists
	err = lab.WaitFor(10*time.Second, "the end of what the lab started", func() (bool, error) {
		left := processes(t, mine)
		return len(left) == 0, fmt.Errorf("%q", left)
	})
	if err != nil {
		t.Error(err)
	}
	next, err := lab.New(t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	next.Close()
	for what, is := range state(t) {
		for _, x := range is {
			if !slices.Contains(before[what], x) && !otherLab(x, mine) {
				t.Errorf("%s: %s is left", what, x)
			}
		}
	}
}

// otherLab tells whether a name is of a lab that runs beside this test.
func otherLab(name, mine string) bool {
	return strings.Contains(name, "dockway-lab-") && !strings.Contains(name, mine)
}

// state lists what a lab could leave on the machine.
func state(t *testing.T) map[string][]string {
	t.Helper()
	s := map[string][]string{}
	list := func(what, pattern string) {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		s[what] = append(s[what], found...)
	}
	list("links", "/sys/class/net/*")
	list("control groups", "/sys/fs/cgroup/*/")
	list("control groups", "/sys/fs/cgroup/*/*/")
	list("folders", filepath.Join(os.TempDir(), "dockway-lab-*"))
	list("engine files", "/etc/docker/*")
	list("engine files", "/etc/cni/*")
	list("engine files", "/opt/containerd")
	list("engine files", "/run/docker*")
	list("engine files", "/run/containerd*")
	list("engine files", "/var/lib/docker*")
	list("engine files", "/var/lib/containerd*")
	list("namespaces", "/run/netns/*")
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	s["mounts"] = strings.Split(strings.TrimSpace(string(mounts)), "\n")
	return s
}

// processes finds those that run in a lab's folder or control group, or speak of it.
func processes(t *testing.T, mark string) []string {
	t.Helper()
	var found []string
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		text := ""
		for _, file := range []string{"cmdline", "cgroup"} {
			b, err := os.ReadFile(filepath.Join(p, file))
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ESRCH) {
				t.Fatal(err)
			}
			text += strings.ReplaceAll(string(b), "\x00", " ") + "\n"
		}
		if strings.Contains(text, mark) {
			found = append(found, p+" "+text)
		}
	}
	return found
}
