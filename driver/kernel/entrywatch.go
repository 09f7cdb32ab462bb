package kernel

import (
	"context"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/dockway/dockway/driver/plan"
)

// hearers are the sockets at which a Watch reads events.
type hearers struct {
	sync.Mutex
	files map[*os.File]bool
}

func (h *hearers) add(file *os.File) {
	h.Lock()
	defer h.Unlock()
	if h.files == nil {
		h.files = map[*os.File]bool{}
	}
	h.files[file] = true
}

func (h *hearers) remove(file *os.File) {
	h.Lock()
	defer h.Unlock()
	delete(h.files, file)
}

// follow waits until the hearers have read most of what has happened: changes by the thousand would
// be more than a socket holds, and what it cannot hold is lost.
func (h *hearers) follow(ctx context.Context) {
	h.Lock()
	files := slices.Collect(maps.Keys(h.files))
	h.Unlock()
	for _, file := range files {
		for range followTime / followPause {
			n, err := backlog(file)
			if err != nil || n < bufferSize/2 || ctx.Err() != nil {
				break
			}
			pause(ctx, followPause)
		}
	}
}

const (
	followPause = 200 * time.Microsecond
	followTime  = 100 * time.Millisecond // a hearer that takes longer loses what it has not read, and looks at everything
)

// mapped takes note of operations on entries.
func (b *beliefs) mapped(list []mapping) {
	b.Lock()
	defer b.Unlock()
	b.clock++
	if b.entries == nil {
		b.entries = entries{}
	}
	for _, m := range list {
		if m.Verb == plan.Delete {
			b.entries.remove(m.link.index, m.key)
			continue
		}
		m.value.since = b.clock
		b.entries.put(m.link, m.key, m.value)
	}
}

// explains reports whether what the kernel says of an entry is as it should be.
func (b *beliefs) explains(h half, deleted bool) bool {
	b.Lock()
	value, believed := b.entries.get(h.link, h.key)
	b.Unlock()
	switch {
	case deleted, !h.static():
		return !believed
	case h.key.address.IsValid():
		return believed && h.value.mac == value.mac
	case h.self:
		return believed && h.plain && h.value.vtep == value.vtep
	}
	return believed
}

// entriesHold reports whether entries are as believed. As with holds, only if they are not it waits
// for operations under way.
func (k *Kernel) entriesHold(ctx context.Context, list map[entryAt]bool) bool {
	if len(list) == 0 || k.compareEntries(ctx, list) {
		return true
	}
	k.doing.Lock()
	defer k.doing.Unlock()
	return k.compareEntries(ctx, list)
}

func (k *Kernel) compareEntries(ctx context.Context, list map[entryAt]bool) bool {
	held, err := k.heldEntries(ctx, list)
	if err != nil {
		return false
	}
	b := &k.believed
	b.Lock()
	defer b.Unlock()
	for at := range list {
		value, there := held.get(at.link, at.key)
		should, believed := b.entries.get(at.link, at.key)
		should.since = 0
		if there != believed || value != should {
			return false
		}
	}
	return true
}

// heldEntries looks entries of ours up.
func (k *Kernel) heldEntries(ctx context.Context, list map[entryAt]bool) (entries, error) {
	var indices []int32
	for at := range list {
		indices = append(indices, at.link)
	}
	links, err := k.linksByIndex(ctx, nonZero(indices)...)
	if err != nil {
		return nil, err
	}
	byIndex := map[int32]*link{}
	for _, l := range links {
		if l != nil {
			byIndex[l.index] = l
		}
	}
	var wanted []lookup
	for at := range list {
		if l := byIndex[at.link]; l != nil && k.maps(l, at.key) {
			wanted = append(wanted, lookup{l, at.key})
		}
	}
	found, err := k.lookUpEntries(ctx, wanted)
	if err != nil {
		return nil, err
	}
	held := entries{}
	for i, f := range found {
		if value, ok := f.entry(); ok {
			held.put(wanted[i].link, wanted[i].key, value)
		}
	}
	return held, nil
}
