package kernel_test

import (
	"net"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/plan"
)

// TestFlowsFollow sends from one socket all the time, as clients of UDP do, and changes where the
// port is led to meanwhile.
func TestFlowsFollow(t *testing.T) {
	inNamespace(t)
	run(t, "ip", "link", "set", "lo", "up")
	for _, a := range []string{"192.0.2.1/32", "192.0.2.2/32", "10.9.0.1/32", "10.9.0.2/32"} {
		run(t, "ip", "addr", "add", a, "dev", "lo")
	}
	k := open(t, kernel.Config{Tables: tables()})
	do(t, k, add(plan.Table{Table: inetTable()})...)
	received := make(chan string, 100)
	listen := func(address string) {
		conn, err := net.ListenPacket("udp4", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		go func() {
			buf := make([]byte, 1)
			for {
				if _, _, err := conn.ReadFrom(buf); err != nil {
					return
				}
				received <- address
			}
		}()
	}
	for _, address := range []string{"10.9.0.1:53", "10.9.0.2:53", "192.0.2.1:5353", "192.0.2.2:5353"} {
		listen(address)
	}
	client, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 9, 0, 1), Port: 4000}, &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 5353})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	bystander, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 9, 0, 1), Port: 4001}, &net.UDPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 5353})
	if err != nil {
		t.Fatal(err)
	}
	defer bystander.Close()
	arrives := func(from net.Conn, want string) bool {
		t.Helper()
		if _, err := from.Write([]byte("x")); err != nil {
			return false // refused, when nobody listens
		}
		select {
		case got := <-received:
			return got == want
		case <-time.After(time.Second):
			return false
		}
	}
	reaches := func(from net.Conn, want, when string) {
		t.Helper()
		eventually(t, when+": reaches "+want, func() bool { return arrives(from, want) })
	}
	port := func(target string) plan.Element {
		return plan.Element{Set: ports, Elem: "192.0.2.1 . udp . 5353", Data: target}
	}
	one, two := port("10.9.0.1 . 53"), port("10.9.0.2 . 53")
	reaches(client, "192.0.2.1:5353", "before")
	reaches(bystander, "192.0.2.2:5353", "before")
	do(t, k, add(one)...)
	reaches(client, "10.9.0.1:53", "published")
	do(t, k, plan.Op{Verb: plan.Replace, Object: two, Old: one})
	reaches(client, "10.9.0.2:53", "published elsewhere")
	do(t, k, remove(two)...)
	reaches(client, "192.0.2.1:5353", "no longer published")
	// On every address of the host; the flow of the bystander goes there too then.
	anywhere := plan.Element{Set: anyPort, Elem: "udp . 5353", Data: "10.9.0.2 . 53"}
	do(t, k, add(anywhere)...)
	reaches(client, "10.9.0.2:53", "published on every address")
	reaches(bystander, "10.9.0.2:53", "published on every address")
	do(t, k, remove(anywhere)...)
	reaches(bystander, "192.0.2.2:5353", "no longer published on every address")
}
