package main

import (
	"errors"
	"fmt"
	"strings"
)

// row is a row of a mode's table: who tries what, and what HNS says of it.
type row struct {
	from, to, rule string
	try            trial
}

// trial tries a row on a host, while something holds for all hosts, if so.
type trial struct {
	on    func(s *side) cell
	holds condition
}

// condition makes something hold on all hosts, until what it returns is called.
type condition func() (end func() error, err error)

// while is the trial under a condition.
func (t trial) while(c condition) trial { return trial{t.on, c} }

// cell is what was tried of a row on a host.
type cell struct {
	command, told string
	err           error
}

// layout of the table, less than 120 columns wide: then come the hosts.
const layout = "  %-24s  %-37s  %-20s"

// table makes a mode's networks, and tries every row on each host.
func (w *world) table(m *mode) error {
	title("Mode " + m.name + ", on each host:")
	if err := w.setUp(m); err != nil {
		return err
	}
	w.say("who reaches whom, as HNS documents it; each tried on %s, over TCP and UDP:", m.names())
	fmt.Printf("\n"+layout, "FROM", "TO", "HNS SAYS")
	for _, s := range m.sides {
		fmt.Print("  " + s.Name)
	}
	fmt.Println()
	for _, r := range m.rows {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		cells, err := m.fill(r)
		if err := errors.Join(err, w.ctx.Err()); err != nil {
			return err
		}
		fmt.Printf(layout, r.from, r.to, r.rule)
		for _, s := range m.sides {
			fmt.Print("  " + w.verdict(cells[s].err) + strings.Repeat(" ", max(0, len(s.Name)-4)))
		}
		fmt.Println()
		first := cells[m.sides[0]]
		fmt.Println("    " + paint(dim, first.command+"  → "+first.told))
		for _, s := range m.sides {
			if err := cells[s].err; err != nil {
				fmt.Printf("    %s: %v\n", paint(red, s.Name), err)
			}
		}
	}
	return nil
}

// fill tries a row on all hosts at once.
func (m *mode) fill(r row) (map[*side]*cell, error) {
	if r.try.holds != nil {
		end, err := r.try.holds()
		if err != nil {
			return nil, err
		}
		defer end() //nolint:errcheck // the rows that follow would tell
	}
	cells := map[*side]*cell{}
	for _, s := range m.sides {
		cells[s] = &cell{}
	}
	return cells, each(m.sides, func(s *side) error {
		*cells[s] = r.try.on(s)
		return nil
	})
}

// verdict gives ok or FAIL, four columns wide, and counts.
func (w *world) verdict(err error) string {
	if err == nil {
		return paint(green, "ok") + "  "
	}
	w.failed++
	return paint(red, "FAIL")
}
