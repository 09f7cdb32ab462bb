package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// Spot is where programs run: on a machine, or in the network of a container.
type Spot struct {
	*Machine
	enter []string
}

// Spot is the machine itself.
func (m *Machine) Spot() Spot { return Spot{Machine: m} }

// Container is the network of a running container. What runs there needs no engine: it goes on when
// the engine ends, as long as the container runs.
func (h *Host) Container(name string) (Spot, error) {
	pid, err := h.Docker("inspect", "-f", "{{.State.Pid}}", name)
	if err != nil {
		return Spot{}, err
	}
	if pid == "0" {
		return Spot{}, fmt.Errorf("container %s of %s does not run", name, h.Name)
	}
	return Spot{h.Machine, []string{"nsenter", "-t", pid, "-n", "--"}}, nil
}

// Run is the machine's.
func (s Spot) Run(args ...string) (string, error) {
	return s.Machine.Run(slices.Concat(s.enter, args)...)
}

// Start is the machine's.
func (s Spot) Start(ready string, args ...string) (*Process, error) {
	return s.Machine.Start(ready, slices.Concat(s.enter, args)...)
}

// Pulse is a numbered datagram of UDP each millisecond from one spot to another, until it is ended.
type Pulse struct{ sender, receiver *Process }

// Pulse starts one to an address ("10.0.0.2:90") of the second spot.
func (l *Lab) Pulse(from, to Spot, address string) (*Pulse, error) {
	probe, err := l.BuildProbe()
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	receiver, err := to.Start("listening", probe, "pulse", "serve", ":"+port)
	if err != nil {
		return nil, err
	}
	sender, err := from.Start("sending", probe, "pulse", "to", address)
	if err != nil {
		return nil, errors.Join(err, receiver.Stop())
	}
	return &Pulse{sender, receiver}, nil
}

// PulseReport is what became of a pulse.
type PulseReport struct {
	Sent, Received int
	Lost           []Loss
	Twice          int           // datagrams that came more than once
	Late           int           // datagrams that came after one with a higher number
	Strange        int           // datagrams at the receiver that are not of this pulse
	Pause          time.Duration // the longest time in which the sender, which may have to wait for a processor, sent nothing
	Gap            time.Duration // the longest time in which nothing arrived
}

// Loss is datagrams one after the other of which none arrived.
type Loss struct {
	First, Last int       // their numbers, from 0
	From, To    time.Time // when the first and the last were sent
	Refused     int       // how many of them the sender's own kernel did not take, as without a route
}

// Count is how many they are.
func (l Loss) Count() int { return l.Last - l.First + 1 }

func (l Loss) String() string {
	return fmt.Sprintf("%d lost (%d to %d, %d of them refused), %s to %s", l.Count(), l.First, l.Last, l.Refused, l.From.Format("15:04:05.000"), l.To.Format("15:04:05.000"))
}

// Span is a time, as of a cut.
type Span struct{ From, To time.Time }

// LostOutside are the losses that are not wholly within one of the spans.
func (r PulseReport) LostOutside(spans ...Span) (out []Loss) {
	for _, l := range r.Lost {
		if !slices.ContainsFunc(spans, func(s Span) bool { return !l.From.Before(s.From) && !l.To.After(s.To) }) {
			out = append(out, l)
		}
	}
	return out
}

// LostIn is how many datagrams were lost that were sent in a span.
func (r PulseReport) LostIn(s Span) (count int) {
	for _, l := range r.Lost {
		if l.To.Before(s.From) || l.From.After(s.To) {
			continue
		}
		if !l.From.Before(s.From) && !l.To.After(s.To) {
			count += l.Count()
			continue
		}
		// Only a part: datagrams of a loss are evenly spaced.
		from, to := s.From, s.To
		if l.From.After(from) {
			from = l.From
		}
		if l.To.Before(to) {
			to = l.To
		}
		count += int(float64(l.Count()) * float64(to.Sub(from)) / float64(max(1, l.To.Sub(l.From))))
	}
	return count
}

// String tells of a pulse in lines.
func (r PulseReport) String() string {
	lines := []string{fmt.Sprintf("%d of %d arrived, %d twice, %d late, %d strange; longest pause of the sender %s, longest gap %s",
		r.Received, r.Sent, r.Twice, r.Late, r.Strange, r.Pause.Round(time.Millisecond), r.Gap.Round(time.Millisecond))}
	for _, l := range r.Lost {
		lines = append(lines, l.String())
	}
	return strings.Join(lines, "\n\t")
}

// transit is how long the last datagrams have to arrive.
const transit = 200 * time.Millisecond

// End ends the pulse and tells what became of it.
func (p *Pulse) End() (PulseReport, error) {
	err := p.sender.Finish(10 * time.Second)
	time.Sleep(transit)
	if err := errors.Join(err, p.receiver.Finish(10*time.Second)); err != nil {
		return PulseReport{}, err
	}
	var sent struct {
		Run    int64
		At     []int64
		Failed []int
	}
	var received struct {
		Run     int64
		Numbers []int
		At      []int64
		Strange int
	}
	if err := errors.Join(p.sender.reported(&sent), p.receiver.reported(&received)); err != nil {
		return PulseReport{}, err
	}
	r := PulseReport{Sent: len(sent.At), Strange: received.Strange}
	start := time.Unix(0, sent.Run)
	if received.Run != 0 && received.Run != sent.Run {
		return r, fmt.Errorf("%s: what arrived is another pulse", p.receiver.what)
	}
	refused := make(map[int]bool, len(sent.Failed))
	for _, n := range sent.Failed {
		refused[n] = true
	}
	arrived := make([]bool, len(sent.At))
	highest, last := -1, int64(0)
	for i, n := range received.Numbers {
		if n < 0 || n >= len(arrived) {
			return r, fmt.Errorf("%s: datagram %d arrived, and was never sent", p.receiver.what, n)
		}
		switch {
		case arrived[n]:
			r.Twice++
		case n < highest:
			r.Late++
		}
		if !arrived[n] {
			r.Received++
		}
		arrived[n], highest = true, max(highest, n)
		r.Gap, last = max(r.Gap, time.Duration(received.At[i]-last)), received.At[i]
	}
	for n := 0; n < len(arrived); n++ {
		if n > 0 {
			r.Pause = max(r.Pause, time.Duration(sent.At[n]-sent.At[n-1]))
		}
		if arrived[n] {
			continue
		}
		at := start.Add(time.Duration(sent.At[n]))
		if n == 0 || arrived[n-1] {
			r.Lost = append(r.Lost, Loss{First: n, From: at})
		}
		l := &r.Lost[len(r.Lost)-1]
		l.Last, l.To = n, at
		if refused[n] {
			l.Refused++
		}
	}
	return r, nil
}

// reported decodes what a program has printed in JSON after it was ready.
func (p *Process) reported(into any) error {
	_, text, ok := strings.Cut(p.Output(), "{")
	if !ok {
		return fmt.Errorf("%s reports nothing: %s", p.what, p.Output())
	}
	if err := json.NewDecoder(strings.NewReader("{" + text)).Decode(into); err != nil {
		return fmt.Errorf("%s: %w", p.what, err)
	}
	return nil
}
