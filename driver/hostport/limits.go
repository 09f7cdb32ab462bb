package hostport

import (
	"fmt"
	"math"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// limits bounds what relays may take.
type limits struct {
	relays int              // TCP connections and UDP flows of all ports
	flows  int              // UDP flows of one port
	idle   time.Duration    // after which a UDP flow is forgotten
	dial   time.Duration    // for a container to take a connection
	rearm  time.Duration    // before a listener that lacked a file descriptor tries again
	now    func() time.Time // a clock that does not go back
}

// limitsFor gives the limits of a process that may open so many files. A relayed connection takes
// two descriptors, so a quarter of them at most; splice(2) takes four more while there are any left.
//
// A UDP flow lives as long as conntrack gives one that was answered
// (net.netfilter.nf_conntrack_udp_timeout_stream), which is also the least that RFC 4787 (REQ-5)
// allows: a published port forgets its clients after the same time, relayed or translated.
func limitsFor(files int) limits {
	return limits{
		relays: min(files/8, 16384),
		flows:  1024,
		idle:   120 * time.Second,
		dial:   10 * time.Second,
		rearm:  time.Second,
		now:    time.Now,
	}
}

// raiseFileLimit raises the soft limit of open files to the hard one (getrlimit(2)) and returns
// what is allowed.
func raiseFileLimit() (int, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 1024, fmt.Errorf("read RLIMIT_NOFILE: %w", err)
	}
	var err error
	if r.Cur < r.Max {
		raised := unix.Rlimit{Cur: r.Max, Max: r.Max}
		if err = unix.Setrlimit(unix.RLIMIT_NOFILE, &raised); err == nil {
			r = raised
		} else {
			err = fmt.Errorf("raise RLIMIT_NOFILE from %d to %d: %w", r.Cur, r.Max, err)
		}
	}
	return int(min(r.Cur, math.MaxInt32)), err
}

// fileLimit is how many files the process may open now.
func fileLimit() uint64 {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0
	}
	return r.Cur
}

// seldom keeps a message that clients can provoke from filling the log: one in ten seconds, with
// the number of those left out.
type seldom struct {
	next time.Time
	more int
}

func (s *seldom) warn(now time.Time, log *logrus.Entry, format string, args ...any) {
	if now.Before(s.next) {
		s.more++
		return
	}
	s.next = now.Add(10 * time.Second)
	if s.more > 0 {
		log = log.WithField("more", s.more)
		s.more = 0
	}
	log.Warnf(format, args...)
}
