package gossip

import (
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// refusals hears what memberlist logs, which is the only place where it says what it refused, counts
// that and passes it on to people, at most once a minute for each reason.
type refusals struct {
	log       *logrus.Entry
	suspected func(facts.Host)

	mu    sync.Mutex
	count map[string]uint64
	last  string
	said  map[string]*saying
}

type saying struct {
	at       time.Time
	withheld int
}

const sayAgain = time.Minute

// The reasons for which memberlist refuses what arrives, by what it logs.
var reasons = []struct{ text, reason string }{
	{"unacceptable label", "wrong label"},
	{"Decrypt packet failed: unsupported encryption version", "not encrypted"},
	{"payload is too small to decrypt", "not encrypted"},
	{"remote state is not encrypted", "not encrypted"},
	{"encryption is not configured", "encrypted, but no key is set here"},
	{"Decrypt packet failed", "wrong key"},
	{"no installed keys could decrypt", "wrong key"},
	{"ignoring alive message", "no description"},
	{"handler queue full", "queue full"},
	{"Too many pending push/pull", "queue full"},
	{"larger than", "too large"},
	{"exceeds limit", "too large"},
	{"label", "malformed"},
	{"ailed to decode", "malformed"},
	{"ailed to decompress", "malformed"},
	{"ailed to receive", "malformed"},
	{"msgType", "malformed"},
	{"msg type", "malformed"},
	{"message type", "malformed"},
	{"truncated", "malformed"},
	{"checksum", "malformed"},
}

// Write takes one line of memberlist's.
func (r *refusals) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	level, rest, ok := strings.Cut(strings.TrimPrefix(text, "["), "] ")
	if !ok {
		level, rest = "WARN", text
	}
	rest = strings.TrimPrefix(rest, "memberlist: ")
	switch level {
	case "DEBUG":
		if reason := refusal(rest); reason != "" && strings.HasPrefix(rest, "failed to join") {
			r.refuse(reason, rest)
		}
	case "INFO":
		if host, ok := strings.CutSuffix(rest, " has failed, no acks received"); ok {
			r.suspected(facts.Host(strings.TrimPrefix(host, "Suspect ")))
		}
		r.log.Debug("gossip: " + rest)
	default:
		if reason := refusal(rest); reason != "" {
			r.refuse(reason, rest)
		} else {
			r.say(logrus.WarnLevel, rest[:min(len(rest), 24)], "gossip: "+rest)
		}
	}
	return len(line), nil
}

func refusal(text string) string {
	for _, r := range reasons {
		if strings.Contains(text, r.text) {
			return r.reason
		}
	}
	return ""
}

// refuse counts something that was not taken.
func (r *refusals) refuse(reason, text string) {
	r.mu.Lock()
	if r.count == nil {
		r.count = map[string]uint64{}
	}
	r.count[reason]++
	r.last = reason + ": " + text
	r.mu.Unlock()
	r.say(logrus.WarnLevel, reason, "gossip: refused ("+reason+"): "+text)
}

// say logs, unless it said the like within a minute.
func (r *refusals) say(level logrus.Level, like, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.said == nil || len(r.said) >= maxRemembered {
		r.said = map[string]*saying{}
	}
	s := r.said[like]
	if s != nil && time.Since(s.at) < sayAgain {
		s.withheld++
		return
	}
	entry := r.log
	if s != nil && s.withheld > 0 {
		entry = entry.WithField("withheld", s.withheld)
	}
	r.said[like] = &saying{at: time.Now()}
	entry.Log(level, text)
}
