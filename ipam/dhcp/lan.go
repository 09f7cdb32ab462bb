package dhcp

import (
	"errors"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// linger is how long a transport stays open after its last use: for the next container of a group, but not for hours while
// all leases are merely kept.
const linger = 5 * time.Second

// lan shares one transport among all exchanges on a link, and has it open only while there are any.
type lan struct {
	name     string
	protocol protocol
	open     opener
	log      *logrus.Entry

	mu        sync.Mutex
	transport transport // nil: closed
	exchanges map[uint32]*exchange
	idle      *time.Timer
	closed    bool
	readers   sync.WaitGroup
}

// opener opens a transport on a link.
type opener func(link string, t traffic) (transport, error)

func newLAN(name string, p protocol, open opener, log *logrus.Entry) *lan {
	return &lan{name: name, protocol: p, open: open, log: log.WithField("link", name), exchanges: map[uint32]*exchange{}}
}

// ready opens the link if it is not open. The error says what is wrong with the link.
func (l *lan) ready() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.openLocked()
	l.idleLocked()
	return err
}

func (l *lan) openLocked() error {
	if l.idle != nil {
		l.idle.Stop()
		l.idle = nil
	}
	if l.closed {
		return os.ErrClosed
	}
	if l.transport != nil {
		return nil
	}
	t, err := l.open(l.name, l.protocol.answers())
	if err != nil {
		return err
	}
	l.transport = t
	l.readers.Go(func() { l.read(t) })
	return nil
}

// idleLocked closes an unused transport after a while.
func (l *lan) idleLocked() {
	if len(l.exchanges) == 0 && l.transport != nil && l.idle == nil {
		l.idle = time.AfterFunc(linger, l.closeIdle)
	}
}

func (l *lan) closeIdle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.exchanges) == 0 {
		l.closeLocked()
	}
}

func (l *lan) closeLocked() {
	if l.idle != nil {
		l.idle.Stop()
		l.idle = nil
	}
	if l.transport == nil {
		return
	}
	if err := l.transport.Close(); err != nil {
		l.log.WithError(err).Warn("close the link for DHCP")
	}
	l.transport = nil
}

// close closes the transport for good, and waits for its reader.
func (l *lan) close() {
	l.mu.Lock()
	l.closed = true
	l.closeLocked()
	l.mu.Unlock()
	l.readers.Wait()
}

// send puts a frame on the wire. A link that was deleted and made again is opened again.
func (l *lan) send(frame []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.openLocked(); err != nil {
		return err
	}
	err := l.transport.Send(frame)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		l.closeLocked()
		if err = l.openLocked(); err == nil {
			err = l.transport.Send(frame)
		}
	}
	l.idleLocked()
	return err
}

// read hands every answer to its exchange until the transport is closed.
func (l *lan) read(t transport) {
	buffer := make([]byte, maxFrame)
	for {
		n, unsummed, err := t.Receive(buffer)
		switch {
		case err == nil:
			l.protocol.heard(l, buffer[:n], unsummed)
		case errors.Is(err, unix.ENETDOWN): // said once when the link goes down; it can come back
		default:
			if !errors.Is(err, os.ErrClosed) {
				l.log.WithError(err).Warn("listen to DHCP servers; the link is opened again with the next message")
			}
			l.forget(t)
			return
		}
	}
}

// forget closes a transport that is of no use any more.
func (l *lan) forget(t transport) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.transport == t {
		l.closeLocked()
	}
}

// exchange finds the exchange of a client by its number.
func (l *lan) exchange(id uint32) *exchange {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.exchanges[id]
}

// hear hands an answer to its exchange.
func (x *exchange) hear(r received) {
	select {
	case x.answers <- r:
	default: // nobody has that many servers: it is a flood
	}
}

// clients are those of the exchanges.
func (l *lan) clients() []MAC {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []MAC
	for _, x := range l.exchanges {
		all = append(all, x.client)
	}
	return all
}
