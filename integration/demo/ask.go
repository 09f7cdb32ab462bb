package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// place is where a question is asked.
type place struct {
	machine   *lab.Machine
	container string
}

// Places, as rows name them.

func in(container string) func(*side) place {
	return func(s *side) place { return place{s.Machine, container} }
}

func at(m *lab.Machine) func(*side) place {
	return func(*side) place { return place{machine: m} }
}

func onHost(s *side) place { return place{machine: s.Machine} }

func other(where func(*side) place) func(*side) place {
	return func(s *side) place { return where(s.other) }
}

// text is an address that differs between the hosts.
type text func(*side) string

func one(s *side) string       { return s.one }
func two(s *side) string       { return s.two }
func otherOne(s *side) string  { return s.other.one }
func itself(s *side) string    { return s.ip }
func otherHost(s *side) string { return s.other.ip }
func gateway(s *side) string   { return s.gateway }
func loopback(*side) string    { return "127.0.0.1" }

func fixed(address string) text { return func(*side) string { return address } }

func port(ip text, number int) text {
	return func(s *side) string { return ip(s) + ":" + strconv.Itoa(number) }
}

// anybody is no certain client.
var anybody text

// reached tries whether a server is reached, over TCP and UDP, and sees the client as it is to.
func (w *world) reached(where func(*side) place, address, seen text) trial {
	return trial{on: func(s *side) cell {
		return w.both(where(s), address(s), func(p place, network, address string) (string, error) {
			said, err := w.ask(p, "3s", network, address)
			if err != nil {
				return "no answer", fmt.Errorf("%s is not reached over %s: %w", address, network, err)
			}
			client := said[:max(0, strings.LastIndex(said, ":"))]
			if seen != nil && client != seen(s) {
				err = fmt.Errorf("the server sees %s as its client over %s, not %s", client, network, seen(s))
			}
			return "server sees " + client, err
		})
	}}
}

// barred tries whether a server is not reached, over TCP nor over UDP.
func (w *world) barred(where func(*side) place, address text) trial {
	return trial{on: func(s *side) cell {
		return w.both(where(s), address(s), func(p place, network, address string) (string, error) {
			said, err := w.ask(p, "700ms", network, address)
			if err == nil {
				return "reached", fmt.Errorf("%s is reached over %s, and sees %s", address, network, said)
			}
			// Anything else says that the question was not even asked.
			if text := err.Error(); !strings.Contains(text, "timeout") && !strings.Contains(text, "refused") && !strings.Contains(text, "unreachable") {
				return "not asked", err
			}
			return "no answer", nil
		})
	}}
}

// both tries over both protocols at once.
func (w *world) both(p place, address string, try func(p place, network, address string) (told string, err error)) cell {
	command := "probe ask tcp " + address
	if p.container != "" {
		command = "docker exec " + p.container + " /" + command
	}
	told, errs := make([]string, 2), make([]error, 2)
	var wg sync.WaitGroup
	for i, network := range []string{"tcp", "udp"} {
		wg.Go(func() { told[i], errs[i] = try(p, network, address) })
	}
	wg.Wait()
	return cell{p.machine.Name + "# " + command, told[0], errors.Join(errs...)}
}

// ask asks a server and gives what it says: the client's address.
func (w *world) ask(p place, timeout, network, address string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	args := []string{w.probe, "-timeout", timeout, "ask", network, address}
	if p.container != "" {
		args = append([]string{"docker", "exec", p.container, "/probe"}, args[1:]...)
	}
	out, err := p.machine.Command(ctx, args...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("%w: %s", err, text)
	}
	return text, nil
}
