package main

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/dockway/dockway/driver/gossip"
	"github.com/dockway/dockway/driver/gossip/facts"
	"github.com/dockway/dockway/driver/store"
)

// keptKeys are the gossip's keys on record, and the setting that they began with: another setting
// counts more than what was recorded.
type keptKeys struct {
	Setting string   `json:"setting"` // its fingerprint
	Keys    [][]byte `json:"keys"`
}

const clusterBucket = "cluster"

// loadKeys gives the keys to begin with, for the one that is set.
func loadKeys(record *store.Store, key []byte) (*keptKeys, error) {
	var kept keptKeys
	if err := recorded(record, clusterBucket, "keys", kept.decode); err != nil {
		return nil, fmt.Errorf("the gossip's keys on record: %w", err)
	}
	if key == nil {
		return &keptKeys{}, nil
	}
	if is := gossip.Fingerprint(key); kept.Setting != is {
		kept = keptKeys{Setting: is, Keys: [][]byte{key}}
	}
	return &kept, nil
}

func (k *keptKeys) decode(value []byte) error {
	if err := json.Unmarshal(value, k); err != nil {
		return err
	}
	if k.Setting == "" || len(k.Keys) == 0 {
		return errors.New("there are none")
	}
	for _, key := range k.Keys {
		if !slices.Contains([]int{16, 24, 32}, len(key)) { // of AES
			return fmt.Errorf("one has %d bytes", len(key))
		}
	}
	return nil
}

func (k keptKeys) save(record *store.Store) error {
	value, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return record.Apply(store.Change{Bucket: clusterBucket, Key: "keys", Value: value})
}

// raiseEpoch counts the starts of this host's part in the cluster: what it stated before an earlier
// one does not hold any more.
func raiseEpoch(record *store.Store) (uint64, error) {
	var epoch uint64
	err := recorded(record, clusterBucket, "epoch", func(value []byte) (err error) {
		if epoch, err = decodeNumber(value, 64); err == nil && epoch == math.MaxUint64 {
			err = errors.New("there is none after it")
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("the count of starts on record: %w", err)
	}
	return epoch + 1, saveEpoch(record, epoch+1)
}

// decodeNumber reads an epoch or a clock as it is written: from 1 to what has so many bits.
func decodeNumber(value []byte, bits int) (uint64, error) {
	n, err := strconv.ParseUint(string(value), 10, bits)
	if err == nil && (n == 0 || strconv.FormatUint(n, 10) != string(value)) {
		err = fmt.Errorf("%q is no count", value)
	}
	return n, err
}

func saveEpoch(record *store.Store, epoch uint64) error {
	return record.Apply(store.Change{Bucket: clusterBucket, Key: "epoch", Value: strconv.AppendUint(nil, epoch, 10)})
}

// clockBucket has the clock of each fact that this host states, by the fact's key.
const clockBucket = "clocks"

func loadClocks(record *store.Store) (map[facts.Key]uint64, error) {
	clocks := map[facts.Key]uint64{}
	err := record.Load(clockBucket, func(key string, value []byte) error {
		k, clock, err := decodeClock(key, value)
		clocks[k] = clock
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("the clocks on record: %w", err)
	}
	return clocks, nil
}

// decodeClock reads the clock of a fact. A key that would be written in another way could never be taken off the record.
func decodeClock(key string, value []byte) (k facts.Key, clock uint64, err error) {
	if err := json.Unmarshal([]byte(key), &k); err != nil {
		return k, 0, err
	}
	if again, err := json.Marshal(k); err != nil || string(again) != key {
		return k, 0, errors.Join(fmt.Errorf("%q is not the key of a fact", key), err)
	}
	if err := k.Valid(); err != nil {
		return k, 0, err
	}
	clock, err = decodeNumber(value, 63)
	return k, clock, err
}

func saveClocks(record *store.Store, changed map[facts.Key]uint64) error {
	changes, err := changesOf(changed)
	if err != nil {
		return err
	}
	return record.Apply(changes...)
}

func changesOf(clocks map[facts.Key]uint64) ([]store.Change, error) {
	var changes []store.Change
	for k, clock := range clocks {
		key, err := json.Marshal(k)
		if err != nil {
			return nil, err
		}
		change := store.Change{Bucket: clockBucket, Key: string(key)}
		if clock > 0 {
			change.Value = strconv.AppendUint(nil, clock, 10)
		}
		changes = append(changes, change)
	}
	return changes, nil
}

// recorded reads one value on record, if there is one.
func recorded(record *store.Store, bucket, key string, decode func(value []byte) error) error {
	return record.Load(bucket, func(k string, value []byte) error {
		if k != key {
			return nil
		}
		return decode(value)
	})
}

// hostSeed tells this host from others, as long as its record lives. A managed plugin does not
// see the host's own /etc/machine-id.
func hostSeed(record *store.Store) (string, error) {
	const bucket, key = "host", "seed"
	var seed string
	err := recorded(record, bucket, key, func(value []byte) error {
		seed = string(value)
		return checkSeed(seed)
	})
	if err != nil || seed != "" {
		return seed, err
	}
	seed = rand.Text()
	return seed, record.Apply(store.Change{Bucket: bucket, Key: key, Value: []byte(seed)})
}

// checkSeed reports why other hosts could not take a seed for a host's identity.
func checkSeed(seed string) error {
	const most = 63 // gossip.Config.ID
	if seed == "" || len(seed) > most || strings.ContainsFunc(seed, func(r rune) bool { return r <= ' ' || r == '/' || r > '~' }) {
		return fmt.Errorf("%q does not identify a host", seed)
	}
	return nil
}
