package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/kernel/fastpath"
	"github.com/dockway/dockway/driver/plan"
)

// stations have the fast paths of switches know who is on the wire: just those MACs that the switch itself
// has heard by its uplink, as its FDB says, which also forgets them when the uplink goes, is taken out or
// down, and not while the uplink does not forward. The kernel tells of every change. That counts for a while only, and for no longer than
// there is nothing that it has told and that is not read: who does not follow any more, since it was killed,
// stopped, or is late, sends nobody to the wrong place.
type stations struct {
	mu       sync.Mutex
	told     *os.File // where the kernel tells, at first; nil: nobody has asked yet
	switches []*heard
	again    bool // the whole FDB is to be looked at again
}

// heard is who is behind the uplink of a switch.
type heard struct {
	bridge, uplink int32 // indices
	name           string
	path           *fastpath.Path
	macs           map[plan.MAC]bool // those that the fast path knows
	trusted        time.Time         // until when
	unsure         bool              // what the FDB says could not be read, or not be told
	blocked        bool              // the uplink does not forward
}

const (
	trustTime = 3 * time.Second
	trustStep = time.Second // after which it is said again
	heardStep = time.Minute // after which the whole FDB is looked at again
)

// hearStations has the fast path of a switch follow its FDB from now on. The uplink is attached.
func (k *Kernel) hearStations(ctx context.Context, p *fastpath.Path, o plan.Shortcut) error {
	s := &k.stations
	found, err := k.links(ctx, o.Bridge, o.Link)
	if err != nil {
		return err
	}
	if found[0] == nil || found[1] == nil {
		return fmt.Errorf("switch %s or uplink %s: %w", o.Bridge, o.Link, unix.ENODEV)
	}
	known, err := p.List()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.told == nil {
		file, err := k.subscribe(stationEvents)
		if err != nil {
			return err
		}
		s.told = file
		k.running.Go(func() { k.followStations(file) })
	}
	s.forget(o.Bridge)
	h := &heard{uplink: found[1].index, name: o.Bridge, path: p, macs: map[plan.MAC]bool{}}
	for mac := range known.Remote {
		h.macs[mac] = true
	}
	s.switches = append(s.switches, h)
	if err := k.hearAll(ctx, h); err != nil {
		return err
	}
	k.shortener.wake()
	_ = s.told.SetReadDeadline(time.Now()) // who reads has nothing to wait for, and trusts it
	return nil
}

// forget ends it for a switch. The caller holds the lock.
func (s *stations) forget(bridge string) {
	s.switches = slices.DeleteFunc(s.switches, func(h *heard) bool { return h.name == bridge })
}

var stationEvents = eventSource{protocol: unix.NETLINK_ROUTE, groups: []int{unix.RTNLGRP_NEIGH, unix.RTNLGRP_LINK}}

// followStations reads what the kernel tells of FDBs, until the Kernel is closed. Since it hears of links
// too, it has ports attached whose container's end has left.
func (k *Kernel) followStations(file *os.File) {
	s := &k.stations
	stop := context.AfterFunc(k.life, func() { file.Close() })
	defer s.distrust()
	next, lost := time.Now().Add(heardStep), false
	for k.life.Err() == nil {
		_ = file.SetReadDeadline(time.Now().Add(trustStep))
		err := k.receive(file, k.hearEvents)
		switch {
		case k.life.Err() != nil:
			return
		case err == nil, errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, unix.ENOBUFS):
			lost = true
		default:
			lost = true
			k.log.WithError(err).Warn("netlink events of switches cannot be read; opening the socket anew")
			s.distrust()
			stop()
			file.Close()
			pause(k.life, retryTime)
			if again, err := k.subscribe(stationEvents); err == nil {
				file = again
			}
			stop = context.AfterFunc(k.life, func() { file.Close() })
		}
		if lost {
			s.distrust()
		}
		// After a loss the kernel goes on to lose, and does not say so again, until all is read.
		if left, err := backlog(file); err != nil || left > 0 {
			continue
		}
		if time.Now().After(next) {
			lost = true // or could have been
		}
		if k.hearAgain(lost) {
			next, lost = time.Now().Add(heardStep), false
			k.shortener.wake()
		}
		s.trust(file)
	}
}

// hearAgain looks at the whole FDB of all switches, if it has to. One that cannot be looked at is not trusted
// until it can.
func (k *Kernel) hearAgain(lost bool) bool {
	s := &k.stations
	s.mu.Lock()
	defer s.mu.Unlock()
	if !lost && !s.again {
		return false
	}
	s.again = false
	for _, h := range s.switches {
		if err := k.hearAll(k.life, h); err != nil && k.life.Err() == nil {
			k.warnUnknown(h, err)
		}
	}
	return true
}

func (k *Kernel) warnUnknown(h *heard, err error) {
	k.log.WithError(err).Warnf("who is on the wire of switch %s is not known: TCP and UDP go by it, which takes longer", h.name)
}

// hearAll makes what a fast path knows the same as what the FDB says. Without the switch or the uplink that
// is nothing.
func (k *Kernel) hearAll(ctx context.Context, h *heard) error {
	bridge, err := k.link(ctx, h.name)
	if err == nil {
		var uplink []*link
		if uplink, err = k.linksByIndex(ctx, h.uplink); err == nil && uplink[0] != nil {
			h.forwards(uplink[0].state)
		}
	}
	h.bridge = 0
	if bridge != nil {
		h.bridge = bridge.index
	}
	var bodies [][]byte
	if err == nil {
		body := append([]byte{unix.AF_BRIDGE, 0, 0, 0}, native32(uint32(h.uplink))...)
		bodies, err = k.route.dump(ctx, unix.RTM_GETNEIGH, append(body, 0, 0, 0, 0))
	}
	if isGone(err) {
		err = nil
	}
	now := map[plan.MAC]bool{}
	for _, body := range bodies {
		if e, ok := parseStation(body); ok && h.has(e) {
			now[e.mac] = true
		}
	}
	if err != nil {
		h.doubt()
		return fmt.Errorf("list FDB of %s: %w", h.name, err)
	}
	for mac := range h.macs {
		if !now[mac] {
			now[mac] = false
		}
	}
	h.unsure, h.macs = false, map[plan.MAC]bool{} // also what is known is told again
	return h.apply(now)
}

// hearEvents follows what has happened.
func (k *Kernel) hearEvents(b []byte) {
	changes := map[*heard]map[plan.MAC]bool{}
	s := &k.stations
	s.mu.Lock()
	defer s.mu.Unlock()
	for m, body := range messages(b) {
		switch m.Type {
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			l := parseLink(body)
			if l == nil {
				continue
			}
			if strings.HasPrefix(l.name, vethPrefix) || m.Type == unix.RTM_DELLINK {
				k.shortener.wake()
			}
			for _, h := range s.switches {
				s.again = s.again || l.name == h.name && l.index != h.bridge // made anew
				if l.index == h.uplink {
					h.forwards(l.state)
				}
			}
		case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
			e, ok := parseStation(body)
			if !ok {
				continue
			}
			for _, h := range s.switches {
				if h.bridge != e.bridge || m.Type == unix.RTM_DELNEIGH && h.uplink != e.port {
					continue // one that goes from another port may have come to the uplink before
				}
				if changes[h] == nil {
					changes[h] = map[plan.MAC]bool{}
				}
				changes[h][e.mac] = m.Type == unix.RTM_NEWNEIGH && h.has(e)
				k.bindAgain(h, m.Type == unix.RTM_NEWNEIGH, e)
			}
		}
	}
	for h, now := range changes {
		if err := h.apply(now); err != nil {
			k.warnUnknown(h, err)
		}
	}
}

// bindAgain tells a switch who is behind a port if it learns that, as one does that was made anew, or made to
// forget.
func (k *Kernel) bindAgain(h *heard, come bool, e station) {
	if !come || e.static || h.has(e) {
		return
	}
	if port, there, err := h.path.Behind(e.mac); err == nil && there && port == e.port {
		_, _ = k.route.request(k.life, bind(port, e.mac)) // else it goes on learning
	}
}

// apply tells the fast path who has come to the uplink and who has gone.
func (h *heard) apply(now map[plan.MAC]bool) error {
	var come, gone []plan.MAC
	for mac, there := range now {
		switch {
		case !there:
			gone = append(gone, mac)
			delete(h.macs, mac)
		case !h.macs[mac] && len(h.macs) < fastpath.MaxStations:
			come = append(come, mac)
			h.macs[mac] = true
		}
	}
	err := errors.Join(h.path.Forget(gone...), h.path.Hear(come...))
	if err != nil {
		h.doubt()
	}
	return err
}

// forwards takes note of the state of the uplink as a port, if it is told.
func (h *heard) forwards(state int) {
	const forwarding = 3 // BR_STATE_FORWARDING of linux/if_bridge.h
	if state >= 0 {
		h.blocked = state != forwarding
	}
	if h.blocked {
		h.distrust()
	}
}

// doubt has the fast path count on nothing until the whole FDB is looked at again.
func (h *heard) doubt() {
	h.unsure = true
	h.distrust()
}

func (h *heard) distrust() {
	_ = h.path.Trust(0) // if that fails, it ends by itself
	h.trusted = time.Time{}
}

// trust says that all is so, if there is nothing left to read.
func (s *stations) trust(file *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if left, err := backlog(file); err != nil || left > 0 {
		return
	}
	for _, h := range s.switches {
		if !h.unsure && !h.blocked && time.Until(h.trusted) < trustTime-trustStep/2 && h.path.Trust(trustTime) == nil {
			h.trusted = time.Now().Add(trustTime)
		}
	}
}

// distrust says that nothing is known to be so.
func (s *stations) distrust() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.switches {
		h.distrust()
	}
}

const ndaFlagsExt = 15 // NDA_FLAGS_EXT of linux/neighbour.h

// A station is an entry of a bridge's FDB.
type station struct {
	bridge, port int32
	mac          plan.MAC
	plain        bool // without a VLAN, and the like
	static       bool // told, and not learnt
	own          bool // the host's
}

// has reports whether an entry says that a MAC is behind the uplink.
func (h *heard) has(e station) bool {
	return e.bridge == h.bridge && e.port == h.uplink && e.plain && !e.own
}

// parseStation reads struct ndmsg and attributes of an entry of a bridge's FDB.
func parseStation(body []byte) (e station, ok bool) {
	if len(body) < unix.SizeofNdMsg || body[0] != unix.AF_BRIDGE || body[10]&unix.NTF_SELF != 0 {
		return e, false
	}
	e.port = int32(binary.NativeEndian.Uint32(body[4:]))
	state := binary.NativeEndian.Uint16(body[8:])
	e.own, e.static = state&unix.NUD_PERMANENT != 0, state&(unix.NUD_PERMANENT|unix.NUD_NOARP) != 0
	e.plain = true
	for kind, value := range attributes(body[unix.SizeofNdMsg:]) {
		switch kind {
		case unix.NDA_LLADDR:
			ok = copy(e.mac[:], value) == len(e.mac)
		case unix.NDA_MASTER:
			if len(value) == 4 {
				e.bridge = int32(binary.NativeEndian.Uint32(value))
			}
		case unix.NDA_CACHEINFO:
		case ndaFlagsExt:
			e.plain = e.plain && !slices.ContainsFunc(value, func(b byte) bool { return b != 0 })
		default:
			e.plain = false
		}
	}
	return e, ok && e.bridge != 0
}
