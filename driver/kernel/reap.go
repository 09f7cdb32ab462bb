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
	_, err = k.route.request(ctx, message{kind: unix.RTM_NEWLINK, flags: unix.NLM_F_ACK,
		body: linkBody(l.index, 0, 0, attrs{}.u32(unix.IFLA_GROUP, doomedGroup))})
	if isGone(err) {
		return nil
	}
	k.reaper.wake()
	return err
}

// reap deletes the links that are doomed.
func (k *Kernel) reap(ctx context.Context) error {
	k.born.Lock()
	defer k.born.Unlock()
	all, err := k.listLinks(ctx)
	if err != nil {
		return err
	}
	var doomed []*link
	foreign := ""
	for _, l := range all {
		switch {
		case l.group != doomedGroup:
		case l.doomed():
			doomed = append(doomed, l)
		default:
			foreign = l.name
		}
	}
	if len(doomed) == 0 {
		return nil
	}
	if foreign == "" {
		_, err := k.slow.request(ctx, message{kind: unix.RTM_DELLINK, flags: unix.NLM_F_ACK,
			body: linkBody(0, 0, 0, attrs{}.u32(unix.IFLA_GROUP, doomedGroup))})
		if isGone(err) {
			return nil
		}
		return err
	}
	k.log.WithField("link", foreign).Warnf("link group %d is dockway's for links to be deleted, and this link is not dockway's: deleting one by one", doomedGroup)
	for _, l := range doomed {
		_, err := k.slow.request(ctx, message{kind: unix.RTM_DELLINK, flags: unix.NLM_F_ACK, body: linkBody(l.index, 0, 0, nil)})
		if err != nil && !isGone(err) {
			return fmt.Errorf("delete link %s: %w", l.name, err)
		}
	}
	return nil
}

// Flush carries out now what is otherwise done behind the answers: it deletes the links that Do
// has removed and forgets connections to ports that are no longer published.
func (k *Kernel) Flush(ctx context.Context) error {
	return errors.Join(k.reap(ctx), k.forgetFlows(ctx))
}

// A worker does something in the background, as often as needed and no more often. It holds one
// token when there is something to do.
type worker chan struct{}

const (
	gatherTime = 50 * time.Millisecond // what is asked for within it is done together
	retryTime  = time.Second
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
	case plan.Bridge:
		return k.doom(ctx, o.Name)
	case plan.Veth:
		return k.doom(ctx, o.Name)
	case plan.Address:
		return k.deleteAddress(ctx, o)
	case plan.Sysctl:
		return nil // goes with its link, or stays
	case plan.Admit:
		return k.deleteAdmit(ctx, o)
	case plan.HostPort:
		return k.sockets.Release(o)
	}
	return fmt.Errorf("cannot delete a %T", o)
}
