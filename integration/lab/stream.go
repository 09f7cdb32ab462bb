package lab

import (
	"errors"
	"fmt"
	"net"
	"time"
)

// Stream is a TCP connection between two machines on which numbered bytes go both ways, some
// 800 kB a second, until it is ended.
type Stream struct{ client, server *Process }

// StreamReport is what became of a stream: that it was not Whole, if so, is the error of End.
type StreamReport struct {
	There, Back int64         // bytes that arrived at the server and at the client
	Longest     time.Duration // the longest time that nothing arrived, at either side; at rest it is some 5 ms
}

// Stream opens a connection from one machine to an address ("198.18.0.100:90") of another. Give it
// before what may break it.
func (l *Lab) Stream(from, to *Machine, address string) (*Stream, error) {
	probe, err := l.BuildProbe()
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	server, err := to.Start("listening", probe, "-timeout", "10s", "stream", "serve", ":"+port)
	if err != nil {
		return nil, err
	}
	client, err := from.Start("streaming", probe, "-timeout", "10s", "stream", "to", address)
	if err != nil {
		return nil, errors.Join(err, server.Stop())
	}
	return &Stream{client, server}, nil
}

// End ends the stream and tells what became of it. It is an error if a byte was lost or came twice,
// if the connection was reset, or if it does not carry any more: what was sent has 10 seconds to
// arrive.
func (s *Stream) End() (StreamReport, error) {
	ended := make(chan error)
	for _, side := range []*Process{s.client, s.server} {
		go func() { ended <- side.Finish(15 * time.Second) }()
	}
	err := errors.Join(<-ended, <-ended)
	client, err1 := said(s.client)
	server, err2 := said(s.server)
	if err = errors.Join(err, err1, err2); err != nil {
		return StreamReport{}, err
	}
	if client.Sent != server.Received || server.Sent != client.Received {
		err = fmt.Errorf("%d of %d bytes arrived there, %d of %d back", server.Received, client.Sent, client.Received, server.Sent)
	}
	return StreamReport{server.Received, client.Received, max(client.Longest, server.Longest)}, err
}

// said is what one side reports: see probe.
func said(p *Process) (r struct {
	Sent     int64         `json:"sent"`
	Received int64         `json:"received"`
	Longest  time.Duration `json:"longest_gap"`
}, err error) {
	err = p.reported(&r)
	return r, err
}
