package fastpath

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// An attached program is one of ours at a link.
type attached struct {
	*ebpf.Program
	name string
	maps []ebpf.MapID
}

// ours are our programs at a link. The caller closes them.
func (p *Path) ours(index int) ([]attached, error) {
	ids, err := p.hook.programs(index)
	if err != nil {
		return nil, fmt.Errorf("list programs: %w", err)
	}
	var out []attached
	for _, id := range ids {
		program, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, unix.ENOENT) {
			continue // gone since
		}
		if err != nil {
			closeAll(out)
			return nil, fmt.Errorf("open program %d: %w", id, err)
		}
		a := attached{Program: program}
		if info, err := program.Info(); err == nil {
			a.name = info.Name
			a.maps, _ = info.MapIDs()
		}
		if !strings.HasPrefix(a.name, namePrefix) {
			_ = program.Close()
			continue
		}
		out = append(out, a)
	}
	return out, nil
}

func closeAll(programs []attached) {
	for _, a := range programs {
		_ = a.Close()
	}
}

// reads reports whether a program reads our tables, and no others.
func (p *Path) reads(a attached) bool {
	foreign := func(id ebpf.MapID) bool { return !slices.Contains(p.maps, id) }
	return len(a.maps) == len(p.maps) && !slices.ContainsFunc(a.maps, foreign)
}

// running is the name of our program at a link, if it reads our tables; another, if it does not.
func (p *Path) running(index int) (string, error) {
	all, err := p.ours(index)
	defer closeAll(all)
	switch {
	case err != nil || len(all) == 0:
		return "", err
	case len(all) > 1 || !p.reads(all[0]):
		return "another", nil
	}
	return all[0].name, nil
}

// install has a link run a program, in place of all others of ours; one that does is left alone.
func (p *Path) install(index int, name string) error {
	old, err := p.ours(index)
	if err != nil {
		return err
	}
	defer closeAll(old)
	if len(old) == 1 && old[0].name == name && p.reads(old[0]) {
		return nil
	}
	var replaced *ebpf.Program
	if len(old) > 0 {
		replaced = old[0].Program
		if err := p.remove(index, old[1:]); err != nil {
			return err
		}
	}
	if err := p.hook.attach(index, p.programs[name], replaced); err != nil {
		return fmt.Errorf("attach program %s: %w", name, err)
	}
	return nil
}

// remove takes programs of ours away; those that are gone are fine.
func (p *Path) remove(index int, old []attached) error {
	for _, a := range old {
		if err := p.hook.detach(index, a.Program); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("detach program %s: %w", a.name, err)
		}
	}
	return nil
}
