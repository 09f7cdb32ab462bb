package lab

import (
	"bytes"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// DHCPConfig is what a server for DHCP is told. What is left out, it does not tell its clients.
type DHCPConfig struct {
	Subnet   string            // "198.18.0.0/24"; left out: IPv6 only
	From, To string            // the addresses it gives, both included
	Router   string            // option 3
	DNS      []string          // option 6
	Domain   string            // option 15
	Search   []string          // option 119
	MTU      int               // option 26
	Routes   map[string]string // option 121: gateways by destination ("198.18.8.0/24")
	Reserved map[string]string // addresses by MAC address; they may be outside From and To
	Lease    time.Duration     // an hour if it is left out; dnsmasq gives two minutes at least
	Renew    time.Duration     // option 58; left out: the client's half of the lease
	Rebind   time.Duration     // option 59; left out: the client's seven eighths
	Most     int               // leases at a time, after which dnsmasq offers more but refuses them (NAK); left out: 1000

	Subnet6    string // "fd00::/64"; left out: IPv4 only. Lease, Renew, Rebind, Domain and Reserved are for IPv6 too
	From6, To6 string // the IPv6 addresses it gives, both included
	SLAAC      bool   // as a router it says that clients may make addresses of the subnet themselves
}

// DHCPProgram names a program that serves DHCP.
type DHCPProgram string

// The programs that setup.sh puts into the cache.
const (
	Dnsmasq DHCPProgram = "dnsmasq"
	Kea     DHCPProgram = "kea-dhcp4"
	Kea6    DHCPProgram = "kea-dhcp6" // which serves IPv6 only, and is no router as dnsmasq is
)

// DHCPServer serves DHCP on a machine's link. It is authoritative: who asks at its start for an
// address that the server would not give is told so (NAK).
type DHCPServer struct {
	Program DHCPProgram
	machine *Machine
	link    string
	dir     string // its files
	process *Process
}

// Lease is an address that a DHCP server has given, as its lease file says.
type Lease struct {
	IP, MAC, Host string
	ClientID      string // option 61, in hexadecimal with colons; empty if the client sent none
	Until         time.Time
}

// DHCP starts a DHCP server on a link of the machine, which needs an address in the subnet.
func (m *Machine) DHCP(program DHCPProgram, link string, config DHCPConfig) (*DHCPServer, error) {
	s := &DHCPServer{Program: program, machine: m, link: link, dir: filepath.Join(m.dir, string(program)+"-"+link)}
	return s, s.Reconfigure(config)
}

// Reconfigure starts the server anew with another configuration, and without any memory of the
// leases that it gave. A client that renews an address is refused (NAK) if another is reserved for
// it now. If its address is only outside From and To now, dnsmasq refuses it, and Kea keeps silent.
func (s *DHCPServer) Reconfigure(config DHCPConfig) error {
	if err := errors.Join(s.Stop(), os.RemoveAll(s.dir), os.MkdirAll(s.dir, 0o755)); err != nil {
		return err
	}
	var text []byte
	var err error
	switch s.Program {
	case Dnsmasq:
		text, err = s.dnsmasqConfig(config)
	case Kea:
		text, err = s.keaConfig(config)
	case Kea6:
		text, err = s.kea6Config(config)
	default:
		err = errors.New("there is no such program")
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(s.dir, "config"), text, 0o644)
	}
	if err != nil {
		return fmt.Errorf("configure %s: %w", s.Program, err)
	}
	return s.Start()
}

// Start starts a server that was stopped: it knows its leases.
func (s *DHCPServer) Start() error {
	dir, err := cache()
	if err != nil {
		return err
	}
	config, root := filepath.Join(s.dir, "config"), filepath.Join(dir, "dhcp")
	program := filepath.Join(root, "usr/sbin", string(s.Program))
	if _, err := os.Stat(program); err != nil {
		return fmt.Errorf("%s is not set up (make setup): %w", s.Program, err)
	}
	switch s.Program {
	case Dnsmasq:
		s.process, err = s.machine.Start("exclusively to interface", program, "--keep-in-foreground", "--conf-file="+config)
	case Kea, Kea6:
		libraries, err1 := filepath.Glob(filepath.Join(root, "usr/lib/*/libkea-util.so.*"))
		if err1 != nil || len(libraries) == 0 {
			return fmt.Errorf("the libraries of %s are not set up (make setup): %w", s.Program, err1)
		}
		started := map[DHCPProgram]string{Kea: "DHCP4_STARTED", Kea6: "DHCP6_STARTED"}[s.Program]
		s.process, err = s.machine.Start(started, "env", "LD_LIBRARY_PATH="+filepath.Dir(libraries[0]),
			"KEA_PIDFILE_DIR="+s.dir, "KEA_LOCKFILE_DIR="+s.dir, program, "-c", config)
	}
	return err
}

// Stop ends the server. Its leases stay in its file.
func (s *DHCPServer) Stop() error {
	if s.process == nil {
		return nil
	}
	return s.process.Stop()
}

// Log is what the server has said since it was started.
func (s *DHCPServer) Log() string { return s.process.Output() }

func (s *DHCPServer) leaseFile() string { return filepath.Join(s.dir, "leases") }

// Leases are those that are given now, by the server's file.
func (s *DHCPServer) Leases() ([]Lease, error) {
	text, err := os.ReadFile(s.leaseFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	read := dnsmasqLeases
	if s.Program != Dnsmasq {
		read = keaLeases
	}
	all, err := read(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.leaseFile(), err)
	}
	return slices.DeleteFunc(all, func(l Lease) bool { return !l.Until.After(time.Now()) }), nil
}

func (s *DHCPServer) dnsmasqConfig(c DHCPConfig) ([]byte, error) {
	var b bytes.Buffer
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("interface=%s\nbind-interfaces\nexcept-interface=lo\nport=0\nuser=root\ngroup=root\npid-file=\nno-resolv\nno-hosts\nno-ping", s.link)
	line("log-dhcp\nlog-facility=-\ndhcp-authoritative\ndhcp-leasefile=%s", s.leaseFile())
	if c.Subnet != "" {
		subnet, err := netip.ParsePrefix(c.Subnet)
		if err != nil {
			return nil, err
		}
		line("dhcp-range=%s,%s,%s,%d", c.From, c.To, net.IP(net.CIDRMask(subnet.Bits(), 32)), seconds(c.lease()))
	}
	if c.Subnet6 != "" {
		subnet, err := netip.ParsePrefix(c.Subnet6)
		if err != nil {
			return nil, err
		}
		slaac := ""
		if c.SLAAC {
			slaac = "slaac,"
		}
		line("enable-ra\ndhcp-range=%s,%s,%s%d,%d", c.From6, c.To6, slaac, subnet.Bits(), seconds(c.lease()))
		if c.Domain != "" {
			line("dhcp-option=option6:domain-search,%s", c.Domain)
		}
	}
	// An option without a value keeps dnsmasq from telling its own address.
	line("dhcp-option=3%s", value(c.Router))
	line("dhcp-option=6%s", value(c.DNS...))
	if c.Domain != "" {
		line("dhcp-option=15,%s", c.Domain)
	}
	if len(c.Search) > 0 {
		line("dhcp-option=option:domain-search%s", value(c.Search...))
	}
	if c.MTU > 0 {
		line("dhcp-option=26,%d", c.MTU)
	}
	if len(c.Routes) > 0 {
		var all []string
		for _, to := range slices.Sorted(maps.Keys(c.Routes)) {
			all = append(all, to, c.Routes[to])
		}
		line("dhcp-option=121%s", value(all...))
	}
	if c.Most > 0 {
		line("dhcp-lease-max=%d", c.Most)
	}
	if c.Renew > 0 {
		line("dhcp-option=58,%d", seconds(c.Renew))
	}
	if c.Rebind > 0 {
		line("dhcp-option=59,%d", seconds(c.Rebind))
	}
	for _, mac := range slices.Sorted(maps.Keys(c.Reserved)) {
		if a := c.Reserved[mac]; strings.Contains(a, ":") {
			line("dhcp-host=%s,[%s]", mac, a)
		} else {
			line("dhcp-host=%s,%s", mac, a)
		}
	}
	return b.Bytes(), nil
}

// value is a list as dnsmasq has it behind an option's number.
func value(items ...string) string {
	s := ""
	for _, x := range items {
		if x != "" {
			s += "," + x
		}
	}
	return s
}

func (c DHCPConfig) lease() time.Duration {
	if c.Lease == 0 {
		return time.Hour
	}
	return c.Lease
}

func seconds(d time.Duration) int { return int(d / time.Second) }

// dnsmasqLeases reads lines of the time of expiry, MAC address (of IPv6, the association's number), IP
// address, name and client identifier. Between those of IPv4 and those of IPv6 the server's own is told.
func dnsmasqLeases(text []byte) ([]Lease, error) {
	var all []Lease
	known := func(s string) string {
		if s == "*" {
			return ""
		}
		return s
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "duid" {
			continue
		}
		if len(f) != 5 {
			return nil, fmt.Errorf("%q is no lease", line)
		}
		until, err := strconv.ParseInt(f[0], 10, 64)
		if err != nil {
			return nil, err
		}
		if strings.Contains(f[2], ":") {
			f[1] = macOf(f[4])
		}
		all = append(all, Lease{IP: f[2], MAC: f[1], Host: known(f[3]), ClientID: known(f[4]), Until: time.Unix(until, 0)})
	}
	return all, nil
}

// macOf is the MAC address that a DUID is made of, if it is one with nothing else (RFC 8415, 11.4).
func macOf(duid string) string {
	mac, ok := strings.CutPrefix(duid, "00:03:00:01:")
	if !ok {
		return ""
	}
	return mac
}

type object = map[string]any

func (s *DHCPServer) kea6Config(c DHCPConfig) ([]byte, error) {
	var reserved, options []object
	for _, mac := range slices.Sorted(maps.Keys(c.Reserved)) {
		reserved = append(reserved, object{"hw-address": mac, "ip-addresses": []string{c.Reserved[mac]}})
	}
	if c.Domain != "" {
		options = append(options, object{"name": "domain-search", "data": c.Domain})
	}
	server := object{
		"interfaces-config":  object{"interfaces": []string{s.link}},
		"lease-database":     object{"type": "memfile", "persist": true, "name": s.leaseFile(), "lfc-interval": 0},
		"server-id":          object{"type": "EN", "enterprise-id": 2495, "identifier": "0123456789", "persist": false},
		"valid-lifetime":     seconds(c.lease()),
		"preferred-lifetime": seconds(c.lease()),
		"subnet6": []object{{
			"subnet": c.Subnet6, "interface": s.link, "pools": []object{{"pool": c.From6 + " - " + c.To6}},
			"option-data": nonNil(options), "reservations": nonNil(reserved),
		}},
	}
	return keaJSON("Dhcp6", "kea-dhcp6", server, c)
}

func (s *DHCPServer) keaConfig(c DHCPConfig) ([]byte, error) {
	var options []object
	option := func(name, data string) {
		if data != "" {
			options = append(options, object{"name": name, "data": data})
		}
	}
	option("routers", c.Router)
	option("domain-name-servers", strings.Join(c.DNS, ", "))
	option("domain-name", c.Domain)
	option("domain-search", strings.Join(c.Search, ", "))
	if c.MTU > 0 {
		option("interface-mtu", strconv.Itoa(c.MTU))
	}
	if len(c.Routes) > 0 { // Kea 2.2 does not know the option: here are its octets (RFC 3442)
		var octets []byte
		for _, to := range slices.Sorted(maps.Keys(c.Routes)) {
			destination, err := netip.ParsePrefix(to)
			if err != nil {
				return nil, err
			}
			gateway, err := netip.ParseAddr(c.Routes[to])
			if err != nil {
				return nil, err
			}
			octets = append(append(octets, byte(destination.Bits())), destination.Addr().AsSlice()[:(destination.Bits()+7)/8]...)
			octets = append(octets, gateway.AsSlice()...)
		}
		options = append(options, object{"code": 121, "space": "dhcp4", "csv-format": false, "data": hex.EncodeToString(octets)})
	}
	var reserved []object
	for _, mac := range slices.Sorted(maps.Keys(c.Reserved)) {
		reserved = append(reserved, object{"hw-address": mac, "ip-address": c.Reserved[mac]})
	}
	server := object{
		"interfaces-config": object{"interfaces": []string{s.link}},
		"lease-database":    object{"type": "memfile", "persist": true, "name": s.leaseFile(), "lfc-interval": 0},
		"valid-lifetime":    seconds(c.lease()),
		"subnet4": []object{{
			"id": 1, "subnet": c.Subnet, "interface": s.link, "authoritative": true, "pools": []object{{"pool": c.From + " - " + c.To}},
			"option-data": nonNil(options), "reservations": nonNil(reserved),
		}},
	}
	return keaJSON("Dhcp4", "kea-dhcp4", server, c)
}

// keaJSON is the configuration of one of Kea's servers, with what all have.
func keaJSON(key, logger string, server object, c DHCPConfig) ([]byte, error) {
	server["loggers"] = []object{{"name": logger, "severity": "INFO", "output_options": []object{{"output": "stdout", "flush": true}}}}
	if c.Renew > 0 {
		server["renew-timer"] = seconds(c.Renew)
	}
	if c.Rebind > 0 {
		server["rebind-timer"] = seconds(c.Rebind)
	}
	return json.MarshalIndent(object{key: server}, "", "  ")
}

// nonNil makes JSON say [], not null.
func nonNil(list []object) []object { return append([]object{}, list...) }

// keaLeases reads a journal: what it says last of an address holds.
func keaLeases(text []byte) ([]Lease, error) {
	rows, err := csv.NewReader(bytes.NewReader(text)).ReadAll()
	if err != nil || len(rows) == 0 {
		return nil, err
	}
	column := map[string]int{}
	for i, name := range rows[0] {
		column[name] = i
	}
	client := "client_id"
	if _, ok := column["duid"]; ok {
		client = "duid"
	}
	for _, name := range []string{"address", "hwaddr", client, "valid_lifetime", "expire", "hostname", "state"} {
		if _, ok := column[name]; !ok {
			return nil, fmt.Errorf("it has no column %s", name)
		}
	}
	last := map[string]Lease{}
	for _, row := range rows[1:] {
		field := func(name string) string { return row[column[name]] }
		expire, err := strconv.ParseInt(field("expire"), 10, 64)
		if err != nil {
			return nil, err
		}
		l := Lease{IP: field("address"), MAC: field("hwaddr"), Host: field("hostname"), ClientID: field(client), Until: time.Unix(expire, 0)}
		if client == "duid" {
			l.MAC = macOf(l.ClientID)
		}
		if field("valid_lifetime") == "0" || field("state") != "0" { // removed, declined, reclaimed
			delete(last, l.IP)
			continue
		}
		last[l.IP] = l
	}
	var all []Lease
	for _, ip := range slices.Sorted(maps.Keys(last)) {
		all = append(all, last[ip])
	}
	return all, nil
}
