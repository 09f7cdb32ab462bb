package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// What is seen on the hosts' uplinks, and what becomes of these.

// watch looks at a host's uplink before a network takes it, and from then on at what passes it.
func (w *world) watch(s *side) (err error) {
	if s.was, err = s.onUplink(); err != nil {
		return err
	}
	return s.observe(func(o *observer) { s.seen = s.Capture(o, uplink) })
}

// onUplink is what the host has on its uplink, but for anycast addresses, which come with forwarding.
func (h *host) onUplink() (string, error) {
	return h.Script(fmt.Sprintf(`ip -o link show %[1]s | sed 's/qdisc.*//; s/,UP,LOWER_UP//'; ip -o address show %[1]s
for family in -4 -6; do ip $family route show table all dev %[1]s | grep -v anycast | sort; done
ip -o link show type bridge | grep dwx || true`, uplink))
}

// carries tells whose MAC the container's packets have on the wire, in and out: its own, or the host's,
// and then its own is in no frame.
func (w *world) carries(container string, hosts bool) trial {
	return trial{on: func(s *side) cell {
		c := cell{command: s.Name + "# tcpdump -e -i " + uplink + " host " + s.one}
		own, onWire, err := s.macs(container, hosts)
		if err != nil {
			c.err = err
			return c
		}
		sent, came := lab.IPv4().From(s.one).Sent(), lab.IPv4().To(s.one).Received()
		c.told = fmt.Sprintf("%d packets out and %d in, all with %s", s.seen.Count(sent), s.seen.Count(came), onWire)
		if hosts {
			c.told += ", none with its own " + own
		}
		c.err = s.observe(func(o *observer) {
			s.seen.Where(sent).AllFrames(o, "carries the MAC that it should", lab.SourceMAC(onWire))
			s.seen.Where(came).AllFrames(o, "carries the MAC that it should", lab.DestinationMAC(onWire))
			if hosts {
				s.seen.Never(o, lab.Mentions(own))
			}
		})
		return c
	}}
}

// foundAt asks on the LAN for the container.
func (w *world) foundAt(container string, hosts bool) trial {
	return trial{on: func(s *side) cell {
		_, want, err := s.macs(container, hosts)
		if err != nil {
			return cell{err: err}
		}
		said, err := w.desk.Run(w.probe, "arp", "eth0", s.one)
		if err == nil && said != want {
			err = fmt.Errorf("ARP for %s is answered with %s, not %s", s.one, said, want)
		}
		return cell{"desk# arping " + s.one, "at " + said, err}
	}}
}

// bridged looks into a container for the MAC of its neighbour.
func (w *world) bridged(client, server string) trial {
	return trial{on: func(s *side) cell {
		c := cell{command: "docker exec " + server + " tcpdump -e -i eth0 host " + s.one}
		mac, err := s.inspect(client, "MacAddress")
		mac2, err2 := s.inspect(server, "MacAddress")
		if c.err = errors.Join(err, err2); c.err != nil {
			return c
		}
		c.told = mac + " > " + mac2
		c.err = s.observe(func(o *observer) {
			inside := s.CaptureIn(o, server, "eth0")
			if _, err := w.ask(place{s.Machine, client}, "3s", "tcp", s.two+":80"); err != nil {
				o.Errorf("%w", err)
			}
			inside.Where(lab.TCP().From(s.one)).AllFrames(o, "carries the containers' MACs", lab.SourceMAC(mac).DestinationMAC(mac2))
		})
		return c
	}}
}

// returns counts what one container sends another of its host: each packet leaves the host, passes the
// gateway and comes back.
func (w *world) returns() trial {
	return trial{on: func(s *side) cell {
		c := cell{command: s.Name + "# tcpdump -i " + uplink + " src " + s.two + " and dst " + s.one}
		time.Sleep(50 * time.Millisecond) // what is on its way comes back
		packets := lab.IPv4().From(s.two).To(s.one)
		out, back := s.seen.Count(packets.Sent()), s.seen.Count(packets.Received())
		passed, err := w.router.Forwarded(s.two, s.one)
		c.told = fmt.Sprintf("%d packets left, the gateway passed %d, %d came back", out, passed, back)
		if c.err = err; err == nil && (out == 0 || out != passed || out != back) {
			c.err = errors.New(c.told)
		}
		return c
	}}
}

// unpublishable tries to publish a port.
func (w *world) unpublishable(network string) trial {
	const words = "port mapping is not supported on the given network"
	return trial{on: func(s *side) cell {
		said, err := s.Docker("run", "--rm", "--network", network, "-p", "8090:80", lab.Image, "true")
		c := cell{command: s.Name + "# docker run --network " + network + " -p 8090:80 " + lab.Image, told: words}
		if err == nil {
			c.err = errors.New("the port is published")
		} else if !strings.Contains(said, words) {
			c.err = err
		}
		return c
	}}
}

// removed is the last row: the network goes, and the uplink is as it was.
func (w *world) removed(network string) row {
	return row{"host", "uplink, when the network is removed", "as it was", trial{on: func(s *side) cell {
		c := cell{command: s.Name + "# docker network rm " + network}
		during, err := s.onUplink()
		if err == nil && during == s.was {
			err = fmt.Errorf("%s was never taken", uplink)
		}
		for _, end := range s.ends {
			end()
		}
		_, gone := s.Docker("rm", "-f", network+"1", network+"2")
		_, removed := s.Docker("network", "rm", network)
		if c.err = errors.Join(err, gone, removed); c.err != nil {
			return c
		}
		var now string
		c.err = lab.WaitFor(5*time.Second, uplink+" to be as it was", func() (bool, error) {
			now, err = s.onUplink()
			return now == s.was, err
		})
		if c.err != nil {
			c.err = fmt.Errorf("%w; it was\n%s\nand is\n%s", c.err, s.was, now)
		}
		c.told = fmt.Sprintf("%s has its MAC, %s/24 and all its routes again; the switch dwx%s is gone", uplink, s.ip, uplink)
		return c
	}}}
}

// macs gives a container's MAC, and the one that it has on the wire.
func (s *side) macs(container string, hosts bool) (own, onWire string, err error) {
	if own, err = s.inspect(container, "MacAddress"); err != nil || !hosts {
		return own, own, err
	}
	onWire, err = s.MAC(uplink)
	return own, onWire, err
}

// observer has captures say what they would say to a test.
type observer struct {
	side *side
	said error
}

// observe gives what captures say.
func (s *side) observe(look func(o *observer)) (err error) {
	o := &observer{side: s}
	defer func() {
		if fatal, ok := recover().(complaint); ok {
			o.said = errors.Join(o.said, fatal)
		}
		err = o.said
	}()
	look(o)
	return nil
}

// complaint is one after which there is nothing to see.
type complaint struct{ error }

func (o *observer) Helper() {}

func (o *observer) Cleanup(f func()) { o.side.ends = append(o.side.ends, f) }

func (o *observer) Errorf(format string, args ...any) {
	o.said = errors.Join(o.said, fmt.Errorf(format, args...))
}

func (o *observer) Fatalf(format string, args ...any) { panic(complaint{fmt.Errorf(format, args...)}) }
