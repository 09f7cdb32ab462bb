package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"github.com/docker/go-plugins-helpers/sdk"
	"github.com/sirupsen/logrus"
)

// maxBody is the most bytes that a request may have. The engine needs about 105 for each port
// that a container publishes, and a container can publish every TCP and UDP port.
const maxBody = 16 << 20

// grace is how long a call that has reached its limit may take to say so itself.
const grace = time.Second

// result is what came of a call.
type result struct {
	about string // what the call was about, for the log
	reply any
	err   error
	late  bool // the call has not ended
}

// badRequest is an error that the same request will meet again.
type badRequest struct{ error }

func (e badRequest) Unwrap() error { return e.error }

// done is the answer that says no more than that it worked.
type done struct{}

// call answers one of the engine's calls: decode makes the body a typed request, do carries it out.
func call[R fmt.Stringer](s *Server, name string, decode func([]byte) (R, error), do func(context.Context, R) (any, error)) {
	s.handle(name, http.MethodPost, func(ctx context.Context, body []byte) result {
		req, err := decode(body)
		if err != nil {
			return result{about: req.String(), err: badRequest{err}}
		}
		reply, err := do(ctx, req)
		return result{about: req.String(), reply: reply, err: err}
	})
}

// tell answers a call that has nothing to say, or whose body does not matter.
func tell(s *Server, name, method string, reply func() any) {
	s.handle(name, method, func(context.Context, []byte) result { return result{reply: reply()} })
}

// handle adds a route. However the answer comes about, the client gets one: errors and panics as
// {"Err": …}, and after the time limit an error although the work may go on.
func (s *Server) handle(name, method string, answer func(context.Context, []byte) result) {
	s.handler.HandleFunc("/"+name, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != method {
			w.Header().Set("Allow", method)
			s.refuse(w, http.StatusMethodNotAllowed, fmt.Errorf("%s is asked with %s, not %.20q", name, method, r.Method))
			return
		}
		if !s.calls.begin() {
			s.refuse(w, http.StatusServiceUnavailable, errors.New("dockway is shutting down: try again when it is back"))
			return
		}
		defer s.calls.end()
		start := time.Now()
		var once sync.Once
		respond := func(res result) { once.Do(func() { s.respond(w, name, res, time.Since(start)) }) }
		body, err := s.read(w, r)
		if err != nil {
			respond(result{err: badRequest{err}})
			return
		}
		// A call that does not heed its context is answered for. It goes on, and its connection with it.
		limit := s.limit(name)
		late := time.AfterFunc(limit+grace, func() {
			respond(result{err: fmt.Errorf("no answer within %s: dockway or the host's kernel is overloaded; try again", limit), late: true})
		})
		defer late.Stop()
		respond(s.answer(r.Context(), limit, name, body, answer))
	})
}

// limit is how long a call may take. A DHCP server that does not answer is given up after 15 s.
func (s *Server) limit(name string) time.Duration {
	switch name {
	case "IpamDriver.RequestAddress", "NetworkDriver.CreateEndpoint":
		return 2 * s.Limit
	}
	return s.Limit
}

// answer runs the call within the time limit. A client that goes away does not stop a call
// half-way: the engine forgets or repeats, and both are cheaper to mend.
func (s *Server) answer(ctx context.Context, limit time.Duration, name string, body []byte, answer func(context.Context, []byte) result) (res result) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			s.Log.Errorf("%s: panic: %v\n%s", name, p, debug.Stack())
			res = result{err: fmt.Errorf("internal error: %v: this is a bug in dockway, its log has the details", p)}
		}
	}()
	return answer(ctx, body)
}

// respond logs a call and sends its answer.
func (s *Server) respond(w http.ResponseWriter, name string, res result, took time.Duration) {
	s.record(name, res, took)
	if res.late {
		w.Header().Set("Connection", "close")
	}
	switch {
	case res.err == nil:
		s.write(w, http.StatusOK, res.reply)
	case errors.As(res.err, new(badRequest)):
		s.refuse(w, http.StatusBadRequest, res.err)
	default:
		s.refuse(w, http.StatusInternalServerError, res.err)
	}
}

// read reads a request's body. Its deadline does not outlive it: on the connection it would end
// the wait for the next request.
func (s *Server) read(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	control := http.NewResponseController(w)
	if err := control.SetReadDeadline(time.Now().Add(s.Limit)); err != nil {
		return nil, fmt.Errorf("set a deadline for the request's body: %w", err)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		w.Header().Set("Connection", "close")
		if errors.As(err, new(*http.MaxBytesError)) {
			return nil, fmt.Errorf("the request's body has more than %d bytes: dockway reads no more", maxBody)
		}
		return nil, fmt.Errorf("read the request's body: %w", err)
	}
	if err := control.SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("lift the deadline for the request's body: %w", err)
	}
	return body, nil
}

// record logs a call: one line.
func (s *Server) record(name string, res result, took time.Duration) {
	log := s.Log.WithFields(logrus.Fields{"call": name, "took": took.Round(time.Microsecond)})
	if res.about != "" {
		log = log.WithField("about", res.about)
	}
	if res.err != nil {
		log.WithError(res.err).Warn("call failed")
		return
	}
	log.Debug("call answered")
}

// refusal is how both drivers' calls fail: the engine shows Err.
type refusal struct{ Err string }

func (s *Server) refuse(w http.ResponseWriter, status int, err error) {
	s.write(w, status, refusal{Err: err.Error()})
}

// write sends the whole answer before it returns, so that a shutdown does not cut it off.
func (s *Server) write(w http.ResponseWriter, status int, reply any) {
	text, err := json.Marshal(reply)
	if err != nil {
		s.Log.Errorf("encode answer %T: %v", reply, err)
		status, text = http.StatusInternalServerError, []byte(`{"Err":"internal error: the answer cannot be encoded"}`)
	}
	w.Header().Set("Content-Type", sdk.DefaultContentTypeV1_1)
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	_, err = w.Write(text)
	if err == nil {
		err = http.NewResponseController(w).Flush()
	}
	if err != nil {
		s.Log.WithError(err).Warn("answer not delivered")
	}
}
