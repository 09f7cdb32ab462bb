package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dockway/dockway/integration/lab"
)

// VXLAN identifiers of overlays, and the UDP port.
const (
	backendVSID = 5001
	tenantVSID  = 5002
	innerVSID   = 5003
	vxlanPort   = 14789
)

// overlay is the mode overlay, on all hosts: three networks, all of the same subnet.
func (w *world) overlay() *mode {
	const subnet = "10.90.0.0/16"
	m := w.mode("overlay", "backend", func(h *host) string { return h.lanIP }, subnet, subnet, subnet)
	m.before = func(s *side) error {
		return s.observe(func(o *observer) { s.seen = s.Capture(o, underlay) })
	}
	overlay := func(name string, vsid int, args ...string) []string {
		return create(name, append([]string{"--subnet", subnet, "-o", "mode=overlay", "-o", fmt.Sprintf("vsid=%d", vsid)}, args...)...)
	}
	m.with = func(s *side) [][]string {
		return [][]string{
			overlay("backend", backendVSID),
			overlay("tenant", tenantVSID, "-o", "outbound_nat=true"),
			overlay("inner", innerVSID, "--internal"),
			serving("backend1", "backend", "-p", "8070:80", "-p", "8070:80/udp"),
			serving("backend2", "backend"),
			serving("tenant1", "tenant", "--ip", tenant(s)),
			serving("inner1", "inner"),
		}
	}
	m.ready = w.meet
	b1, b2, t1, i1 := in("backend1"), in("backend2"), in("tenant1"), in("inner1")
	outside, published, far := at(w.outside), port(itself, 8070), port(fixed(outsideIP), 80)
	otherTenant := func(s *side) string { return tenant(s.other) }
	m.rows = []row{
		{"container", "container, same host", "bridged", w.within(b2, two, one)},
		{"container", "container, another host", "in VXLAN", w.across(b1, one, otherOne, backendVSID)},
		{"container", "other overlay with the same subnet", "no way", w.barred(b1, port(tenant, 80))},
		{"container of the other", "container", "no way", w.barred(t1, port(one, 80))},
		{"container of the other", "its own neighbour, another host", "in its own VXLAN", w.across(t1, tenant, otherTenant, tenantVSID)},
		{"container", "outside", "reached, as the host", w.reached(b1, far, itself)},
		{"container", "host", "reached", w.reached(b1, port(itself, 80), anybody)},
		{"the same, outbound_nat", "outside", "reached, as the host", w.reached(t1, far, itself)},
		{"the same, outbound_nat", "host", "reached", w.reached(t1, port(itself, 80), anybody)},
		{"the same, --internal", "outside", "no way", w.barred(i1, far)},
		{"the same, --internal", "host", "no way", w.barred(i1, port(itself, 80))},
		{"outside", "published port", "reached", w.reached(outside, published, anybody)},
		{"other host", "published port", "reached", w.reached(other(onHost), published, anybody)},
		{"host", "published port", "reached", w.reached(onHost, published, anybody)},
		{"anybody", "published port, outbound_nat", "refused", w.unpublishable("tenant")},
		{"outside", "container's address, with a route", "no way", w.routed(w.outside, w.barred(outside, port(one, 80)))},
		{"host", "container's address", "no way", w.barred(onHost, port(one, 80))},
		{"other host", "container's address", "no way", w.barred(other(onHost), port(one, 80))},
		{"the wire", "broadcast, ARP, multicast", "none", w.quiet()},
	}
	return m
}

// tenant is the address of tenant1, which ends with the host's number.
func tenant(s *side) string { return strings.Replace(s.ip, "198.18.0.", "10.90.255.20", 1) }

// meet waits until the containers serve, and the host knows where those of the next one are.
func (w *world) meet(s *side) error {
	for container, ip := range map[string]string{"backend1": s.two, "backend2": s.one, "tenant1": tenant(s)} {
		err := lab.WaitFor(5*time.Second, "the containers on "+s.Name, func() (bool, error) {
			_, err := w.ask(place{s.Machine, container}, "1s", "tcp", ip+":80")
			return err == nil, err
		})
		if err != nil {
			return err
		}
	}
	return s.knows()
}

// knows waits until the host has heard of the containers on all others.
func (s *side) knows() error {
	return lab.WaitFor(10*time.Second, s.Name+" to hear of the containers on other hosts", func() (bool, error) {
		known, err := s.Dockway("overlay", "--json")
		for o := s.other; o != s; o = o.other {
			for _, ip := range []string{o.one, o.two, tenant(o)} {
				if !strings.Contains(known, `"`+ip+`"`) {
					return false, err
				}
			}
		}
		return err == nil, err
	})
}

// within tries whether a container is reached, and whether nothing of that leaves the host.
func (w *world) within(where func(*side) place, client, server text) trial {
	reached := w.reached(where, port(server, 80), client)
	return trial{on: func(s *side) cell {
		c := reached.on(s)
		there, back := inVXLAN(client(s), server(s))
		c.told += ", nothing of it on the wire"
		c.err = errors.Join(c.err, s.observe(func(o *observer) { s.seen.Never(o, lab.Either(there, back)) }))
		return c
	}}
}

// across tries whether a container on the next host is reached, and whether all of that is in VXLAN
// of the identifier.
func (w *world) across(where func(*side) place, client, server text, vsid int) trial {
	reached := w.reached(where, port(server, 80), client)
	return trial{on: func(s *side) cell {
		c := reached.on(s)
		there, back := inVXLAN(client(s), server(s))
		c.err = errors.Join(c.err, s.observe(func(o *observer) {
			s.seen.Where(there).AllFrames(o, "goes to the other host, in the identifier", lab.Frames().From(s.ip).To(s.other.ip).VNI(vsid))
			s.seen.Where(back).AllFrames(o, "comes from the other host, in the identifier", lab.Frames().From(s.other.ip).To(s.ip).VNI(vsid))
		}))
		c.told += fmt.Sprintf(", %d frames there and %d back, all in VXLAN %d", s.seen.Count(there), s.seen.Count(back), vsid)
		return c
	}}
}

// inVXLAN is what two containers say to each other in any overlay.
func inVXLAN(client, server string) (there, back lab.Match) {
	return lab.Encapsulated(vxlanPort).Inside(lab.IPv4().From(client).To(server)), lab.Encapsulated(vxlanPort).Inside(lab.IPv4().From(server).To(client))
}

// routed gives somebody on the LAN a way to the container before a trial.
func (w *world) routed(m *lab.Machine, t trial) trial {
	return trial{on: func(s *side) cell {
		if _, err := m.Run("ip", "route", "replace", s.one, "via", s.ip); err != nil {
			return cell{err: err}
		}
		return t.on(s)
	}}
}

// quiet looks at all that was in VXLAN since before the networks were made.
func (w *world) quiet() trial {
	return trial{on: func(s *side) cell {
		vxlan := lab.Encapsulated(vxlanPort)
		c := cell{command: fmt.Sprintf("%s# tcpdump -i %s udp port %d", s.Name, underlay, vxlanPort)}
		c.err = s.observe(func(o *observer) {
			s.seen.Where(vxlan).AllFrames(o, "is for one container", vxlan.Inside(lab.Not(lab.Either(lab.Group(), lab.ARP(), lab.NeighbourSolicitation()))))
		})
		c.told = fmt.Sprintf("all %d frames in VXLAN since the networks were made are from one container to one other", s.seen.Count(vxlan))
		return c
	}}
}
