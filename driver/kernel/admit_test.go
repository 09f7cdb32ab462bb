package kernel_test

import (
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

var admits = map[string]plan.Admit{
	"iptables":  {Family: "ip", Mark: 0x1000},
	"ip6tables": {Family: "ip6", Mark: 0x1000},
}

const admitLine = "-A DOCKER-USER -m mark --mark 0x1000/0x1000 -m comment --comment dockway -j ACCEPT\n"

func TestAdmit(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{Tables: tables()})
	for tool, a := range admits {
		// Without Docker there is nothing to do.
		holds(t, k, a)
		do(t, k, add(a)...)
		do(t, k, remove(a)...)
		if got := run(t, "nft", "list ruleset"); got != "" {
			t.Errorf("made what nobody asked for: %s", got)
		}
		docker := func(args ...string) { t.Helper(); run(t, tool, args...) }
		docker("-N", "DOCKER-USER")
		docker("-A", "DOCKER-USER", "-j", "RETURN")
		docker("-I", "FORWARD", "-j", "DOCKER-USER")
		docker("-P", "FORWARD", "DROP")
		if got := observe(t, k, a); len(got) > 0 {
			t.Errorf("observed before it was made: %s", got)
		}
		do(t, k, add(a)...)
		do(t, k, add(a)...)
		holds(t, k, a)
		want := "-N DOCKER-USER\n" + admitLine + "-A DOCKER-USER -j RETURN\n"
		if got := run(t, tool, "-S", "DOCKER-USER"); got != want {
			t.Errorf("%s shows\n%s", tool, got)
		}
		// The administrator's own rules come and go, before ours too.
		docker("-I", "DOCKER-USER", "-i", "eth9", "-j", "DROP")
		holds(t, k, a)
		do(t, k, add(a)...)
		docker("-D", "DOCKER-USER", "-i", "eth9", "-j", "DROP")
		if got := run(t, tool, "-S", "DOCKER-USER"); got != want {
			t.Errorf("%s shows\n%s", tool, got)
		}
		// Saved and restored, the rule is still known, and not made a second time.
		saved := run(t, tool+"-save")
		if !strings.Contains(saved, admitLine) {
			t.Errorf("saved as\n%s", saved)
		}
		runInput(t, saved, tool+"-restore")
		holds(t, k, a)
		do(t, k, add(a)...)
		runInput(t, "*filter\n[7:700] "+admitLine+"[8:800] "+admitLine+"COMMIT\n", tool+"-restore", "--noflush", "--counters")
		do(t, k, plan.Diff(observe(t, k, a), plan.Of(a))...)
		holds(t, k, a)
		if got := run(t, tool, "-S", "DOCKER-USER"); strings.Count(got, admitLine) != 1 {
			t.Errorf("not once: %s", got)
		}
		docker("-F", "DOCKER-USER")
		runInput(t, "*filter\n[7:700] "+admitLine+"COMMIT\n", tool+"-restore", "--noflush", "--counters")
		holds(t, k, a)
		// Flushed, as engines do; then one like ours but for its mark.
		docker("-F", "DOCKER-USER")
		docker("-A", "DOCKER-USER", "-m", "mark", "--mark", "0x2000/0x2000", "-j", "ACCEPT")
		docker("-A", "DOCKER-USER", "-m", "mark", "--mark", "0x1000/0x1000", "-j", "DROP")
		if got := observe(t, k, a); len(got) > 0 {
			t.Errorf("took another rule for ours: %s", got)
		}
		do(t, k, add(a)...)
		do(t, k, remove(a)...)
		do(t, k, remove(a)...)
		if got := run(t, tool, "-S", "DOCKER-USER"); strings.Contains(got, "dockway") || strings.Count(got, "-A") != 2 {
			t.Errorf("removed as\n%s", got)
		}
		run(t, "nft", "flush ruleset")
	}
	if got := k.Warnings(); len(got) > 0 {
		t.Errorf("warnings: %s", got)
	}
}

func TestLegacyWarnings(t *testing.T) {
	inNamespace(t)
	k := open(t, kernel.Config{Tables: tables()})
	for family, tool := range map[string]string{"legacy iptables": "iptables-legacy", "legacy ip6tables": "ip6tables-legacy"} {
		run(t, tool, "-A", "FORWARD", "-i", "eth9", "-m", "comment", "--comment", "x", "-j", "ACCEPT")
		if got := k.Warnings(); len(got) > 0 {
			t.Errorf("warned of policy ACCEPT: %s", got)
		}
		run(t, tool, "-P", "FORWARD", "DROP")
		if got := k.Warnings(); len(got) != 1 || !strings.Contains(got[0], family) || !strings.Contains(got[0], "--mark 0x1000/0x1000") {
			t.Errorf("%s: %s", tool, got)
		}
		run(t, tool, "-P", "FORWARD", "ACCEPT")
	}
}
