package integration

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// labChild in the environment makes TestLabChild a lab that waits to be killed.
const labChild = "DOCKWAY_TEST_LAB_CHILD"

// TestLabKilled: of a lab that is killed the kernel removes all that runs, and the next lab the
// rest. The machine's own network is never touched.
func TestLabKilled(t *testing.T) {
	before := machineNetwork(t)
	child := exec.Command("/proc/self/exe", "-test.run=^TestLabChild$", "-test.v")
	child.Env = append(os.Environ(), labChild+"=1")
	stdout, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("dockway-lab-%d", child.Process.Pid)
	lines := bufio.NewScanner(stdout)
	ready := false
	for !ready && lines.Scan() {
		ready = strings.Contains(lines.Text(), "child is ready")
	}
	if !ready {
		_ = child.Wait()
		t.Fatal("the lab to be killed did not come up")
	}
	if during := machineNetwork(t); during != before {
		t.Errorf("a lab changed the machine's own network: before\n%s\nnow\n%s", before, during)
	}
	if running(t, id) == "" {
		t.Error("nothing of the running lab is found: the test looks for the wrong things")
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed
	left := ""
	if err := lab.WaitFor(soon, "the end of all that the killed lab ran", func() (bool, error) {
		left = running(t, id)
		return left == "", nil
	}); err != nil {
		t.Errorf("%v: %s", err, left)
	}
	next, err := lab.New(t.Logf) // in this process a second one: same folder, same name
	if err != nil {
		t.Fatal(err)
	}
	_ = next // closing it would take the folder of the tests' own lab away
	found, err := filepath.Glob(filepath.Join(os.TempDir(), id))
	groups, err2 := filepath.Glob("/sys/fs/cgroup/*/" + id)
	if err != nil || err2 != nil || len(found)+len(groups) > 0 {
		t.Errorf("the next lab did not sweep %v %v", found, groups)
	}
	if after := machineNetwork(t); after != before {
		t.Errorf("the killed lab changed the machine's own network: before\n%s\nnow\n%s", before, after)
	}
}

// machineNetwork is what this machine's own network namespace holds.
func machineNetwork(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", "ip -o link; ip -o address | sed 's/valid_lft.*//'; ip route; ip netns; nft -s list ruleset 2>&1").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// running is what a lab runs and mounts.
func running(t *testing.T, id string) string {
	t.Helper()
	id = "[d]" + id[1:] // or grep would find itself
	out, err := exec.Command("sh", "-c", "grep -l '"+id+"' /proc/[0-9]*/cgroup /proc/[0-9]*/mountinfo /proc/[0-9]*/cmdline 2>/dev/null; grep '"+id+"' /proc/mounts").Output()
	if err != nil && len(out) == 0 {
		return "" // grep found none
	}
	return string(out)
}

// TestLabChild is the lab that TestLabKilled kills: by itself it does nothing.
func TestLabChild(t *testing.T) {
	if os.Getenv(labChild) == "" {
		return
	}
	if _, err := shared.hosts[lab.Debian].Docker("network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "child"); err != nil {
		t.Fatal(err)
	}
	if _, err := shared.hosts[lab.Debian].Docker("run", "-d", "--network", "child", "-p", "80:80", lab.Image, "sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	fmt.Println("child is ready")
	time.Sleep(time.Minute)
}
