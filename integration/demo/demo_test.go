package main

import (
	"bufio"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

// demo starts what a newcomer types first, in a group of processes of its own, as a terminal does.
func demo(t *testing.T) (cmd *exec.Cmd, lines *bufio.Scanner) {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.CommandContext(t.Context(), "make", "--no-print-directory", "-C", root, "demo")
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "MAKE") || strings.HasPrefix(v, "MFLAGS") })
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewScanner(out)
}

// machine is what a demo could leave on this machine, or change of its network.
func machine(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", `ip -o link; ip -o address | sed 's/valid_lft.*//'; ip route; ip netns; nft -s list ruleset
ls -d "${TMPDIR:-/tmp}"/dockway-lab-* /sys/fs/cgroup/dockway-lab-* /sys/fs/cgroup/*/dockway-lab-* 2>/dev/null
grep dockway-lab- /proc/mounts; pgrep -fl 'dockway-lab-[0-9]'; true`).CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestDemo: everything that the demo shows is as it says, for all modes, and it leaves nothing behind.
func TestDemo(t *testing.T) {
	before := machine(t)
	cmd, lines := demo(t)
	var said strings.Builder
	for lines.Scan() {
		said.WriteString(lines.Text() + "\n")
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("make demo: %v", err)
	}
	for _, want := range []string{"Mode nat", "Mode transparent", "Mode l2bridge", "Mode l2tunnel", "Mode overlay", "\nAll ok after "} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("the demo does not say %q", want)
		}
	}
	if after := machine(t); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
	if t.Failed() {
		t.Log(said.String())
	}
}

// TestDemoInterrupted: of a demo that somebody ends half-way by Ctrl-C nothing is left.
func TestDemoInterrupted(t *testing.T) {
	before := machine(t)
	cmd, lines := demo(t)
	for lines.Scan() && !strings.HasPrefix(lines.Text(), "Mode nat") {
		t.Log(lines.Text())
	}
	during := machine(t)
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	for lines.Scan() {
		said.WriteString(lines.Text() + "\n")
	}
	if err := cmd.Wait(); err == nil {
		t.Error("make demo has gone well, though it was interrupted")
	}
	if !strings.Contains(said.String(), "nothing is left behind") {
		t.Errorf("the demo does not say that nothing is left: %s", said.String())
	}
	if after := machine(t); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
	if during == before {
		t.Error("nothing of the running demo is found: the test looks for the wrong things")
	}
}
