package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/store"
)

func given(change func(*clusterConfig)) clusterConfig {
	c := clusterConfig{name: "a", label: "dockway", join: "198.18.0.1,db-1.example:9000", advertise: "eth0", gossipPort: "7947", vxlanPort: "14789"}
	change(&c)
	return c
}

// TestSettingsThatCannotBe: each is refused in one line that names the setting and what to do. A key is
// not shown.
func TestSettingsThatCannotBe(t *testing.T) {
	long := strings.Repeat("x", 300)
	type change = func(*clusterConfig)
	for _, c := range []struct {
		setting, what string
		change        change
	}{
		{"NODE_NAME", `"a/b" is not valid: use 1 to 64 ASCII letters`, func(c *clusterConfig) { c.name = "a/b" }},
		{"NODE_NAME", "is not valid", func(c *clusterConfig) { c.name = "two words" }},
		{"NODE_NAME", "is not valid", func(c *clusterConfig) { c.name = "bücher" }},
		{"NODE_NAME", "is not valid", func(c *clusterConfig) { c.name = long }},
		{"NODE_NAME", "is not valid", func(c *clusterConfig) { c.name, c.join, c.advertise = "a/b", "", "" }},
		{"CLUSTER", "300 bytes: 255 are possible", func(c *clusterConfig) { c.label = long }},
		{"CLUSTER", "control characters: leave them out", func(c *clusterConfig) { c.label = "a\nb" }},
		{"JOIN", "names no host: give addresses", func(c *clusterConfig) { c.join = ", ," }},
		{"JOIN", `"198.18.0.300" is no seed: give an address or a name`, func(c *clusterConfig) { c.join = "198.18.0.1,198.18.0.300" }},
		{"JOIN", `"198.18.0.1/24" is no seed`, func(c *clusterConfig) { c.join = "198.18.0.1/24" }},
		{"JOIN", `"198.18.0.1:0" is no seed`, func(c *clusterConfig) { c.join = "198.18.0.1:0" }},
		{"JOIN", `"198.18.0.1:gossip" is no seed`, func(c *clusterConfig) { c.join = "198.18.0.1:gossip" }},
		{"JOIN", `"http://db" is no seed`, func(c *clusterConfig) { c.join = "http://db" }},
		{"JOIN", `"a;b" is no seed`, func(c *clusterConfig) { c.join = "a;b" }},
		{"JOIN", `"a..b" is no seed`, func(c *clusterConfig) { c.join = "a..b" }},
		{"JOIN", "is no seed", func(c *clusterConfig) { c.join = strings.Repeat("x", 64) }},
		{"JOIN", `"0.0.0.0" is no seed`, func(c *clusterConfig) { c.join = "0.0.0.0" }},
		{"JOIN", `"[ff02::1]:7947" is no seed`, func(c *clusterConfig) { c.join = "[ff02::1]:7947" }},
		{"JOIN", `"fe80::1%eth0" is no seed`, func(c *clusterConfig) { c.join = "fe80::1%eth0" }},
		{"ADVERTISE", "0.0.0.0 is no address to advertise: give one of this host's", func(c *clusterConfig) { c.advertise = "0.0.0.0" }},
		{"ADVERTISE", "is no address to advertise", func(c *clusterConfig) { c.advertise = "224.0.0.1" }},
		{"ADVERTISE", "is no address to advertise", func(c *clusterConfig) { c.advertise = "fe80::1" }},
		{"ADVERTISE", `"198.18.0.300" is neither an address nor the name of an interface: give one`, func(c *clusterConfig) { c.advertise = "198.18.0.300" }},
		{"ADVERTISE", "without prefix length and port", func(c *clusterConfig) { c.advertise = "198.18.0.1/24" }},
		{"ADVERTISE", "without prefix length and port", func(c *clusterConfig) { c.advertise = "198.18.0.1:7947" }},
		{"ADVERTISE", "is neither", func(c *clusterConfig) { c.advertise = "eth0,eth1 eth2" }},
		{"ADVERTISE", "is neither", func(c *clusterConfig) { c.advertise = strings.Repeat("x", 16) }},
		{"GOSSIP_KEY", "not a key: that is 16, 24 or 32 bytes in base64, as dockway keygen prints it", func(c *clusterConfig) { c.key = "secret" }},
		{"GOSSIP_KEY", "not a key", func(c *clusterConfig) { c.key, c.join, c.advertise = "c2VjcmV0", "", "" }},
		{"GOSSIP_PORT", `"0" is not a port from 1 to 65535: give another`, func(c *clusterConfig) { c.gossipPort = "0" }},
		{"GOSSIP_PORT", "is not a port", func(c *clusterConfig) { c.gossipPort = "65536" }},
		{"VXLAN_PORT", "is not a port", func(c *clusterConfig) { c.vxlanPort = "vxlan" }},
		{"VXLAN_PORT", "are both 7947: give each a port of its own", func(c *clusterConfig) { c.vxlanPort = "7947" }},
	} {
		_, err := given(c.change).settings()
		switch {
		case err == nil:
			t.Errorf("%s, want %q: taken", c.setting, c.what)
		case !strings.Contains(err.Error(), c.setting) || !strings.Contains(err.Error(), c.what):
			t.Errorf("%s: %v, want %q", c.setting, err, c.what)
		case strings.ContainsAny(err.Error(), "\n") || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "c2VjcmV0"):
			t.Errorf("%s: several lines, or the secret: %v", c.setting, err)
		}
	}
}

// TestSettingsThatMayCome: what does not resolve, answer or exist just now is not refused.
func TestSettingsThatMayCome(t *testing.T) {
	for _, change := range []func(*clusterConfig){
		func(*clusterConfig) {},
		func(c *clusterConfig) { c.join, c.advertise = "", "" },
		func(c *clusterConfig) {
			c.join, c.advertise = "nowhere.invalid. 198.18.0.1,[fd00::1]:80, fd00::2 ,_a-b", ""
		},
		func(c *clusterConfig) { c.join, c.advertise = "", "fd00::1" },
		func(c *clusterConfig) { c.advertise = "::ffff:198.18.0.1" },
		func(c *clusterConfig) { c.advertise = "eth0.100" },
		func(c *clusterConfig) { c.name = "" }, // the host's own
		func(c *clusterConfig) { c.label = "blaue Gruppe, Süd" },
		func(c *clusterConfig) { c.key = "AAAAAAAAAAAAAAAAAAAAAA==" },
	} {
		c := given(change)
		s, err := c.settings()
		if err != nil {
			t.Errorf("%+v: %v", c, err)
		}
		if s.on && s.name == "" || len(s.seeds) > 0 != (c.join != "") || (s.address.IsValid() || s.link != "") != (c.advertise != "") || s.address.Is4In6() || (s.key != nil) != (c.key != "") {
			t.Errorf("%+v became %+v", c, s)
		}
	}
}

// TestServeRefusesSettings before it has made anything: one line on stderr, and an exit status.
func TestServeRefusesSettings(t *testing.T) {
	dir := t.TempDir()
	p := launch(t, dir, "--join", "198.18.0.300")
	if status := p.wait(); status != 1 {
		t.Errorf("exit status %d", status)
	}
	if got := p.stderr.String(); !strings.HasPrefix(got, `dockway: JOIN: "198.18.0.300" is no seed`) || strings.Count(got, "\n") != 1 {
		t.Errorf("stderr:\n%s", got)
	}
	if _, err := os.Stat(filepath.Join(dir, "state", store.FileName)); err == nil {
		t.Error("it has begun a record")
	}
}
