package kernel

import "errors"

var errDied = errors.New("the process died")

// BeforeChange has something happen before the next write of changes of switches.
func (k *Kernel) BeforeChange(happens func()) {
	k.interrupt = func(wanted int) (int, error) {
		k.interrupt = nil
		happens()
		return wanted, nil
	}
}

// DieAfter lets n more writes of changes of switches be carried out, or n more changes, and none after
// that, as if the process had been killed there. What it returns tells whether it came to that.
func (k *Kernel) DieAfter(n int, writes bool) (died func() bool) {
	dead := false
	k.interrupt = func(wanted int) (int, error) {
		switch {
		case writes && n > 0:
			n--
			return wanted, nil
		case wanted <= n:
			n -= wanted
			return wanted, nil
		}
		left := n
		n, dead = 0, true
		return left, errDied
	}
	return func() bool { return dead }
}
