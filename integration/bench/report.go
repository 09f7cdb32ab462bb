package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/integration/lab"
)

// report is a table of what was measured on one engine.
type report struct {
	on      string // what networks
	key     string // the beginning of the heading, that the next report of the same has too
	heading string
	rows    [][]string
}

func newReport(h *lab.Host, on string, s settings) (*report, error) {
	version, err := h.Docker("version", "-f", "{{.Server.Version}}")
	if err != nil {
		return nil, err
	}
	where, err := h.Script("readlink -f $(command -v dockerd)")
	if err != nil {
		return nil, err
	}
	// An engine built from Go modules does not know its version: its folder does.
	if built := regexp.MustCompile(`moby-(v[0-9.]+(?:-(?:beta|rc)\.[0-9]+)?)`).FindStringSubmatch(where); built != nil {
		version = "moby " + built[1]
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	r := &report{on: on, key: "Engine " + version + ", " + on + ","}
	r.heading = fmt.Sprintf("%s Linux %s; medians of %d rounds", r.key, unix.ByteSliceToString(u.Release[:]), s.rounds)
	return r, nil
}

// noGoal is the goal of a comparison that is only told.
const noGoal = 0

// compare adds a row with a ratio, and whether it is the goal or less, to the hundredth.
func (r *report) compare(what string, ours, against time.Duration, base string, goal float64) {
	r.row(what, ours, against, base, "", goal)
}

// compareRounds compares the medians of what was measured in turn. Half of the rounds' own ratios are
// in the range that it adds.
func (r *report) compareRounds(what string, ours, against []time.Duration, base string, goal float64) {
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = float64(ours[i]) / float64(against[i])
	}
	slices.Sort(ratios)
	quarter := len(ratios) / 4
	spread := fmt.Sprintf("%.2f–%.2f", ratios[quarter], ratios[len(ratios)-1-quarter])
	r.row(what, median(ours), median(against), base, spread, goal)
}

func (r *report) row(what string, ours, against time.Duration, base, spread string, goal float64) {
	ratio := math.Round(100*float64(ours)/float64(against)) / 100
	limit, met := fmt.Sprintf("%.2f", goal), "met"
	if goal == noGoal {
		limit, met = "", ""
	} else if ratio > goal {
		met = "**missed**"
	}
	r.rows = append(r.rows, []string{what, short(ours), short(against), base, fmt.Sprintf("%.2f", ratio), spread, limit, met})
	fmt.Fprintln(os.Stderr, "       ", strings.Join(r.rows[len(r.rows)-1], "  "))
}

// plain adds a row without a goal.
func (r *report) plain(what, figure, remark string) {
	r.rows = append(r.rows, []string{what, figure, "", remark, "", "", "", ""})
	fmt.Fprintln(os.Stderr, "       ", what, figure, remark)
}

// table is Markdown, aligned for a terminal.
func (r *report) table() string {
	rows := append([][]string{{"what", "dockway", "against", "which is", "ratio", "half of rounds", "goal", ""}, nil}, r.rows...)
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, c := range row {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	rows[1] = make([]string, len(width))
	for i, w := range width {
		rows[1][i] = strings.Repeat("-", max(3, w))
	}
	var b strings.Builder
	for _, row := range rows {
		for i, c := range row {
			b.WriteString("| " + c + strings.Repeat(" ", max(0, max(3, width[i])-utf8.RuneCountInString(c))) + " ")
		}
		b.WriteString("|\n")
	}
	return b.String()
}

// short is a duration with three digits.
func short(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%.1f µs", float64(d)/1e3)
	case d < time.Second:
		return fmt.Sprintf("%.2f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

const method = `# Benchmarks

What ` + "`make bench`" + ` measures, against Docker's own drivers in the same run. Absolute figures are those of one machine
at one time, and differ from table to table; the ratios are what counts. ` + "`build/bench -write`" + ` writes this file, ` + "`-engines moby,debian`" + ` measures on both engines of the lab.

Traffic is one byte there and one back by blocking system calls, client and server pinned to one CPU, the median of each
round; ours and theirs take their rounds in turn, and the medians of the rounds are compared. Both are user-defined
networks of one simulated host, bridge-nf-call-iptables is 1 as on most hosts with an engine, and the engine's userland
proxy is on. Through a published port the client is another machine of the LAN. Connections are closed by reset, so no
port of the client is used up. The plugin's share of a start is CreateEndpoint, Join and ProgramExternalConnectivity (one
TCP port) by HTTP on the managed plugin's socket; the bare netlink calls are a veth pair, one end put on a bridge and set
up, and two nftables transactions that add as many elements to sets of the same shapes: no record on disk, no port held, no
look at what is there. Both drivers' whole commands are run with a pause between them, so that neither
pays for what the other left to the background. A goal is met when the ratio, to the hundredth, is not above it.

The current moby's own bridge driver makes a container's link straight in its namespace. Engines do not let plugins do so:
they move the plugin's link there, for which the kernel waits for a grace period on every ` + "`docker run`" + `. Docker 20.10 does the
same with its own.

On the physical network the client is a machine of the LAN, and the server is in a container. The host has three uplinks
of one kind: one that is dockway's, for transparent and l2bridge, one for Docker's macvlan driver, and one for
backend=macvlan. 1 GB is the median time of pieces of 4 MB, times as many as it takes, with client and server on one CPU: it
is what both sides and the host between them cost, not what a wire carries. Between macvlan and its own host there is
nothing to measure: they do not reach each other, which the bench tries. The goal is 0.98 of macvlan's rate, which is a
ratio of 1.02 in time. "Half of rounds" is the range of the middle half of the rounds' own ratios. ` + "`-only layers`" + ` measures
what each of the things costs that a frame passes on its way between wire and container with ` + "`fast_path=false`" + `.

Between hosts the client is in a container of one host, the server in a container of another, and a third is a member; all
three are engines of one kind in a swarm, for Docker's own overlay needs one, on one LAN of MTU 1500. The bare underlay is the
same containers in their hosts' own network. The kernel's VXLAN by hand is the least that an overlay is made of: bridge and
VXLAN in a namespace, every address entered beforehand, no firewall at the bridge. How much of the bare underlay is left is
the inverse of the ratio. The goal against Docker's overlay is 1.15 times as good a latency, a ratio of 0.87, and no less throughput.
Links of the lab pass what a sender has not yet cut to packets whole, encapsulated or not, as network cards do that can.
`

// keep writes the tables to the documentation, in place of older ones of the same.
func keep(all []*report) error {
	root, err := lab.Root()
	if err != nil {
		return err
	}
	path := filepath.Join(root, "docs", "benchmarks.md")
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	sections := strings.Split(string(old), "\n## ")[1:]
	for _, r := range all {
		text := r.heading + "\n\n" + r.table()
		i := slices.IndexFunc(sections, func(s string) bool { return strings.HasPrefix(s, r.key) })
		if i < 0 {
			sections = append(sections, text)
		} else {
			sections[i] = text
		}
	}
	text := method
	for _, s := range sections {
		text += "\n## " + strings.TrimRight(s, "\n") + "\n"
	}
	return os.WriteFile(path, []byte(text), 0o644)
}
