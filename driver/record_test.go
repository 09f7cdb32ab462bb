package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/policy"
)

// written is what a service records: networks of several modes, each with a container, of which one publishes ports.
func written(t testing.TB) *fakeStore {
	ctx, st := context.Background(), newFakeStore()
	s := newService(t, newFakeKernel(), st)
	for _, i := range []int{1, 3, 4, 5} {
		net := webRequest(i)
		if i == 1 {
			net.Options = map[string]string{"mac_pool": "02:00:00:00:00:00,02:00:00:00:ff:ff", "network_name": "web"}
		}
		req := endpointRequest(i, 0)
		if err := s.CreateNetwork(ctx, net); err != nil {
			t.Fatal(err)
		}
		if _, err := s.CreateEndpoint(ctx, req); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Join(ctx, req.NetworkID, req.ID); err != nil {
			t.Fatal(err)
		}
	}
	req := endpointRequest(1, 0)
	if err := s.Publish(ctx, req.NetworkID, req.ID, []policy.PortMapping{tcp(8080, 80)}); err != nil {
		t.Fatal(err)
	}
	return st
}

// A record that is not what a version has written is refused, with its place on record, and stays as it is: a service that
// went on without it would take containers' links away.
func TestDamagedRecord(t *testing.T) {
	nat, overlay := [2]string{networkBucket, networkID(1)}, [2]string{networkBucket, networkID(5)}
	web, wire := [2]string{endpointBucket, networkID(1) + "/" + endpointID(100)}, [2]string{endpointBucket, networkID(4) + "/" + endpointID(400)}
	for what, c := range map[string]struct {
		place    [2]string
		old, new string // new alone: the whole value
	}{
		"no JSON":                            {nat, "", "{"},
		"nothing":                            {nat, "", "null"},
		"an empty network":                   {nat, "", "{}"},
		"more than one":                      {nat, `"internal":false`, `"internal":false}{`},
		"a field of a later version":         {nat, `"internal":false`, `"internal":false,"colour":"red"`},
		"another network's":                  {nat, networkID(1), networkID(2)},
		"a mode that is none":                {nat, `"nat"`, `"bridge"`},
		"no subnet":                          {nat, `"pool":"198.18.1.0/24"`, `"pool":""`},
		"a subnet that is none":              {nat, `"198.18.1.0/24"`, `"198.18.1.1/24"`},
		"a subnet of the other family":       {nat, `"ipv4"`, `"ipv6"`},
		"a gateway elsewhere":                {nat, `"198.18.1.1"`, `"198.18.2.1"`},
		"a range that ends before it begins": {nat, `"02:00:00:00:ff:ff"`, `"00:00:00:00:00:00"`},
		"leases without a subnet":            {nat, `"internal":false`, `"internal":false,"leased6":true`},
		"an MTU below nothing":               {nat, `"mtu":1500`, `"mtu":-1`},
		"an overlay without an identifier":   {overlay, `,"vsids":[5005]`, ``},
		"more identifiers than subnets":      {overlay, `[5005]`, `[5005,5006]`},
		"an identifier that is none":         {overlay, `[5005]`, `[1]`},
		"an endpoint that is nothing":        {web, "", "null"},
		"an endpoint elsewhere":              {web, endpointID(100), endpointID(101)},
		"an endpoint of no network":          {nat, "", ""},
		"no address":                         {web, `"198.18.1.2/24"`, `""`},
		"an address of the other family":     {web, `"198.18.1.2/24"`, `"fd00::2/64"`},
		"no MAC":                             {web, `,"joined"`, `,"mac":"00:00:00:00:00:00","joined"`}, // the later one counts
		"a port of nobody's":                 {web, `"container":"198.18.1.2:80"`, `"container":"198.18.1.3:80"`},
		"a port of no protocol":              {web, `"tcp"`, `"icmp"`},
		"a link of another mode":             {wire, `"external":true`, `"external":false`},
	} {
		t.Run(what, func(t *testing.T) {
			st := written(t)
			value := string(st.values[c.place])
			switch {
			case c.old != "" && !strings.Contains(value, c.old):
				t.Fatalf("%s has no %s", value, c.old)
			case c.old != "":
				value = strings.Replace(value, c.old, c.new, 1)
			default:
				value = c.new
			}
			place := c.place
			if st.values[c.place] = []byte(value); value == "" {
				delete(st.values, c.place)
				place = web
			}
			refused(t, st, place)
		})
	}
	for what, change := range map[string]func(a, b *mode.Endpoint){
		"one address of two endpoints": func(a, b *mode.Endpoint) { b.Address = a.Address },
		"one MAC of two endpoints":     func(a, b *mode.Endpoint) { b.MAC = a.MAC },
	} {
		t.Run(what, func(t *testing.T) {
			st := written(t)
			var a mode.Endpoint
			if err := json.Unmarshal(st.values[web], &a); err != nil {
				t.Fatal(err)
			}
			b := a
			b.ID, b.Bindings = endpointID(101), nil
			b.Address, b.MAC[5] = endpointRequest(1, 1).Address, b.MAC[5]+1
			change(&a, &b)
			st.values[[2]string{endpointBucket, endpointKey(b)}] = encode(b)
			refused(t, st, [2]string{endpointBucket, networkID(1)})
		})
	}
}

// refused fails unless a service does not start, and says where on record it found why.
func refused(t *testing.T, st *fakeStore, place [2]string) {
	t.Helper()
	before := maps.Clone(st.values)
	if _, err := New(newFakeKernel(), st, noLeases{}, newFakePeers(), quiet()); err == nil || !strings.Contains(err.Error(), place[0]+"/"+place[1]) {
		t.Errorf("error %v, want one of %s/%s", err, place[0], place[1])
	}
	if !maps.EqualFunc(st.values, before, bytes.Equal) {
		t.Error("what is on record has changed")
	}
}

// FuzzRecord starts a service on any record. It is refused with its place and stays as it is; or all of it is taken over, the
// kernel can be made what it wants, and a restart wants the same.
func FuzzRecord(f *testing.F) {
	st := written(f)
	for _, i := range []int{1, 3, 4, 5} {
		network, endpoint := networkID(i), networkID(i)+"/"+endpointID(i*100)
		f.Add(network, st.values[[2]string{networkBucket, network}], endpoint, st.values[[2]string{endpointBucket, endpoint}])
	}
	f.Add(networkID(1), []byte("null"), "", []byte("{}"))
	f.Fuzz(func(t *testing.T, networkKey string, onNetwork []byte, endpointKey string, onEndpoint []byte) {
		ctx, k, st := context.Background(), newFakeKernel(), newFakeStore()
		if err := st.Apply(Change{networkBucket, networkKey, onNetwork}, Change{endpointBucket, endpointKey, onEndpoint}); err != nil {
			t.Fatal(err)
		}
		before := maps.Clone(st.values)
		s, err := New(k, st, noLeases{}, newFakePeers(), quiet())
		if err != nil {
			if what := err.Error(); !strings.Contains(what, networkBucket+"/"+networkKey) && !strings.Contains(what, endpointBucket+"/"+endpointKey) {
				t.Errorf("the error does not say where on record: %s", what)
			}
			if !maps.EqualFunc(st.values, before, bytes.Equal) {
				t.Error("what is on record has changed")
			}
			return
		}
		if networks, endpoints := len(s.Networks()), len(s.Endpoints()); networks+endpoints != len(st.values) {
			t.Fatalf("%d networks and %d endpoints from %q", networks, endpoints, st.values)
		}
		_ = s.Repair(ctx) // the host may be without the uplink, say
		s.each(func(n *network) {
			changes := []Change{{networkBucket, n.record.ID, encode(n.record)}}
			for _, e := range n.list() {
				changes = append(changes, Change{endpointBucket, n.record.ID + "/" + e.ID, encode(e)})
			}
			if err := st.Apply(changes...); err != nil {
				t.Fatal(err)
			}
		})
		again, err := New(k, st, noLeases{}, newFakePeers(), quiet())
		if err != nil {
			t.Fatalf("what was taken over and written back is refused: %v", err)
		}
		_ = again.Repair(ctx)
		if got, want := again.wanted().String(), s.wanted().String(); got != want {
			t.Errorf("a restart wants\n%s\nof what wanted\n%s", got, want)
		}
		for _, n := range s.Networks() {
			if err := s.DeleteNetwork(ctx, n.ID); err != nil || len(st.values) > 0 {
				t.Errorf("delete network: %v, left on record: %q", err, st.values)
			}
		}
	})
}
