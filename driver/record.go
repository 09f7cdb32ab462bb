package driver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/dockway/dockway/driver/mode"
)

// load reads what is on record. What it cannot take over, it refuses: to go on without a network, or an endpoint, would
// remove its links from under the containers.
func (s *Service) load() error {
	err := s.store.Load(networkBucket, func(id string, value []byte) error {
		n := newNetwork(mode.Network{})
		n.stored = true
		err := decode(value, &n.record)
		switch {
		case err != nil:
		case n.record.ID != id || !identifier.MatchString(id):
			err = fmt.Errorf("it is of network %q", n.record.ID)
		default:
			err = mode.CheckNetwork(n.record)
		}
		if err != nil {
			return fmt.Errorf("record %s/%s: %w", networkBucket, id, err)
		}
		s.networks[id] = n
		return nil
	})
	if err != nil {
		return err
	}
	return s.store.Load(endpointBucket, func(key string, value []byte) error {
		if err := s.loadEndpoint(key, value); err != nil {
			return fmt.Errorf("record %s/%s: %w", endpointBucket, key, err)
		}
		return nil
	})
}

func (s *Service) loadEndpoint(key string, value []byte) error {
	var e mode.Endpoint
	if err := decode(value, &e); err != nil {
		return err
	}
	if endpointKey(e) != key || !identifier.MatchString(e.ID) {
		return fmt.Errorf("it is of endpoint %q of network %q", e.ID, e.NetworkID)
	}
	n, ok := s.networks[e.NetworkID]
	if !ok {
		return errors.New("there is no such network")
	}
	if err := mode.CheckEndpoint(n.record, e); err != nil {
		return err
	}
	for _, a := range e.Addresses() {
		if other, taken := n.addresses[a]; taken {
			return fmt.Errorf("endpoint %s has its address %s", other, a)
		}
	}
	if other, taken := n.stations[e.MAC]; taken {
		return fmt.Errorf("endpoint %s has its MAC address %s", other, e.MAC)
	}
	if other, taken := s.links[e.Port()]; taken {
		return fmt.Errorf("endpoint %s has its link %s", other, e.Port())
	}
	n.put(s, e)
	return nil
}

// decode reads a record. A field that is not known has been written by a later version, and would be lost with the next change.
func decode(value []byte, record any) error {
	d := json.NewDecoder(bytes.NewReader(value))
	d.DisallowUnknownFields()
	if err := d.Decode(record); err != nil {
		return err
	}
	if d.More() {
		return errors.New("something follows it")
	}
	return nil
}

// encode writes a record. The records are plain data, which JSON always has a form for.
func encode(record any) []byte {
	value, err := json.Marshal(record)
	if err != nil {
		panic(fmt.Sprintf("record %T: %v", record, err))
	}
	return value
}
