package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/integration/lab"
)

// TestServiceOverlay: with the rights of dockway.service an overlay is refused, and the error names what to
// install; with those of dockway-overlay.conf it works, and outlives the service.
func TestServiceOverlay(t *testing.T) {
	h := onHost(t, shared.hosts[lab.Debian])
	h.docker("plugin", "disable", "-f", lab.Plugin) // the two would each undo what the other does to the tables
	t.Cleanup(func() {
		h.docker("plugin", "enable", lab.Plugin)
		if err := h.WaitPlugin(""); err != nil {
			t.Error(err)
		}
	})
	const socket = "/run/docker/plugins/dw5.sock"
	serve := func(rights ...string) (stop func()) {
		t.Helper()
		root, err := lab.Root()
		if err != nil {
			t.Fatal(err)
		}
		p, err := h.Start("answers on", append(rights, filepath.Join(root, "build/dockway"), "serve", "--socket", socket, "--state-dir", "/run/dw5", "--join", h.ip)...)
		if err != nil {
			t.Fatal(err)
		}
		if err := lab.WaitFor(soon, "the service to be in its cluster", func() (bool, error) {
			out, err := h.Dockway("peers", "--socket", socket)
			return err == nil && strings.Contains(out, h.ip), err
		}); err != nil {
			t.Fatal(err)
		}
		return func() {
			t.Helper()
			if err := p.Stop(); err != nil {
				t.Error(err)
			}
		}
	}
	create := []string{"network", "create", "-d", "dw5", "--ipam-driver", "dw5", "--subnet", over4, "-o", "mode=overlay", "-o", "vsid=5071", "served"}
	unit, conf := rights(t, "dockway.service"), rights(t, "dockway.service", "dockway-overlay.conf")
	away := []string{"unshare", "--mount", "--propagation", "slave"} // as systemd does where files are protected

	stop := serve(append(append([]string{}, away...), unit...)...)
	h.refused("need CAP_SYS_ADMIN: of the systemd service, install plugin/dockway-overlay.conf as /etc/systemd/system/dockway.service.d/overlay.conf", create...)
	stop()
	stop = serve(append(append([]string{}, away...), conf...)...)
	h.refused("does not reach the host, and network namespaces there would end with dockway", create...)
	stop()

	stop = serve(conf...)
	defer func() { stop() }()
	h.docker(create...)
	t.Cleanup(func() { _, _ = h.Docker("network", "rm", "served") })
	h.server("served-a", "served")
	h.client("served-b", "served")
	a := h.address("served-a", "served")
	reaches(t, "in an overlay of the service", h.in("served-b"), "tcp", a+":80", h.address("served-b", "served"))
	stop()
	h.must("test $(ls /run/dockway/netns | grep -c ^dwn) = 1")
	reaches(t, "while the service is stopped", h.in("served-b"), "tcp", a+":80", h.address("served-b", "served"))
	stop = serve(conf...)
	h.docker("rm", "-f", "served-a", "served-b")
	h.docker("network", "rm", "served")
	h.must("test $(ls /run/dockway/netns | grep -c ^dwn) = 0")
}

// rights is a command that runs what follows with the capabilities that a unit and its additions have.
func rights(t *testing.T, files ...string) []string {
	t.Helper()
	number := map[string]int{
		"CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_BPF": unix.CAP_BPF, "CAP_NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
		"CAP_NET_RAW": unix.CAP_NET_RAW, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN,
	}
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	set := "-all"
	for _, file := range files {
		text, err := os.ReadFile(filepath.Join(root, "plugin", file))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, ok := strings.Cut(string(text), "\nCapabilityBoundingSet=")
		if !ok {
			t.Fatalf("%s says nothing of capabilities", file)
		}
		line, _, _ := strings.Cut(rest, "\n")
		for _, name := range strings.Fields(line) {
			n, ok := number[name]
			if !ok {
				t.Fatalf("%s: %s is not known here", file, name)
			}
			set += fmt.Sprintf(",+cap_%d", n)
		}
	}
	return []string{"setpriv", "--bounding-set", set}
}
