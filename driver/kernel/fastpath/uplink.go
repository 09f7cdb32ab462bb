package fastpath

import (
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// MaxStations is how many MACs behind an uplink there is room for: a LAN can have, or make up, any number,
// and containers' own must find theirs.
const MaxStations = maxMACs - 1<<12

// AttachUplink gives the uplink of an external switch its fast path to containers, and containers' ports
// theirs to whom Hear has put behind it, while Trust says so.
func (p *Path) AttachUplink(device string) error {
	return p.do("uplink "+device, func() error {
		bridge, err := netlink.LinkByName(p.bridge)
		if err != nil {
			return err
		}
		l, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		if l.Attrs().MasterIndex != bridge.Attrs().Index {
			return fmt.Errorf("%s is no port of the bridge", device)
		}
		index := uint32(l.Attrs().Index)
		if err := p.sweep(func(_ plan.MAC, e entry) bool { return e.reach&reachRemote == 0 || e.link == index }); err != nil {
			return err
		}
		p.uplink = index
		return p.install(int(index), p.design.remote)
	})
}

// hearTime is how long frames of one behind the uplink go past the bridge before it has one again. A bridge
// forgets whom it has not heard for some time, 300 s unless set, and then sends what is for them to all its ports.
const hearTime = 20 * time.Second

// Hear says that MACs are behind the uplink, which has to be attached, and that the bridge has just heard
// them. Containers' own stay theirs.
func (p *Path) Hear(macs ...plan.MAC) error {
	now, err := monotonic()
	if err != nil {
		return err
	}
	return p.onTable(macs, func(mac plan.MAC, e entry, there bool) error {
		switch {
		case p.uplink == 0:
			return errors.New("no uplink is attached")
		case there && (e.reach&reachRemote == 0 || e.link == p.uplink):
			return nil
		}
		return put(p.table, mac, entry{link: p.uplink, reach: reach4 | reach6 | reachRemote, heard: now})
	})
}

// Forget says that MACs are not behind the uplink, or not any more.
func (p *Path) Forget(macs ...plan.MAC) error {
	return p.onTable(macs, func(mac plan.MAC, e entry, there bool) error {
		if !there || e.reach&reachRemote == 0 {
			return nil
		}
		return remove(p.table, mac)
	})
}

// Behind tells by which link, by index, a container's MAC is reached, if it is attached.
func (p *Path) Behind(mac plan.MAC) (link int32, there bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, there, err := get(p.table, mac)
	return int32(e.link), there && e.reach&reachRemote == 0, err
}

// onTable calls f with what is known of each MAC.
func (p *Path) onTable(macs []plan.MAC, f func(plan.MAC, entry, bool) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, mac := range macs {
		e, there, err := get(p.table, mac)
		if err == nil {
			err = f(mac, e, there)
		}
		if err != nil {
			return fmt.Errorf("fast path of bridge %s: MAC %s: %w", p.bridge, mac, err)
		}
	}
	return nil
}

// Trust says that for a while from now, what Hear and Forget have said is so. Who does not know any more
// says so by a while of 0; who does not say it again lets it end: all between containers and the uplink
// goes by the bridge then.
func (p *Path) Trust(while time.Duration) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var until uint64
	if while > 0 {
		now, err := monotonic()
		if err != nil {
			return err
		}
		until = now + uint64(while.Nanoseconds())
	}
	if err := p.lease.Put(uint32(0), until); err != nil {
		return fmt.Errorf("fast path of bridge %s: %w", p.bridge, err)
	}
	return nil
}

// monotonic is the time that programs read, in nanoseconds.
func monotonic() (uint64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0, err
	}
	return uint64(now.Nano()), nil
}
