package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/dockway/dockway/driver/gossip"
)

// clusterConfig is what serve is told about the cluster, as given.
type clusterConfig struct {
	name, label, join, advertise, key, gossipPort, vxlanPort string
}

// clusterSettings are what a clusterConfig means.
type clusterSettings struct {
	on          bool // the host is to be in a cluster
	name, label string
	seeds       []string
	address     netip.Addr // that ADVERTISE is
	link        string     // or the interface that it names; with neither, the address is found by the seeds
	key         []byte     // nil: none
	gossip      uint16     // ports
	vxlan       uint16
}

// settings refuses what can never work, and names the setting. What may come is none of that: a seed
// that does not answer, an interface that is not there yet.
func (c clusterConfig) settings() (s clusterSettings, err error) {
	s.on, s.name, s.label = c.join != "" || c.advertise != "", c.name, c.label
	if s.name == "" && s.on {
		if s.name, err = os.Hostname(); err != nil {
			return s, fmt.Errorf("the host's name: %w: set NODE_NAME", err)
		}
	}
	if s.name != "" {
		if err := gossip.CheckName(s.name); err != nil {
			return s, fmt.Errorf("NODE_NAME: %w", err)
		}
	}
	if err := gossip.CheckLabel(s.label); err != nil {
		return s, fmt.Errorf("CLUSTER: %w", err)
	}
	if s.gossip, err = parsePort("GOSSIP_PORT", c.gossipPort); err != nil {
		return s, err
	}
	if s.vxlan, err = parsePort("VXLAN_PORT", c.vxlanPort); err != nil {
		return s, err
	}
	if s.gossip == s.vxlan {
		return s, fmt.Errorf("GOSSIP_PORT and VXLAN_PORT are both %d: give each a port of its own", s.gossip)
	}
	s.seeds = strings.FieldsFunc(c.join, func(r rune) bool { return r == ',' || r == ' ' })
	if len(s.seeds) == 0 && c.join != "" {
		return s, fmt.Errorf("JOIN=%q names no host: give addresses or names, separated by commas", c.join)
	}
	for _, seed := range s.seeds {
		if err := gossip.CheckSeed(seed, s.gossip); err != nil {
			return s, fmt.Errorf("JOIN: %w", err)
		}
	}
	if s.address, s.link, err = parseAdvertise(c.advertise); err != nil {
		return s, err
	}
	if c.key != "" {
		if s.key, err = parseKey(c.key); err != nil {
			return s, fmt.Errorf("GOSSIP_KEY: %w", err)
		}
	}
	return s, nil
}

func parsePort(name, text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("%s=%q is not a port from 1 to 65535: give another", name, text)
	}
	return uint16(port), nil
}

// maxLink is the size of the longest name of an interface (IFNAMSIZ of the kernel, less its end).
const maxLink = 15

// parseAdvertise tells an address from an interface. What the kernel takes for no interface's name is
// neither; nor are digits and dots that are no address.
func parseAdvertise(text string) (address netip.Addr, link string, err error) {
	if text == "" {
		return address, "", nil
	}
	if address, err := netip.ParseAddr(text); err == nil {
		if err := gossip.CheckAddress(address); err != nil {
			return address, "", fmt.Errorf("ADVERTISE: %w", err)
		}
		return address.Unmap(), "", nil
	}
	if len(text) > maxLink || text == "." || text == ".." || strings.ContainsAny(text, "/: \t\n\v\f\r") || strings.Contains(text, ".") && strings.Trim(text, "0123456789.") == "" {
		return address, "", fmt.Errorf("ADVERTISE=%q is neither an address nor the name of an interface: give one of them, without prefix length and port", text)
	}
	return address, text, nil
}

func parseKey(text string) ([]byte, error) {
	key, err := base64.StdEncoding.DecodeString(text)
	if err != nil || !slices.Contains([]int{16, 24, 32}, len(key)) {
		return nil, errors.New("not a key: that is 16, 24 or 32 bytes in base64, as dockway keygen prints it")
	}
	return key, nil
}
