package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// row is a row of the table of who reaches whom.
type row struct {
	from, to string
	rule     string // what HNS says of it
	place    func(h *host) place
	address  func(h *host) string
	barred   bool
	seen     func(h *host) string // whom the server sees as its client, if that is told
}

// place is where a question is asked.
type place struct {
	machine   *lab.Machine
	container string
}

func (w *world) rows() []row {
	in := func(container string) func(*host) place {
		return func(h *host) place { return place{h.Machine, container} }
	}
	onHost := func(h *host) place { return place{h.Machine, ""} }
	outside := func(*host) place { return place{w.outside, ""} }
	own := func(h *host) string { return h.web1 + ":80" }
	published := func(h *host) string { return h.ip + ":8080" }
	always := func(s string) func(*host) string { return func(*host) string { return s } }
	gateway := func(h *host) string { return h.gateway }
	return []row{
		{from: "container", to: "container, same network", rule: "reached, as itself", place: in("web2"),
			address: own, seen: func(h *host) string { return h.web2 }},
		{from: "container", to: "container, other nat network", rule: "refused", place: in("app1"), address: own, barred: true},
		{from: "container", to: "outside", rule: "reached, as the host", place: in("web1"),
			address: always(outsideIP + ":80"), seen: func(h *host) string { return h.ip }},
		{from: "host", to: "container's own address", rule: "reached", place: onHost, address: own, seen: gateway},
		{from: "outside", to: "container's own address, with a route", rule: "refused", place: outside, address: own, barred: true},
		{from: "outside", to: "published port", rule: "reached, as itself", place: outside, address: published, seen: always(outsideIP)},
		{from: "other host's container", to: "published port", rule: "reached, as its host",
			place: func(h *host) place { return place{h.other.Machine, "web2"} }, address: published,
			seen: func(h *host) string { return h.other.ip }},
		{from: "host", to: "published port at its own address", rule: "reached", place: onHost, address: published},
		{from: "host", to: "published port at 127.0.0.1", rule: "reached", place: onHost, address: always("127.0.0.1:8080")},
		{from: "container", to: "published port at the host's address", rule: "reached (hairpin)", place: in("web2"),
			address: published, seen: gateway},
		{from: "container, other network", to: "published port at the host's address", rule: "reached", place: in("app1"), address: published},
		{from: "container", to: "itself through its published port", rule: "reached (hairpin)", place: in("web1"),
			address: published, seen: gateway},
		{from: "host", to: "port published on 127.0.0.1", rule: "reached", place: onHost, address: always("127.0.0.1:8081")},
		{from: "outside", to: "port published on 127.0.0.1", rule: "refused", place: outside,
			address: func(h *host) string { return h.ip + ":8081" }, barred: true},
	}
}

// layout of the table, less than 120 columns wide.
const layout = "  %-24s  %-37s  %-20s  %s  %s\n"

// table tries every row on both hosts, over TCP and UDP.
func (w *world) table() error {
	title("Who reaches whom in nat mode, as HNS documents it: each tried on both hosts, over TCP and UDP")
	width := len(w.hosts[0].Name)
	fmt.Println()
	fmt.Printf(layout, "FROM", "TO", "HNS SAYS", w.hosts[0].Name, w.hosts[1].Name)
	for _, r := range w.rows() {
		cells := map[*host]*cell{}
		for _, h := range w.hosts {
			cells[h] = &cell{}
		}
		_ = w.each(func(h *host) error {
			*cells[h] = w.try(r, h)
			return nil
		})
		if err := w.ctx.Err(); err != nil {
			return err
		}
		first, second := cells[w.hosts[0]], cells[w.hosts[1]]
		fmt.Printf(layout, r.from, r.to, r.rule, w.verdict(first.err)+strings.Repeat(" ", max(0, width-4)), w.verdict(second.err))
		fmt.Println("    " + paint(dim, first.command+"  → "+first.told))
		for _, h := range w.hosts {
			if err := cells[h].err; err != nil {
				fmt.Printf("    %s: %v\n", paint(red, h.Name), err)
			}
		}
	}
	return nil
}

// cell is what was tried of a row on a host.
type cell struct {
	command, told string
	err           error
}

// try asks over both protocols.
func (w *world) try(r row, h *host) cell {
	p, address := r.place(h), r.address(h)
	command := "probe ask tcp " + address
	if p.container != "" {
		command = "docker exec " + p.container + " /" + command
	}
	told, errs := make([]string, 2), make([]error, 2)
	var wg sync.WaitGroup
	for i, network := range []string{"tcp", "udp"} {
		wg.Go(func() { told[i], errs[i] = w.judge(r, h, p, network, address) })
	}
	wg.Wait()
	return cell{p.machine.Name + "# " + command, told[0], errors.Join(errs...)}
}

// judge asks, and compares with what HNS says.
func (w *world) judge(r row, h *host, p place, network, address string) (told string, err error) {
	if r.barred {
		said, err := w.ask(p, "700ms", network, address)
		if err == nil {
			return "reached", fmt.Errorf("%s is reached over %s, and sees %s", address, network, said)
		}
		// Anything else says that the question was not even asked.
		if text := err.Error(); !strings.Contains(text, "timeout") && !strings.Contains(text, "refused") && !strings.Contains(text, "unreachable") {
			return "not asked", err
		}
		return "no answer", nil
	}
	said, err := w.ask(p, "3s", network, address)
	if err != nil {
		return "no answer", fmt.Errorf("%s is not reached over %s: %w", address, network, err)
	}
	client := said[:max(0, strings.LastIndex(said, ":"))]
	if r.seen != nil {
		if want := r.seen(h); client != want {
			err = fmt.Errorf("the server sees %s as its client over %s, not %s", client, network, want)
		}
	}
	return "server sees " + client, err
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

// verdict gives ok or FAIL, four columns wide, and counts.
func (w *world) verdict(err error) string {
	if err == nil {
		return paint(green, "ok") + "  "
	}
	w.failed++
	return paint(red, "FAIL")
}
