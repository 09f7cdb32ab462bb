package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/dockway/dockway/integration/lab"
)

// show prints what dockway's command line says on one host.
func (w *world) show() error {
	h := w.hosts[1]
	title("What dockway shows of a host")
	for _, command := range []string{"networks", "ports", "peers", "overlay backend", "status"} {
		out, err := h.Dockway(strings.Fields(command)...)
		if err != nil {
			return err
		}
		fmt.Println("  " + paint(dim, h.Name+"# dockway "+command))
		for line := range strings.SplitSeq(out, "\n") {
			if utf8.RuneCountInString(line) > 114 {
				line = string([]rune(line)[:113]) + "…"
			}
			fmt.Println("  " + line)
		}
	}
	return nil
}

// kill ends the plugins without warning, one host's after the other's, while containers of an overlay
// send to each other, and others are spoken to through published ports.
func (w *world) kill(nat, overlay *mode) error {
	title("kill -9 of the plugin: overlays, published ports and connections go on, the engine starts it again")
	w.command(overlay, "kill -9 $(pgrep -f '^/dockway serve')")
	return w.act(overlay, func(s *side) (string, error) {
		pulse, err := w.pulse(s)
		if err != nil {
			return "", err
		}
		var said string
		if n := nat.on(s.host); n != nil {
			said, err = w.killPublishing(n)
		} else {
			said, err = s.killed(func() error { return nil })
		}
		if err == nil {
			err = s.knows()
		}
		report, lost := pulse.End()
		if lost == nil && (report.Sent == 0 || report.Received != report.Sent) {
			lost = fmt.Errorf("in the overlay to %s: %s", s.other.Name, report)
		}
		return fmt.Sprintf("%s\n                in the overlay to %s, a datagram each millisecond: %d of %d arrived",
			said, s.other.Name, report.Received, report.Sent), errors.Join(err, lost)
	})
}

// pulse sends from a container to one on the next host.
func (w *world) pulse(s *side) (*lab.Pulse, error) {
	from, err := s.Container("backend1")
	to, err2 := s.other.Container("backend1")
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	return w.lab.Pulse(from, to, s.other.one+":90")
}

// killPublishing ends the plugin of a host with a published port.
func (w *world) killPublishing(s *side) (string, error) {
	held, err := w.hold(s)
	if err != nil {
		return "", err
	}
	asked := 0
	back, err := s.killed(func() error {
		for ; asked < 5; asked++ { // whether it is down still or back already
			if err := w.askPublished(s, "1s"); err != nil {
				return fmt.Errorf("the published port does not go on: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if err := w.askPublished(s, "1s"); err != nil {
		return "", fmt.Errorf("the published port is not back: %w", err)
	}
	lines, err := held()
	if err != nil {
		return "", fmt.Errorf("a connection through the published port broke: %w", err)
	}
	return fmt.Sprintf("%s; %d new connections meanwhile, an old one went on (%s lines)", back, asked, lines), nil
}

// killed ends the host's plugin, does something, and waits until the plugin is back.
func (h *host) killed(meanwhile func() error) (string, error) {
	before, err := h.PluginPID()
	if err != nil {
		return "", err
	}
	if err := h.KillPlugin(); err != nil {
		return "", err
	}
	start := time.Now()
	if err := errors.Join(meanwhile(), h.WaitPlugin(before)); err != nil {
		return "", err
	}
	return "plugin back after " + seconds(time.Since(start)), nil
}

// flush takes every nftables rule of the host away.
func (w *world) flush(m *mode) error {
	title("Somebody flushes all of the host's nftables rules: dockway puts its own back")
	w.command(m, "nft flush ruleset")
	return w.act(m, func(s *side) (string, error) {
		if _, err := s.Run("nft", "flush", "ruleset"); err != nil {
			return "", err
		}
		start := time.Now()
		err := lab.WaitFor(5*time.Second, "repair", func() (bool, error) {
			err := w.askPublished(s, "100ms")
			return err == nil, err
		})
		took := time.Since(start)
		if err != nil {
			return "", err
		}
		if took > time.Second {
			return "", fmt.Errorf("the published port was repaired after %s, later than a second", seconds(took))
		}
		if said, err := w.ask(place{machine: w.outside}, "300ms", "tcp", s.one+":80"); err == nil {
			return "", fmt.Errorf("the container's own address is open to the outside, and sees %s", said)
		}
		return fmt.Sprintf("published port reached again after %s, the container's own address is closed again", seconds(took)), nil
	})
}

// act does something on one host after the other and prints how it went.
func (w *world) act(m *mode, do func(*side) (string, error)) error {
	for _, s := range m.sides {
		text, err := do(s)
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err != nil {
			text = err.Error()
		}
		fmt.Printf("  %s %-8s %s\n", w.verdict(err), s.Name, text)
	}
	return nil
}

func (w *world) command(m *mode, text string) {
	fmt.Println("  " + paint(dim, m.names()+"# "+text))
}

// askPublished asks the published port from outside.
func (w *world) askPublished(s *side, timeout string) error {
	said, err := w.ask(place{machine: w.outside}, timeout, "tcp", s.ip+":8080")
	if err == nil && !strings.HasPrefix(said, outsideIP+":") {
		err = fmt.Errorf("the server sees %s", said)
	}
	return err
}

// hold keeps a connection from outside through the published port busy. What it returns ends it.
func (w *world) hold(s *side) (end func() (lines string, err error), err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	cmd := w.outside.Command(ctx, w.probe, "-timeout", "5s", "hold", "tcp", s.ip+":8080")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		cancel()
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		cancel()
		return nil, err
	}
	var complaint strings.Builder
	cmd.Stderr = &complaint
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, err
	}
	out := bufio.NewReader(stdout)
	finish := func(err error) error {
		defer cancel()
		_ = stdin.Close() // tells it to end
		_, _ = io.Copy(io.Discard, out)
		if ended := cmd.Wait(); ended != nil {
			err = errors.Join(ended, errors.New(strings.TrimSpace(complaint.String())))
		}
		return err
	}
	if said, err := out.ReadString('\n'); err != nil || said != "holding\n" {
		return nil, finish(fmt.Errorf("the connection to hold says %q: %w", said, err))
	}
	return func() (string, error) {
		_ = stdin.Close()
		lines, err := out.ReadString('\n')
		return strings.TrimSpace(lines), finish(err)
	}, nil
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
