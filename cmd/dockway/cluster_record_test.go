package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/gossip"
	"github.com/dockway/dockway/driver/gossip/facts"
	"github.com/dockway/dockway/driver/store"
)

// recordedClock is the clock of an address as it is written.
func recordedClock(t testing.TB) (key string) {
	k, err := json.Marshal(gossip.EndpointKey(5001, netip.MustParseAddr("10.90.0.2")))
	if err != nil {
		t.Fatal(err)
	}
	return string(k)
}

// TestDamagedClusterRecord: what this host was in the cluster is not begun anew over a record that cannot be read: it would
// be another host to the rest, or one whose statements are void. The error says where it is and what to do.
func TestDamagedClusterRecord(t *testing.T) {
	keys := func(r *store.Store) error {
		_, err := loadKeys(r, bytes.Repeat([]byte{1}, keySize))
		return err
	}
	epoch := func(r *store.Store) error { _, err := raiseEpoch(r); return err }
	clocks := func(r *store.Store) error { _, err := loadClocks(r); return err }
	seed := func(r *store.Store) error { _, err := hostSeed(r); return err }
	clock := recordedClock(t)
	for what, c := range map[string]struct {
		bucket, key, value string
		load               func(*store.Store) error
	}{
		"keys that are no JSON":        {clusterBucket, "keys", "{", keys},
		"no keys":                      {clusterBucket, "keys", "null", keys},
		"an empty list of keys":        {clusterBucket, "keys", `{"setting":"x","keys":[]}`, keys},
		"a short key":                  {clusterBucket, "keys", `{"setting":"x","keys":["AQ=="]}`, keys},
		"an epoch that is none":        {clusterBucket, "epoch", "null", epoch},
		"an epoch before the first":    {clusterBucket, "epoch", "0", epoch},
		"an epoch that is the last":    {clusterBucket, "epoch", "18446744073709551615", epoch},
		"an epoch in words":            {clusterBucket, "epoch", "1e3", epoch},
		"a clock of nothing":           {clockBucket, "null", "7", clocks},
		"a clock of no fact":           {clockBucket, "{}", "7", clocks},
		"a clock of a key with spaces": {clockBucket, strings.Replace(clock, ",", ", ", 1), "7", clocks},
		"no clock":                     {clockBucket, clock, "0", clocks},
		"a clock of too many bits":     {clockBucket, clock, "9223372036854775808", clocks},
		"no seed":                      {"host", "seed", "", seed},
		"a seed that is none":          {"host", "seed", "a/b", seed},
	} {
		t.Run(what, func(t *testing.T) {
			record, err := store.Open(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer record.Close() //nolint:errcheck // the directory goes with the test
			if err := record.Apply(store.Change{Bucket: c.bucket, Key: c.key, Value: []byte(c.value)}); err != nil {
				t.Fatal(err)
			}
			err = c.load(record)
			if err == nil {
				t.Fatal("it is taken for a record")
			}
			for _, want := range []string{strconv.Quote(c.key) + " in bucket " + strconv.Quote(c.bucket), record.Path(), "backup"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %s", err, want)
				}
			}
			still := ""
			if err := record.Load(c.bucket, func(_ string, value []byte) error { still = string(value); return nil }); err != nil || still != c.value {
				t.Errorf("on record is %q, %v", still, err)
			}
		})
	}
}

// FuzzClusterRecord: what is taken over is written back as what is read again as the same.
func FuzzClusterRecord(f *testing.F) {
	kept, err := json.Marshal(keptKeys{Setting: gossip.Fingerprint(bytes.Repeat([]byte{1}, keySize)), Keys: [][]byte{bytes.Repeat([]byte{1}, keySize)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(kept, []byte("7"), recordedClock(f), []byte("12"), "SEED")
	f.Add([]byte("null"), []byte("0"), "{}", []byte("-1"), "")
	f.Fuzz(func(t *testing.T, onKeys, onEpoch []byte, clockKey string, onClock []byte, seed string) {
		var keys keptKeys
		if keys.decode(onKeys) == nil {
			var again keptKeys
			if err := again.decode(encodeKeys(t, keys)); err != nil || again.Setting != keys.Setting || !bytes.Equal(bytes.Join(again.Keys, nil), bytes.Join(keys.Keys, nil)) {
				t.Errorf("keys %v are read as %v, %v", keys, again, err)
			}
			if len(keys.Keys) == 0 {
				t.Errorf("%q has no keys", onKeys)
			}
		}
		if n, err := decodeNumber(onEpoch, 64); err == nil && (n == 0 || string(strconv.AppendUint(nil, n, 10)) != string(onEpoch)) {
			t.Errorf("%q is read as %d", onEpoch, n)
		}
		if k, clock, err := decodeClock(clockKey, onClock); err == nil {
			again := map[facts.Key]uint64{}
			for _, c := range clockChanges(t, map[facts.Key]uint64{k: clock}) {
				k, clock, err := decodeClock(c.Key, c.Value)
				if err != nil {
					t.Error(err)
				}
				again[k] = clock
				if c.Key != clockKey || string(c.Value) != string(onClock) {
					t.Errorf("%q, %q is written back as %q, %q", clockKey, onClock, c.Key, c.Value)
				}
			}
			if !maps.Equal(again, map[facts.Key]uint64{k: clock}) || k.Valid() != nil {
				t.Errorf("clock %d of %v is read as %v", clock, k, again)
			}
		}
		if checkSeed(seed) == nil && (seed == "" || strings.Contains(seed, "/")) {
			t.Errorf("seed %q", seed)
		}
	})
}

func encodeKeys(t *testing.T, k keptKeys) []byte {
	value, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func clockChanges(t *testing.T, clocks map[facts.Key]uint64) []store.Change {
	changes, err := changesOf(clocks)
	if err != nil {
		t.Fatal(err)
	}
	return changes
}
