package kernel

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/driver/plan"
)

// children are the Kernels of the network namespaces of ours, each opened when it is first needed.
type children struct {
	sync.Mutex
	byName  map[string]*Kernel
	closed  bool
	watches map[*watcher]context.Context
}

// enter gives the Kernel of a namespace of ours, until leave is called: nil when there is none. One
// that somebody has put another namespace in the place of is opened anew.
func (k *Kernel) enter(name string) (child *Kernel, leave func(), err error) {
	k.children.Lock()
	defer k.children.Unlock()
	inode, err := k.pins.find(name)
	if err != nil {
		return nil, nil, err
	}
	child = k.children.byName[name]
	if child != nil && child.inode != inode {
		k.dismiss(name)
		child = nil
	}
	if inode == 0 {
		return nil, nil, nil
	}
	if child == nil {
		if child, err = k.openChild(name); err != nil {
			return nil, nil, err
		}
	}
	child.inUse.RLock()
	return child, child.inUse.RUnlock, nil
}

// all gives the Kernels of the namespaces that are open, until leave is called.
func (k *Kernel) all() (open map[string]*Kernel, leave func()) {
	k.children.Lock()
	defer k.children.Unlock()
	open = maps.Clone(k.children.byName)
	for _, child := range open {
		child.inUse.RLock()
	}
	return open, func() {
		for _, child := range open {
			child.inUse.RUnlock()
		}
	}
}

// openAll opens all namespaces of ours.
func (k *Kernel) openAll() error {
	names, err := k.pins.list()
	if err != nil {
		return err
	}
	for _, name := range names {
		_, leave, err := k.enter(name)
		if err != nil {
			return err
		}
		if leave != nil {
			leave()
		}
	}
	return nil
}

// openChild opens a namespace. Its sockets are opened when they are needed: there may be many.
func (k *Kernel) openChild(name string) (*Kernel, error) {
	if k.children.closed {
		return nil, os.ErrClosed
	}
	file, err := k.pins.open(name)
	if err != nil {
		return nil, err
	}
	var s unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &s); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	nsid, err := k.numberOf(k.life, file)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	child := &Kernel{
		parent: k, name: name, namespace: file, inode: s.Ino, nsid: nsid,
		rules: k.rulesWithin, procSys: k.procSys, ipv6: k.ipv6,
		log: k.log.WithField("namespace", name), buffers: k.buffers,
	}
	child.start()
	if k.children.byName == nil {
		k.children.byName = map[string]*Kernel{}
	}
	k.children.byName[name] = child
	for w, ctx := range k.children.watches {
		if err := child.watchFor(ctx, w); err != nil {
			k.dismiss(name)
			return nil, err
		}
	}
	return child, nil
}

// dismiss closes the Kernel of a namespace, in the background: it may be in use.
func (k *Kernel) dismiss(name string) {
	child := k.children.byName[name]
	if child == nil {
		return
	}
	delete(k.children.byName, name)
	child.end()
	k.running.Go(func() {
		if err := child.Close(); err != nil {
			k.log.WithError(err).Warnf("cannot close network namespace %s", name)
		}
	})
}

// closeChildren closes the Kernels of all namespaces; none is opened any more.
func (k *Kernel) closeChildren() error {
	k.children.Lock()
	k.children.closed = true
	all := k.children.byName
	k.children.byName = nil
	k.children.Unlock()
	var err error
	for _, child := range all {
		err = errors.Join(err, child.Close())
	}
	return err
}

// putNamespace makes a namespace of ours.
func (k *Kernel) putNamespace(n plan.Namespace) error {
	k.children.Lock()
	defer k.children.Unlock()
	return k.pins.make(n.Name)
}

// deleteNamespace lets a namespace of ours go, and the kernel destroys what is in it, in the
// background, which on a busy machine takes seconds. VXLAN devices are deleted before: their identifiers are the
// host's, and may be wanted again at once.
func (k *Kernel) deleteNamespace(ctx context.Context, n plan.Namespace) error {
	if child, leave, err := k.enter(n.Name); err == nil && child != nil {
		if err := child.deleteTunnels(ctx); err != nil {
			k.log.WithError(err).Warnf("VXLAN devices of network namespace %s go with it", n.Name)
		}
		leave()
	}
	k.children.Lock()
	defer k.children.Unlock()
	err := k.pins.remove(n.Name)
	if err == nil {
		k.dismiss(n.Name)
	}
	return err
}

// deleteTunnels deletes all VXLAN devices of a namespace of ours.
func (k *Kernel) deleteTunnels(ctx context.Context) error {
	all, err := k.listLinks(ctx)
	if err != nil {
		return err
	}
	for _, l := range all {
		if l.kind != kindVXLAN {
			continue
		}
		if _, err := k.route.request(ctx, deleteLink(l.name)); err != nil && !isGone(err) {
			return err
		}
	}
	return nil
}

func (k *Kernel) observeNamespace(name string, out plan.State) error {
	if k.pins.dir == "" {
		return nil
	}
	inode, err := k.pins.find(name)
	if inode != 0 {
		out.Add(plan.Namespace{Name: name})
	}
	return err
}

// observeWithin looks up what keys name in a namespace: nothing, when that is not there.
func (k *Kernel) observeWithin(ctx context.Context, name string, keys []plan.Key, out plan.State) error {
	return k.observeIn(name, out, func(child *Kernel) (plan.State, error) { return child.Observe(ctx, keys) })
}

// observeAllWithin lists the namespaces of ours, and what is in them.
func (k *Kernel) observeAllWithin(ctx context.Context, also []plan.Key, out plan.State) error {
	names, err := k.pins.list()
	if err != nil {
		return err
	}
	keys := map[string][]plan.Key{}
	for _, key := range also {
		if name := key.Namespace; name != "" {
			key.Namespace = ""
			keys[name] = append(keys[name], key)
		}
	}
	for _, name := range names {
		out.Add(plan.Namespace{Name: name})
		err := k.observeIn(name, out, func(child *Kernel) (plan.State, error) { return child.ObserveAll(ctx, keys[name]) })
		if err != nil {
			return err
		}
	}
	return nil
}

func (k *Kernel) observeIn(name string, out plan.State, observe func(*Kernel) (plan.State, error)) error {
	if k.pins.dir == "" {
		return nil
	}
	child, leave, err := k.enter(name)
	if err != nil || child == nil {
		return err
	}
	defer leave()
	found, err := observe(child)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	for _, o := range found {
		out.Add(plan.Within{Namespace: name, Object: o})
	}
	return nil
}

// doWithin carries out operations on objects in a namespace.
func (k *Kernel) doWithin(ctx context.Context, name string, ops []plan.Op) error {
	child, leave, err := k.enter(name)
	if err != nil {
		return err
	}
	if child != nil {
		defer leave()
		return child.Do(ctx, ops)
	}
	for _, op := range ops {
		if op.Verb != plan.Delete {
			return fmt.Errorf("%s: %w: it has to be made before what is in it", op, unix.ENOENT)
		}
	}
	return nil // went with it
}

// unwrap splits an operation into the namespace that it is about, empty for the Kernel's own, and
// what to do there.
func unwrap(op plan.Op) (name string, inner plan.Op) {
	w, ok := op.Object.(plan.Within)
	if !ok {
		return "", op
	}
	op.Object = w.Object
	if old, ok := op.Old.(plan.Within); ok {
		op.Old = old.Object
	}
	return w.Namespace, op
}
