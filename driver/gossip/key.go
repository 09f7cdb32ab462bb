package gossip

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/dockway/dockway/driver/gossip/facts"
)

// KeyResult says what became of a change of keys at one host.
type KeyResult struct {
	Host facts.Host
	Err  error // nil: done
}

// What a host is asked to do with a key.
const (
	keyAdd    = 1
	keyUse    = 2
	keyRemove = 3
	keyHas    = 4 // fails if the key is not there
	keyUnused = 5 // fails if it is the one to send with
)

const (
	maxKeys    = 4
	keyTimeout = 5 * time.Second
)

// KeyAdd makes every living member accept a key. A rotation without loss is KeyAdd, KeyUse of the
// same and KeyRemove of the former, each when the one before succeeded at every host.
func (g *Gossip) KeyAdd(ctx context.Context, key []byte) []KeyResult {
	return g.everywhere(ctx, 0, keyAdd, key)
}

// KeyUse makes every living member send with a key. Nothing is changed unless all have it.
func (g *Gossip) KeyUse(ctx context.Context, key []byte) []KeyResult {
	return g.everywhere(ctx, keyHas, keyUse, key)
}

// KeyRemove makes every living member refuse what is sent with a key. Nothing is changed while any of
// them sends with it.
func (g *Gossip) KeyRemove(ctx context.Context, key []byte) []KeyResult {
	return g.everywhere(ctx, keyUnused, keyRemove, key)
}

// Keys are fingerprints of the keys, for people; the first is the one to send with.
func (g *Gossip) Keys() []string {
	var out []string
	if g.keyring != nil {
		for _, key := range g.keyring.GetKeys() {
			out = append(out, Fingerprint(key))
		}
	}
	return out
}

// Fingerprint tells keys apart without telling the key: 16 hexadecimal digits.
func Fingerprint(key []byte) string {
	sum := sha256.Sum256(append([]byte("dockway gossip key\x00"), key...))
	return hex.EncodeToString(sum[:8])
}

// everywhere asks all for first, if there is one, and if none objects for then.
func (g *Gossip) everywhere(ctx context.Context, first, then byte, key []byte) []KeyResult {
	ctx, cancel := context.WithTimeout(ctx, 2*keyTimeout)
	defer cancel()
	if first != 0 {
		results := g.askKey(ctx, first, key)
		if slices.ContainsFunc(results, func(r KeyResult) bool { return r.Err != nil }) {
			return results
		}
	}
	return g.askKey(ctx, then, key)
}

func (g *Gossip) askKey(ctx context.Context, what byte, key []byte) []KeyResult {
	g.mu.Lock()
	hosts := append(g.some(len(g.peers)), g.self)
	g.mu.Unlock()
	slices.Sort(hosts)
	results := make([]KeyResult, len(hosts))
	g.each(hosts, func(host facts.Host) {
		var err error
		for range 3 {
			asking, cancel := context.WithTimeout(ctx, keyTimeout/3)
			_, err = g.call(asking, host, opKey, append([]byte{what}, key...))
			cancel()
			if no := (*denial)(nil); err == nil || errors.As(err, &no) || ctx.Err() != nil {
				break
			}
		}
		i, _ := slices.BinarySearch(hosts, host)
		results[i] = KeyResult{host, err}
	})
	return results
}

func (g *Gossip) serveKey(from facts.Host, content []byte) (byte, []byte, func()) {
	if len(content) < 1 {
		return g.malformed(from, errors.New("a change of keys that is cut off"))
	}
	if err := g.changeKey(content[0], content[1:]); err != nil {
		return statusFailed, []byte(err.Error()), nil
	}
	return statusOK, nil, nil
}

func (g *Gossip) changeKey(what byte, key []byte) error {
	if g.keyring == nil {
		return errors.New("this host has no key and speaks in clear: give it one and restart it")
	}
	if err := memberlist.ValidateKey(key); err != nil {
		return fmt.Errorf("the key has %d bytes: 16, 24 or 32 are possible", len(key))
	}
	g.keys.Lock()
	defer g.keys.Unlock()
	keys := g.keyring.GetKeys()
	at := slices.IndexFunc(keys, func(k []byte) bool { return bytes.Equal(k, key) })
	switch what {
	case keyHas:
		if at < 0 {
			return fmt.Errorf("key %s is not there: add it first", Fingerprint(key))
		}
		return nil
	case keyUnused:
		if at == 0 {
			return fmt.Errorf("key %s is the one in use: use another first", Fingerprint(key))
		}
		return nil
	case keyAdd:
		if at >= 0 {
			return nil
		}
		if len(keys) >= maxKeys {
			return fmt.Errorf("there are %d keys: remove one first", len(keys))
		}
		if err := g.keyring.AddKey(bytes.Clone(key)); err != nil {
			return err
		}
	case keyUse:
		if err := g.keyring.UseKey(key); err != nil {
			return fmt.Errorf("key %s is not there: add it first", Fingerprint(key))
		}
	case keyRemove:
		switch {
		case at < 0:
			return nil
		case at == 0:
			return fmt.Errorf("key %s is the one in use: use another first", Fingerprint(key))
		}
		// RemoveKey moves the keys behind in an array that memberlist may be reading, so there must
		// be none: using each of them brings it to the front.
		for _, behind := range keys[at+1:] {
			if err := errors.Join(g.keyring.UseKey(behind), g.keyring.UseKey(keys[0])); err != nil {
				return err
			}
		}
		if err := g.keyring.RemoveKey(key); err != nil {
			return err
		}
	default:
		return errors.New("this host does not know that change: it runs an earlier version")
	}
	g.log.Infof("gossip: keys are now %v", g.Keys())
	if g.config.SaveKeys == nil {
		return nil
	}
	if err := g.config.SaveKeys(clone(g.keyring.GetKeys())); err != nil {
		return fmt.Errorf("the change holds, but the keys cannot be recorded: %w", err)
	}
	return nil
}
