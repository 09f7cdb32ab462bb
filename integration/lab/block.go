package lab

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Block drops every frame that the segment carries from one machine to another, until the rule is
// removed; the other way stays open. A machine that is plugged in anew is not blocked any more.
func (n *LAN) Block(from, to *Machine) (*Rule, error) {
	in, out := n.portsOf(from), n.portsOf(to)
	if len(in) == 0 || len(out) == 0 {
		return nil, fmt.Errorf("block %s to %s: not both are plugged into %s", from.Name, to.Name, n.Name)
	}
	n.mu.Lock()
	n.rules++
	rule := &Rule{n.Machine, "bridge", "block" + strconv.Itoa(n.rules)}
	n.mu.Unlock()
	return rule, rule.add(fmt.Sprintf("iifname { %s } oifname { %s }", strings.Join(in, ", "), strings.Join(out, ", ")))
}

func (n *LAN) portsOf(m *Machine) (ports []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for plug, port := range n.ports {
		if strings.HasPrefix(plug, m.Name+" ") {
			ports = append(ports, port)
		}
	}
	return ports
}

// Partition is a segment whose groups of machines do not reach each other.
type Partition []*Rule

// Part blocks both ways between groups of machines, until the partition is healed. A machine that is
// in no group reaches all.
func (n *LAN) Part(groups ...[]*Machine) (Partition, error) {
	var p Partition
	for i, group := range groups {
		for j, other := range groups {
			if i == j {
				continue
			}
			for _, from := range group {
				for _, to := range other {
					rule, err := n.Block(from, to)
					if err != nil {
						return p, errors.Join(err, p.Heal())
					}
					p = append(p, rule)
				}
			}
		}
	}
	return p, nil
}

// Dropped is the number of frames that the partition has dropped.
func (p Partition) Dropped() (int, error) {
	all := 0
	for _, rule := range p {
		n, err := rule.Dropped()
		if err != nil {
			return 0, err
		}
		all += n
	}
	return all, nil
}

// Heal ends the partition.
func (p Partition) Heal() error {
	var err error
	for _, rule := range p {
		err = errors.Join(err, rule.Remove())
	}
	return err
}
