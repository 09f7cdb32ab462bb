package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

// The control plane of the benchmark: what an engine asks of the plugin for one container, and the
// least that netlink needs for the same link.

// plugin calls a plugin's socket as an engine does.
type plugin struct{ http.Client }

func dial(socket string) *plugin {
	return &plugin{http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}}
}

func (p *plugin) call(method string, req any) error {
	body, err := json.Marshal(req)
	if err != nil {
		return err
	}
	resp, err := p.Post("http://plugin/"+method, "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end below
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", method, text)
	}
	return nil
}

type object map[string]any

const benchNetwork = "be9c" + "000000000000000000000000000000000000000000000000000000000000"

func (p *plugin) createNetwork() error {
	return p.call("NetworkDriver.CreateNetwork", object{
		"NetworkID": benchNetwork,
		"Options":   object{"com.docker.network.generic": object{"network_name": "bench"}},
		"IPv4Data":  []object{{"AddressSpace": "x", "Pool": "198.19.0.0/16", "Gateway": "198.19.0.1/16"}},
		"IPv6Data":  []object{},
	})
}

func (p *plugin) deleteNetwork() error {
	return p.call("NetworkDriver.DeleteNetwork", object{"NetworkID": benchNetwork})
}

func endpoint(i int) object {
	return object{"NetworkID": benchNetwork, "EndpointID": fmt.Sprintf("%011x%053x", i+1, i)}
}

// start is what an engine asks when a container starts that publishes ports. It gives how long
// each of the three calls took.
func (p *plugin) start(i, firstPort, ports int) (took [3]time.Duration, err error) {
	create, join, program := endpoint(i), endpoint(i), endpoint(i)
	create["Interface"] = object{"Address": fmt.Sprintf("198.19.%d.%d/16", (i+2)/256, (i+2)%256)}
	create["Options"] = object{}
	join["SandboxKey"], join["Options"] = "/run/docker/netns/none", object{}
	// On IPv4 only: the plugin holds a port of both families with two sockets, and 10,000 of these
	// are more files than some machines allow.
	mapped := make([]object, ports)
	for n := range mapped {
		mapped[n] = object{"Proto": 6, "Port": 80, "HostIP": "0.0.0.0", "HostPort": firstPort + n, "HostPortEnd": firstPort + n}
	}
	program["Options"] = object{"com.docker.network.portmap": mapped}
	for n, call := range []struct {
		method string
		req    object
	}{{"CreateEndpoint", create}, {"Join", join}, {"ProgramExternalConnectivity", program}} {
		start := time.Now()
		if err := p.call("NetworkDriver."+call.method, call.req); err != nil {
			return took, err
		}
		took[n] = time.Since(start)
	}
	return took, nil
}

// stop is what an engine asks when the container ends.
func (p *plugin) stop(i int) error {
	for _, method := range []string{"RevokeExternalConnectivity", "Leave", "DeleteEndpoint"} {
		if err := p.call("NetworkDriver."+method, endpoint(i)); err != nil {
			return err
		}
	}
	return nil
}

// bareGroup is the link group of what bare makes, to be deleted at once.
const bareGroup = 770

// bare is the least netlink for a container's link: a veth pair, one end on a bridge and up.
func bare(i int) (time.Duration, error) {
	bridge, err := netlink.LinkByName("bare")
	if err != nil {
		return 0, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Group = fmt.Sprintf("bh%d", i), bareGroup
	link := &netlink.Veth{LinkAttrs: attrs, PeerName: fmt.Sprintf("bc%d", i)}
	start := time.Now()
	if err := netlink.LinkAdd(link); err != nil {
		return 0, err
	}
	if err := netlink.LinkSetMaster(link, bridge); err != nil {
		return 0, err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return 0, err
	}
	return time.Since(start), nil
}

// controlTimes are medians.
type controlTimes struct {
	Start, Stop, Bare, Floor time.Duration
	Link                     time.Duration // the part of Bare without rules
	Calls                    [3]time.Duration
}

func (c controlTimes) calls() string {
	return fmt.Sprintf("%s, %s, %s", short(c.Calls[0]), short(c.Calls[1]), short(c.Calls[2]))
}

// warmUp is how many rounds do not count.
const warmUp = 5

// control takes rounds of one more container's calls and of the bare netlink calls, in turn. They
// end together at last: the kernel deletes links under the lock that it makes them under, and a
// deletion would be measured as a part of the next start.
func control(socket string, number, port, rounds int) (controlTimes, error) {
	p := dial(socket)
	rules, err := newBareRules()
	if err != nil {
		return controlTimes{}, err
	}
	var start, stop, least, floor, link []time.Duration
	var calls [3][]time.Duration
	for round := range rounds + warmUp {
		took, err := p.start(number+round, port+round, 1)
		if err != nil {
			return controlTimes{}, err
		}
		begun := time.Now()
		if err := p.call("NetworkDriver.GetCapabilities", object{}); err != nil {
			return controlTimes{}, err
		}
		idle := time.Since(begun)
		b, err := bare(round)
		if err != nil {
			return controlTimes{}, err
		}
		r, err := rules.add(round)
		if err != nil {
			return controlTimes{}, err
		}
		if round < warmUp {
			continue
		}
		start, least, link = append(start, took[0]+took[1]+took[2]), append(least, b+r), append(link, b)
		floor = append(floor, idle)
		for i := range calls {
			calls[i] = append(calls[i], took[i])
		}
	}
	for round := range rounds + warmUp {
		begun := time.Now()
		if err := p.stop(number + round); err != nil {
			return controlTimes{}, err
		}
		stop = append(stop, time.Since(begun))
	}
	if err := rules.remove(); err != nil {
		return controlTimes{}, err
	}
	c := controlTimes{Start: median(start), Stop: median(stop), Bare: median(least), Floor: median(floor), Link: median(link)}
	for i := range calls {
		c.Calls[i] = median(calls[i])
	}
	return c, nil
}

func median(took []time.Duration) time.Duration {
	slices.Sort(took)
	return took[len(took)/2]
}
