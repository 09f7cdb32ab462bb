package plugin

import "sync"

// calls counts the calls under way, so that a shutdown can wait for the last of them.
type calls struct {
	mu       sync.Mutex
	count    int
	stopping bool
	done     chan struct{} // closed when stopping and none is left: no call begins any more
}

func newCalls() *calls { return &calls{done: make(chan struct{})} }

// begin counts a call; false says that it is too late for one.
func (c *calls) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping && c.count == 0 {
		return false
	}
	c.count++
	return true
}

func (c *calls) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count--
	if c.stopping && c.count == 0 {
		close(c.done)
	}
}

// drained stops the counting and is closed when the last call has ended.
func (c *calls) drained() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stopping {
		c.stopping = true
		if c.count == 0 {
			close(c.done)
		}
	}
	return c.done
}
