package plugin

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What the plugin asks of its host is what its documentation gives reasons for.
func TestConfig(t *testing.T) {
	text, err := os.ReadFile("config.json")
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		Entrypoint []string
		Interface  struct {
			Types  []string
			Socket string
		}
		Network struct{ Type string }
		Linux   struct {
			Capabilities    []string
			AllowAllDevices bool
			Devices         []any
		}
		Mounts []struct {
			Source, Destination, Type string
			Options                   []string
		}
		PropagatedMount  string
		PidHost, IpcHost bool
		Env              []struct {
			Name, Value, Description string
			Settable                 []string
		}
	}
	if err := json.Unmarshal(text, &c); err != nil {
		t.Fatal(err)
	}
	if want := []string{"docker.networkdriver/1.0", "docker.ipamdriver/1.0"}; !slices.Equal(c.Interface.Types, want) {
		t.Errorf("interface types %q, want %q", c.Interface.Types, want)
	}
	if c.Interface.Socket != "dockway.sock" || c.Network.Type != "host" || c.PropagatedMount != "/var/lib/dockway" {
		t.Errorf("socket %q, network %q, propagated mount %q", c.Interface.Socket, c.Network.Type, c.PropagatedMount)
	}
	if len(c.Entrypoint) < 2 || c.Entrypoint[0] != "/dockway" || c.Entrypoint[1] != "serve" {
		t.Errorf("entry point %q, want /dockway serve", c.Entrypoint)
	}
	if c.Linux.AllowAllDevices || len(c.Linux.Devices) > 0 || c.PidHost || c.IpcHost {
		t.Error("it asks for devices or the host's processes")
	}

	page, err := os.ReadFile("../docs/plugin.md")
	if err != nil {
		t.Fatal(err)
	}
	asked := section(t, string(page), "## What it asks for")
	refused := section(t, string(page), "## What it does not ask for")
	for _, name := range c.Linux.Capabilities {
		reason(t, asked, "`"+name+"`")
	}
	for _, m := range c.Mounts {
		reason(t, asked, "`"+m.Source+"`")
		reason(t, asked, "`"+m.Destination+"`")
		// Beside the plugins' own are the sockets of the engine and of containerd.
		if m.Source != "/run/docker/plugins" && (strings.Contains(m.Source, "docker") || slices.Contains([]string{"/", "/run", "/var", "/var/run"}, m.Source)) {
			t.Errorf("it asks for %s of the engine", m.Source)
		}
	}
	reason(t, asked, "`"+c.PropagatedMount+"`")
	for _, e := range c.Env {
		reason(t, section(t, string(page), "## Settings"), "`"+e.Name+"`")
		if !slices.Equal(e.Settable, []string{"value"}) || e.Description == "" {
			t.Errorf("environment %s: settable %q, description %q", e.Name, e.Settable, e.Description)
		}
	}
	// And the page gives reasons for nothing else.
	for _, row := range rows(asked) {
		for _, name := range regexp.MustCompile(`CAP_[A-Z_]+`).FindAllString(row[0], -1) {
			if !slices.Contains(c.Linux.Capabilities, name) {
				t.Errorf("the page has a reason for %s, which config.json does not ask for", name)
			}
		}
	}
	for _, row := range rows(refused) {
		for _, name := range c.Linux.Capabilities {
			if strings.Contains(row[0], name) {
				t.Errorf("the page says that %s is not asked for", name)
			}
		}
	}
}

// The service is held to the same capabilities.
func TestServiceUnit(t *testing.T) {
	text, err := os.ReadFile("dockway.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"Before=docker.service", "CapabilityBoundingSet=CAP_NET_ADMIN CAP_BPF CAP_NET_BIND_SERVICE CAP_NET_RAW", "NoNewPrivileges=yes",
		"ProtectSystem=strict", "ReadWritePaths=/proc/sys/net", "StateDirectory=dockway", "RuntimeDirectory=docker/plugins",
	} {
		if !strings.Contains(string(text), "\n"+line+"\n") {
			t.Errorf("dockway.service does not say %s", line)
		}
	}
}

// What overlays need besides is in a file of its own: it takes back what keeps mounts from the host.
func TestServiceOverlayConf(t *testing.T) {
	unit, err := os.ReadFile("dockway.service")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("dockway-overlay.conf")
	if err != nil {
		t.Fatal(err)
	}
	conf := "\n" + string(text)
	for _, line := range []string{"[Service]", "CapabilityBoundingSet=CAP_SYS_ADMIN", "RestrictNamespaces=net", "SystemCallFilter=mount umount2", "ReadWritePaths="} {
		if !strings.Contains(conf, "\n"+line+"\n") {
			t.Errorf("dockway-overlay.conf does not say %s", line)
		}
	}
	// The settings for which systemd makes a service a mount namespace (systemd.exec(5)).
	for line := range strings.Lines(string(unit)) {
		setting, _, _ := strings.Cut(line, "=")
		if (strings.HasPrefix(setting, "Protect") && setting != "ProtectClock" || strings.HasPrefix(setting, "Private")) &&
			!strings.Contains(conf, "\n"+setting+"=no\n") && !strings.Contains(conf, "\n"+setting+"=default\n") {
			t.Errorf("dockway-overlay.conf does not take back %s", strings.TrimSpace(line))
		}
	}
}

// section is the part of a page below a heading.
func section(t *testing.T, page, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(page, "\n"+heading+"\n")
	if !ok {
		t.Fatalf("docs/plugin.md has no %q", heading)
	}
	text, _, _ := strings.Cut(rest, "\n## ")
	return text
}

// rows are the rows of a section's tables, without heads: what, and why.
func rows(section string) (out [][2]string) {
	for line := range strings.Lines(section) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if strings.HasPrefix(line, "|") && len(cells) >= 2 {
			out = append(out, [2]string{strings.TrimSpace(cells[0]), strings.TrimSpace(cells[len(cells)-1])})
		}
	}
	return out
}

func reason(t *testing.T, section, what string) {
	t.Helper()
	for _, row := range rows(section) {
		if strings.Contains(row[0], what) && len(row[1]) > 20 {
			return
		}
	}
	t.Errorf("docs/plugin.md has no reason for %s", what)
}
