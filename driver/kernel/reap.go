package kernel

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// Deleting a link takes the kernel 16 to 32 ms, because it waits for every CPU to let go of it.
// Many links deleted together wait once. So a link that is to go is put into a link group, which
// takes microseconds, and a goroutine deletes the group.

// doom puts a link into the group of those to be deleted.
func (k *Kernel) doom(ctx context.Context, name string) error {
	l, err := k.mine(ctx, name)
	if err != nil || l == nil {
		return err
	}
	_, err = k.route.request(ctx, l.toGroup(doomedGroup))
	if isGone(err) {
		return nil
	}
	k.reaper.wake()
	return err
}

// reap deletes the links that are doomed.
func (k *Kernel) reap(ctx context.Context) error {
	k.reaping.Lock()
	defer k.reaping.Unlock()
	dying, alone, err := k.condemn(ctx)
	if err != nil || len(dying) == 0 {
		return err
	}
	if alone {
		_, err := k.slow.request(ctx, message{kind: unix.RTM_DELLINK, flags: unix.NLM_F_ACK,
			body: linkBody(0, 0, 0, attrs{}.u32(unix.IFLA_GROUP, dyingGroup))})
		if isGone(err) {
			return nil
		}
		return err
	}
	for _, l := range dying {
		_, err := k.slow.request(ctx, message{kind: unix.RTM_DELLINK, flags: unix.NLM_F_ACK, body: linkBody(l.index, 0, 0, nil)})
		if err != nil && !isGone(err) {
			return fmt.Errorf("delete link %s: %w", l.name, err)
		}
	}
	return nil
}

// condemn moves what is doomed, and ours, into the group that is deleted, and reports whether it is
// alone there.
func (k *Kernel) condemn(ctx context.Context) (dying []*link, alone bool, err error) {
	all, err := k.listLinks(ctx)
	if err != nil {
		return nil, false, err
	}
	alone = true
	unfinished := map[int32]time.Time{}
	for _, l := range all {
		if isSwitch(l.name) && l.leaving() {
			holds, err := k.holdsHost(ctx, l)
			if err != nil {
				return nil, false, err
			}
			if holds { // somebody else has put it into the group
				alone = alone && l.group != dyingGroup
				k.log.WithField("link", l.name).Warn("this switch is to be deleted and holds addresses or an uplink of the host: leaving it alone")
				continue
			}
		}
		switch {
		case l.doomed(), l.unfinished() && l.group == dyingGroup:
			dying = append(dying, l)
		case l.group == dyingGroup:
			alone = false
			k.log.WithField("link", l.name).Warnf("link group %d is dockway's for links that are deleted, and this link is not dockway's: deleting one by one", dyingGroup)
		case l.unfinished():
			// Just being made, or left so by a process that died: time will tell.
			since, known := k.unfinished[l.index]
			if known && time.Since(since) >= finishTime {
				dying = append(dying, l)
				break
			}
			if !known {
				since = time.Now()
			}
			unfinished[l.index] = since
		}
	}
	k.unfinished = unfinished
	if len(unfinished) > 0 {
		time.AfterFunc(finishTime, k.reaper.wake)
	}
	for rest := dying; len(rest) > 0; rest = rest[min(len(rest), lookUps):] {
		var moves []message
		for _, l := range rest[:min(len(rest), lookUps)] {
			moves = append(moves, l.toGroup(dyingGroup))
		}
		replies, err := k.slow.exchange(ctx, moves...)
		if err != nil {
			return nil, false, err
		}
		for _, r := range replies {
			if r.err != nil && !isGone(r.err) {
				return nil, false, r.err
			}
		}
	}
	return dying, alone, nil
}

// Flush carries out now what is otherwise done behind the answers: it deletes the links that Do
// has removed, in namespaces of ours too, and forgets connections to ports that are no longer
// published.
func (k *Kernel) Flush(ctx context.Context) error {
	children, leave := k.all()
	defer leave()
	var err error
	for _, child := range children {
		err = errors.Join(err, child.reap(ctx))
	}
	return errors.Join(err, k.reap(ctx), k.forgetFlows(ctx))
}

// A worker does something in the background, as often as needed and no more often. It holds one
// token when there is something to do.
type worker chan struct{}

const (
	gatherTime = 50 * time.Millisecond // what is asked for within it is done together
	retryTime  = time.Second
	finishTime = time.Second // making a link takes less than a thousandth of it
)

// startWorker calls do once for each wake, or for several that come together, and again when it
// failed.
func (k *Kernel) startWorker(what string, do func(context.Context) error) worker {
	w := make(worker, 1)
	k.running.Go(func() {
		for {
			select {
			case <-k.life.Done():
				return
			case <-w:
			}
			pause(k.life, gatherTime)
			select {
			case <-w:
			default:
			}
			if err := do(k.life); err != nil && k.life.Err() == nil {
				k.log.WithError(err).Warnf("cannot %s; trying again", what)
				pause(k.life, retryTime)
				w.wake()
			}
		}
	})
	return w
}

func (w worker) wake() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// pause waits, or until the context ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// deleteObject removes an object of ours; one that is not there is fine.
func (k *Kernel) deleteObject(ctx context.Context, o plan.Object) error {
	switch o := o.(type) {
	case plan.Namespace:
		return k.deleteNamespace(ctx, o)
	case plan.Bridge:
		return k.doom(ctx, o.Name)
	case plan.VXLAN:
		return k.doom(ctx, o.Name)
	case plan.Transit:
		return k.doom(ctx, o.Name)
	case plan.Shortcut:
		return k.deleteShortcut(ctx, o)
	case plan.Switch:
		return k.deleteSwitch(ctx, o)
	case plan.Veth:
		return k.doom(ctx, o.Name)
	case plan.VLAN:
		return k.deleteVLAN(ctx, o)
	case plan.Macvlan:
		return k.doom(ctx, o.Name)
	case plan.Address:
		return k.deleteAddress(ctx, o)
	case plan.Route:
		return k.deleteRoute(ctx, o)
	case plan.Sysctl:
		return nil // goes with its link, or stays
	case plan.Admit:
		return k.deleteAdmit(ctx, o)
	case plan.HostPort:
		return k.sockets.Release(o)
	}
	return fmt.Errorf("cannot delete a %T", o)
}
