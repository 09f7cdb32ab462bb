package integration

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

var installed4 = map[lab.Engine]string{lab.Debian: "198.18.0.21", lab.Moby: "198.18.0.22"}

// TestInstall: what `make install` does to a host with an engine, the first time, as an upgrade, and
// after it was interrupted where the old plugin is gone and the new one is not there.
func TestInstall(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(root, "integration", "install.sh")
	for _, engine := range []lab.Engine{lab.Debian, lab.Moby} {
		t.Run(string(engine), func(t *testing.T) {
			t.Parallel()
			bare, err := shared.lab.Host(string(engine)+"-install", engine)
			if err != nil {
				t.Fatal(err)
			}
			h := onHost(t, bare)
			h.ip = installed4[engine]
			if err := h.Plug(shared.lan, "eth0", h.ip+"/24"); err != nil {
				t.Fatal(err)
			}
			if err := h.LoadImage(shared.probe); err != nil {
				t.Fatal(err)
			}
			h.must("mount -t tmpfs tmpfs /usr/local/bin") // the machine's own is not ours to change

			h.must(script)
			h.must("docker plugin disable -f dockway:latest; docker plugin set dockway:latest LOG_LEVEL=debug 'DEFAULT_POOLS=10.99.0.0/16:24'; " + script)
			if out := h.must("/usr/local/bin/dockway networks"); !strings.Contains(out, "nat") {
				t.Errorf("dockway networks does not show the network nat: %s", out)
			}
			h.server("web", "nat", "-p", "8080:80")
			reaches(t, "published port", on(shared.peer), "tcp", h.ip+":8080", peer4)
			held := holdFromOutside(t, h.ip+":8080")
			settings := h.docker("plugin", "inspect", "-f", "{{.Settings.Env}}", lab.Plugin)
			if !strings.Contains(settings, "LOG_LEVEL=debug DEFAULT_POOLS=10.99.0.0/16:24") {
				t.Errorf("the settings are %s", settings)
			}
			networks, plugin := h.must("/usr/local/bin/dockway networks --json"), h.docker("plugin", "inspect", "-f", "{{.Id}}", lab.Plugin)

			h.must(script)
			upgraded := h.docker("plugin", "inspect", "-f", "{{.Id}}", lab.Plugin)
			if upgraded == plugin {
				t.Error("the upgrade did not replace the plugin")
			}
			reaches(t, "published port after an upgrade", on(shared.peer), "tcp", h.ip+":8080", peer4)

			h.must(`mkdir /run/bin; printf '%s\n' '#!/bin/sh' 'if [ "$1 $2" = "plugin create" ]; then exit 1; fi' "exec $(command -v docker) \"\$@\"" >/run/bin/docker; chmod +x /run/bin/docker`)
			if out, err := h.Script("PATH=/run/bin:$PATH " + script); err == nil {
				t.Fatalf("the install went on although the plugin cannot be created: %s", out)
			}
			reaches(t, "published port without a plugin", on(shared.peer), "tcp", h.ip+":8080", peer4)
			h.must(script)
			reaches(t, "published port after an interrupted upgrade", on(shared.peer), "tcp", h.ip+":8080", peer4)
			if now := h.must("/usr/local/bin/dockway networks --json"); now != networks {
				t.Errorf("the networks before: %s\nafter: %s", networks, now)
			}
			if out := h.docker("plugin", "inspect", "-f", "{{.Settings.Env}}", lab.Plugin); out != settings {
				t.Errorf("the settings %s became %s", settings, out)
			}
			held.flowed()

			h.docker("rm", "-f", "web")
			h.docker("network", "rm", "nat")
			if err := h.StopEngine(); err != nil {
				t.Fatal(err)
			}
			if out, err := h.Script(script); err == nil || !strings.Contains(out, "the engine does not answer") {
				t.Errorf("without an engine, the install says %q", out)
			}
		})
	}
}
