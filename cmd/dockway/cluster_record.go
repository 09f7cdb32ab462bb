package main

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

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
	value, err := recorded(record, clusterBucket, "keys")
	if err == nil && value != nil {
		err = json.Unmarshal(value, &kept)
	}
	if err != nil {
		return nil, fmt.Errorf("the gossip's keys on record: %w", err)
	}
	if key == nil {
		return &keptKeys{}, nil
	}
	if is := gossip.Fingerprint(key); kept.Setting != is || len(kept.Keys) == 0 {
		kept = keptKeys{Setting: is, Keys: [][]byte{key}}
	}
	return &kept, nil
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
	value, err := recorded(record, clusterBucket, "epoch")
	if err == nil && value != nil {
		err = json.Unmarshal(value, &epoch)
	}
	if err != nil {
		return 0, fmt.Errorf("the count of starts on record: %w", err)
	}
	return epoch + 1, saveEpoch(record, epoch+1)
}

func saveEpoch(record *store.Store, epoch uint64) error {
	return record.Apply(store.Change{Bucket: clusterBucket, Key: "epoch", Value: strconv.AppendUint(nil, epoch, 10)})
}

// clockBucket has the clock of each fact that this host states, by the fact's key.
const clockBucket = "clocks"

func loadClocks(record *store.Store) (map[facts.Key]uint64, error) {
	clocks := map[facts.Key]uint64{}
	err := record.Load(clockBucket, func(key string, value []byte) error {
		var k facts.Key
		clock, err := strconv.ParseUint(string(value), 10, 63)
		if err := errors.Join(err, json.Unmarshal([]byte(key), &k)); err != nil {
			return fmt.Errorf("the clock of %s on record: %w", key, err)
		}
		clocks[k] = clock
		return nil
	})
	return clocks, err
}

func saveClocks(record *store.Store, changed map[facts.Key]uint64) error {
	var changes []store.Change
	for k, clock := range changed {
		key, err := json.Marshal(k)
		if err != nil {
			return err
		}
		change := store.Change{Bucket: clockBucket, Key: string(key)}
		if clock > 0 {
			change.Value = strconv.AppendUint(nil, clock, 10)
		}
		changes = append(changes, change)
	}
	return record.Apply(changes...)
}

// recorded is one value on record, nil if there is none.
func recorded(record *store.Store, bucket, key string) (found []byte, err error) {
	err = record.Load(bucket, func(k string, value []byte) error {
		if k == key {
			found = append([]byte{}, value...)
		}
		return nil
	})
	return found, err
}

// hostSeed tells this host from others, as long as its record lives. A managed plugin does not
// see the host's own /etc/machine-id.
func hostSeed(record *store.Store) (string, error) {
	const bucket, key = "host", "seed"
	value, err := recorded(record, bucket, key)
	if err != nil || value != nil {
		return string(value), err
	}
	seed := rand.Text()
	return seed, record.Apply(store.Change{Bucket: bucket, Key: key, Value: []byte(seed)})
}
