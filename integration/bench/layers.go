package main

import (
	"errors"
	"fmt"
	"time"
)

// layers takes away, one after the other, what a frame between the wire and a transparent network's
// container passes on the host with fast_path=false, to see what each costs. The plugin is stopped meanwhile, or it would
// put all back.
func (b *bench) layers() error {
	_, transparent, _, macvlan, _ := contenders()
	if err := errors.Join(b.enter(transparent), b.enter(macvlan)); err != nil {
		return err
	}
	pid, err := b.host.PluginPID()
	if err != nil {
		return err
	}
	port, err := b.host.Script(`cd /run; iptables-save >iptables.rules
(echo 'table inet dockway
delete table inet dockway'; nft list table inet dockway) >inet.nft
(echo 'table bridge dockway
delete table bridge dockway'; nft list table bridge dockway | grep -v @th) >bridge.nft # what nft cannot read again is of IPv6
echo 'table bridge dockway
delete table bridge dockway
table bridge dockway {
	chain prerouting { type filter hook prerouting priority dstnat; }
	chain external { type filter hook prerouting priority dstnat + 1; }
	chain forward { type filter hook forward priority filter; }
	chain postrouting { type filter hook postrouting priority filter; }
}' >hooks.nft
kill -STOP ` + pid + `
docker exec slow-server cat /sys/class/net/eth0/iflink | sed 's/.*/ip -o link show | grep "^&:"/' | sh | sed 's/^[0-9]*: //; s/@.*//'`)
	if err != nil {
		return err
	}
	whole := fmt.Sprintf(`nft -f /run/inet.nft; nft -f /run/bridge.nft; iptables-restore /run/iptables.rules
for d in eth1 %s; do tc qdisc del dev $d clsact 2>/dev/null || true; done
`, port)
	const (
		noInet      = "nft delete table inet dockway\n"
		noEngine    = "for t in filter nat raw mangle; do nft delete table ip $t 2>/dev/null || true; done\n"
		emptyBridge = "nft -f /run/hooks.nft\n"
		noBridge    = "nft delete table bridge dockway\n"
	)
	variants := []struct{ what, filter, script string }{
		{"transparent, fast_path=false", filtered, ""},
		{"without iptables' rules", filtered, noEngine},
		{"without table inet, too", filtered, noEngine + noInet},
		{"bridge-nf-call-iptables=0", unfiltered, ""},
		{"without chain external, too", unfiltered, "nft flush chain bridge dockway external"},
		{"with the bridge's chains empty", unfiltered, emptyBridge},
		{"without table bridge", unfiltered, noBridge},
		{"past the bridge by eBPF", filtered, fmt.Sprintf("%[1]s redirect eth1 %[2]s\n%[1]s redirect %[2]s eth1\n", b.self, port)},
		{"past the bridge by eBPF, and past a veth", filtered, fmt.Sprintf("%[1]s redirect eth1 %[2]s peer\n%[1]s redirect %[2]s eth1\n", b.self, port)},
	}
	for _, what := range []string{"rr", "crr"} {
		rounds := []func() (time.Duration, error){func() (time.Duration, error) { return b.askOnWire(what, b.peer, macvlan, filtered) }}
		for _, v := range variants {
			rounds = append(rounds, func() (time.Duration, error) {
				if _, err := b.host.Script(whole + v.script); err != nil {
					return 0, err
				}
				return b.askOnWire(what, b.peer, transparent, v.filter)
			})
		}
		m, err := b.interleave(b.rounds, rounds...)
		if err != nil {
			return err
		}
		for i, v := range variants {
			b.report.compareRounds(names[what]+", "+v.what, m[i+1], m[0], "Docker's macvlan", noGoal)
		}
	}
	return nil
}
