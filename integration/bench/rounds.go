package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

type settings struct {
	rounds int
	each   time.Duration
	only   string
}

// bench is one host of the lab, with containers on both kinds of network.
type bench struct {
	settings
	ctx    context.Context
	self   string // this program
	peer   *lab.Machine
	host   *lab.Host
	socket string  // the plugin's
	report *report // of the part that runs
	lab    *lab.Lab
	lan    *lab.LAN
}

const (
	hostIP = "198.18.0.1"
	cpu    = "0"
	ours   = "dockway"
	theirs = "bridge"
)

// ports that the servers are published on.
var published = map[string]string{ours: "8001", theirs: "8002"}

var parts = []struct {
	name string
	on   string // a title of the report that it is in
	run  func(*bench) error
}{
	{"traffic", nat, (*bench).traffic},
	{"control", nat, (*bench).control},
	{"run", nat, (*bench).wholeRun},
	{"ports", nat, (*bench).ports}, // last: the daemon's memory grows with 10,000 ports
	{"wire", wire, (*bench).wire},
	{"overlay", overlay, (*bench).overlay},
	{"layers", layers, (*bench).layers},
}

// What networks the reports are of.
const (
	nat     = "mode nat"
	wire    = "on the physical network"
	overlay = "between hosts"
	layers  = "what a frame passes"
)

func partNames() []string {
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	return names
}

func measureOn(ctx context.Context, engine lab.Engine, s settings) ([]*report, error) {
	root, err := lab.Root()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1fs %s: %s\n", time.Since(start).Seconds(), engine, fmt.Sprintf(format, args...))
	}
	say("starting the lab")
	l, err := lab.New(say)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	b := &bench{settings: s, ctx: ctx, lab: l}
	if b.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if err := b.setUp(l, engine, filepath.Join(root, "build", "plugin")); err != nil {
		return nil, err
	}
	var reports []*report
	for _, p := range parts {
		if s.only == "" && p.on == layers || s.only != "" && !slices.Contains(strings.Split(s.only, ","), p.name) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if len(reports) == 0 || reports[len(reports)-1].on != p.on {
			r, err := newReport(b.host, p.on, s)
			if err != nil {
				return nil, err
			}
			reports = append(reports, r)
			b.report = r
		}
		say("measuring: %s", p.name)
		if err := p.run(b); err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	say("done")
	return reports, nil
}

func (b *bench) setUp(l *lab.Lab, engine lab.Engine, built string) error {
	var err error
	if b.lan, err = l.LAN("lan"); err != nil {
		return err
	}
	if b.peer, err = l.Machine("peer"); err != nil {
		return err
	}
	if err := b.lan.Plug(b.peer, "eth0", "198.18.0.100/24"); err != nil {
		return err
	}
	if b.host, err = l.Host(string(engine), engine); err != nil {
		return err
	}
	if err := errors.Join(b.host.Plug(b.lan, "eth0", hostIP+"/24"), b.plugUplinks(), b.host.LoadImage(b.self)); err != nil {
		return err
	}
	if err := b.host.InstallPlugin(built); err != nil {
		return err
	}
	if b.socket, err = b.host.Script("echo /run/docker/plugins/*/dockway.sock"); err != nil {
		return err
	}
	if _, err := b.host.Docker("network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, ours); err != nil {
		return err
	}
	if _, err := b.host.Docker("network", "create", theirs+"-net"); err != nil {
		return err
	}
	for _, kind := range []string{ours, theirs} {
		args := []string{"run", "-d", "--cap-add", "SYS_NICE", "--name", kind + "-server", "--network", network(kind), "-p", published[kind] + ":80"}
		if kind == theirs {
			args = append(args, "-p", "9001-9009:9001-9009") // ours get theirs later (ports)
		}
		if _, err := b.host.Docker(append(args, lab.Image, "/probe", "serve", cpu)...); err != nil {
			return err
		}
		if _, err := b.host.Docker("run", "-d", "--cap-add", "SYS_NICE", "--name", kind+"-client", "--network", network(kind), lab.Image, "sleep", "100000"); err != nil {
			return err
		}
	}
	return nil
}

func network(kind string) string {
	if kind == theirs {
		return theirs + "-net"
	}
	return kind
}

// run runs a command of the lab that prints JSON, within a time.
func (b *bench) run(m *lab.Machine, reply any, args ...string) error {
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Minute)
	defer cancel()
	var complaint strings.Builder
	cmd := m.Command(ctx, args...)
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, complaint.String())
	}
	if reply == nil {
		return nil
	}
	return json.Unmarshal(out, reply)
}

// part runs a part of this program on the host.
func (b *bench) part(reply any, args ...any) error {
	texts := []string{b.self}
	for _, a := range args {
		texts = append(texts, fmt.Sprint(a))
	}
	return b.run(b.host.Machine, reply, texts...)
}

// ask measures one round between containers, or from the peer through a published port.
func (b *bench) ask(what, kind string, outside bool) (time.Duration, error) {
	var l latency
	ms := fmt.Sprint(b.each.Milliseconds())
	if outside {
		err := b.run(b.peer, &l, b.self, "measure", what, hostIP+":"+published[kind], cpu, ms)
		return l.P50, err
	}
	address, err := b.host.Docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", kind+"-server")
	if err != nil {
		return 0, err
	}
	err = b.run(b.host.Machine, &l, "docker", "exec", kind+"-client", "/probe", "measure", what, address+":80", cpu, ms)
	return l.P50, err
}

// interleave takes rounds of several things in turn, and gives what each thing took, by round.
func (b *bench) interleave(rounds int, things ...func() (time.Duration, error)) ([][]time.Duration, error) {
	took := make([][]time.Duration, len(things))
	for range rounds {
		for i, thing := range things {
			if err := b.ctx.Err(); err != nil {
				return nil, err
			}
			d, err := thing()
			if err != nil {
				return nil, err
			}
			took[i] = append(took[i], d)
		}
	}
	return took, nil
}

// names of what is measured, as measure has them.
var names = map[string]string{"rr": "request/response", "crr": "connect/request/response"}

// traffic: one byte there and back, on a connection or with one for each.
func (b *bench) traffic() error {
	for _, outside := range []bool{false, true} {
		way := "between two containers"
		if outside {
			way = "through a published port"
		}
		for _, what := range []string{"rr", "crr"} {
			m, err := b.interleave(b.rounds,
				func() (time.Duration, error) { return b.ask(what, ours, outside) },
				func() (time.Duration, error) { return b.ask(what, theirs, outside) })
			if err != nil {
				return err
			}
			b.report.compareRounds(names[what]+" "+way, m[0], m[1], "Docker's bridge", 1)
		}
	}
	return nil
}

// ports: new connections through one port while others are published too.
func (b *bench) ports() error {
	if err := b.part(nil, "network", b.socket, "create"); err != nil {
		return err
	}
	counts := []int{10, 1000, 10000}
	took := map[int][]time.Duration{}
	var docker []time.Duration
	others := 1 // the port that is measured
	for range b.rounds {
		for i, n := range counts {
			// One endpoint more, with what lacks; the server's port and Docker's do not count.
			if err := b.part(nil, "start", b.socket, i, i, 10000+others, n-others); err != nil {
				return err
			}
			others = n
			d, err := b.ask("crr", ours, true)
			if err != nil {
				return err
			}
			took[n] = append(took[n], d)
		}
		d, err := b.ask("crr", theirs, true)
		if err != nil {
			return err
		}
		docker = append(docker, d)
		if err := b.part(nil, "stop", b.socket, 0, len(counts)-1); err != nil {
			return err
		}
		others = 1
	}
	if err := b.part(nil, "network", b.socket, "delete"); err != nil {
		return err
	}
	ten := median(took[10])
	b.report.compare("new connections, 10 ports published", ten, median(docker), "Docker's bridge, 10 ports", 1)
	b.report.compare("new connections, 1,000 ports published", median(took[1000]), ten, "10 ports", 1.05)
	b.report.compare("new connections, 10,000 ports published", median(took[10000]), ten, "10 ports", 1.05)
	return nil
}

// control: what the plugin answers for one container, and its memory.
func (b *bench) control() error {
	if _, err := b.host.Script("ip link add bare type bridge; ip link set bare up"); err != nil {
		return err
	}
	if err := b.part(nil, "network", b.socket, "create"); err != nil {
		return err
	}
	empty, err := b.memory()
	if err != nil {
		return err
	}
	// A bridge has room for a thousand endpoints: the last of them are those that are measured.
	rounds := max(40, 5*b.rounds)
	many := 1000 - rounds - warmUp
	var none, full controlTimes
	clear := func() error { // and let the deletions of the plugin come to an end
		_, err := b.host.Script(fmt.Sprintf("ip link del group %d; sleep 2", bareGroup))
		return err
	}
	if err := errors.Join(b.part(&none, "control", b.socket, many, 30000, rounds), clear()); err != nil {
		return err
	}
	if err := b.part(nil, "start", b.socket, 0, many-1, 10000, 1); err != nil {
		return err
	}
	if err := errors.Join(b.part(&full, "control", b.socket, many, 30000, rounds), clear()); err != nil {
		return err
	}
	if err := b.part(nil, "start", b.socket, many, 999, 30000, 1); err != nil {
		return err
	}
	loaded, err := b.memory()
	if err != nil {
		return err
	}
	b.report.compare("plugin's calls of a container's start", none.Start, none.Bare, "bare netlink, link and rules", 3)
	b.report.compare("the same at 1,000 endpoints", full.Start, full.Bare, "bare netlink, link and rules", 3)
	b.report.plain("bare netlink, the link alone", fmt.Sprintf("%s, at 1,000 endpoints %s", short(none.Link), short(full.Link)), fmt.Sprintf("a start is %.1f and %.1f times as long", float64(none.Start)/float64(none.Link), float64(full.Start)/float64(full.Link)))
	b.report.compare("the same at 1,000 endpoints", full.Start, none.Start, "at no endpoint", 1.3)
	b.report.plain("CreateEndpoint, Join, ProgramExternalConnectivity", none.calls(), "at no endpoint")
	b.report.plain("CreateEndpoint, Join, ProgramExternalConnectivity", full.calls(), "at 1,000 endpoints")
	b.report.plain("a call for which nothing is to be done", short(none.Floor), "three of them are in a start")
	b.report.plain("plugin's calls of a container's end", fmt.Sprintf("%s, at 1,000 endpoints %s", short(none.Stop), short(full.Stop)), "")
	b.report.plain("memory of the daemon (RSS)", fmt.Sprintf("%.1f MB, at 1,000 endpoints %.1f MB", empty, loaded), "")
	// A thousand links take a while to remove: the calls answer at once, and the bench goes on after.
	return errors.Join(b.part(nil, "stop", b.socket, 0, 999), b.part(nil, "network", b.socket, "delete"))
}

// memory is the plugin's resident memory, in megabytes.
func (b *bench) memory() (float64, error) {
	pid, err := b.host.PluginPID()
	if err != nil {
		return 0, err
	}
	var kb float64
	text, err := b.host.Run("awk", "/VmRSS/{print $2}", "/proc/"+pid+"/status")
	if err == nil {
		_, err = fmt.Sscan(text, &kb)
	}
	return kb / 1024, err
}

// quiet is a pause in which what one command left to the background ends, before the next is
// measured: it may be the other driver's.
const quiet = 100 * time.Millisecond

// leastRuns is how often whole commands are run at least: what they take differs by a tenth from one to the next.
const leastRuns = 31

// wholeRun: docker run and docker rm as a user waits for them.
func (b *bench) wholeRun() error {
	for _, port := range []string{"", "8100:80"} {
		started, ended := map[string][]time.Duration{}, map[string][]time.Duration{}
		for range max(leastRuns, b.rounds) {
			for _, kind := range []string{ours, theirs} {
				if err := b.ctx.Err(); err != nil {
					return err
				}
				args := []string{"run", "-d", "--name", "whole", "--network", network(kind)}
				if port != "" {
					args = append(args, "-p", port)
				}
				time.Sleep(quiet)
				start := time.Now()
				if _, err := b.host.Docker(append(args, lab.Image, "sleep", "1000")...); err != nil {
					return err
				}
				started[kind] = append(started[kind], time.Since(start))
				time.Sleep(quiet)
				start = time.Now()
				if _, err := b.host.Docker("rm", "-f", "whole"); err != nil {
					return err
				}
				ended[kind] = append(ended[kind], time.Since(start))
			}
		}
		with := ""
		if port != "" {
			with = " -p"
		}
		b.report.compareRounds("docker run -d"+with, started[ours], started[theirs], "Docker's bridge", 1)
		b.report.compareRounds("docker rm -f"+with, ended[ours], ended[theirs], "Docker's bridge", 1)
	}
	return nil
}
