package kernel_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/dockway/dockway/driver/kernel"
)

// station puts a VLAN on the far end of the wire too, and gives it addresses there by a macvlan.
func (l *vlanLab) station(t testing.TB, id int, addresses ...string) {
	t.Helper()
	var far *kernel.Kernel
	l.far.do(t, func() (err error) {
		far, err = kernel.New(kernel.Config{})
		return err
	})
	t.Cleanup(func() { far.Close() })
	v := vlan(9, id)
	v.Uplink = "wire"
	m := macvlan(9, v.Name)
	ops := add(v, m)
	for _, a := range addresses {
		ops = append(ops, add(address(m.Name, a))...)
	}
	l.far.do(t, func() error { return far.Do(context.Background(), ops) })
}

// transfer sends what source gives over TCP between two places.
func transfer(t testing.TB, from, to *place, address string, source io.Reader, sink io.Writer) {
	t.Helper()
	var listener net.Listener
	to.do(t, func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	})
	defer listener.Close()
	received := make(chan error, 1)
	go func() {
		c, err := listener.Accept()
		if err != nil {
			received <- err
			return
		}
		_, err = io.CopyBuffer(sink, struct{ io.Reader }{c}, make([]byte, 1<<20))
		received <- errors.Join(err, c.Close())
	}()
	var connection net.Conn
	from.do(t, func() (err error) {
		connection, err = (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp", listener.Addr().String())
		return err
	})
	defer connection.Close()
	if err := connection.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{connection}, source, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	connection.Close()
	if err := <-received; err != nil {
		t.Fatal(err)
	}
}

// TestVLANBulk: TCP crosses a VLAN in segments larger than a frame, both ways, and nothing is
// damaged. The host's own address on the uplink goes on beside it.
func TestVLANBulk(t *testing.T) {
	l := newVLANLab(t)
	v := vlan(1, 100)
	do(t, l.k, add(v)...)
	c := behind(t, v, 1)
	c.run(t, "ip addr add 198.18.1.1/24 dev eth0", "ip addr add fd00:1::1/64 dev eth0 nodad")
	l.station(t, 100, "198.18.1.2/24", "fd00:1::2/64")
	here(t, "ip addr add 198.18.0.1/24 dev eth0")
	l.far.run(t, "ip addr add 198.18.0.2/24 dev wire")
	host := samePlace(t)
	l.settle(t)
	for _, way := range []struct {
		name, address string
		from, to      *place
		vlan          int // of what the wire gets
	}{
		{"out", "198.18.1.2", c, l.far, 100},
		{"in", "198.18.1.1", l.far, c, 100},
		{"out, IPv6", "fd00:1::2", c, l.far, 100},
		{"in, IPv6", "fd00:1::1", l.far, c, 100},
		{"the host's own, out", "198.18.0.2", host, l.far, noTag},
		{"the host's own, in", "198.18.0.1", l.far, host, noTag},
	} {
		wire := l.far.tap(t, "wire")
		sent, got := sha256.New(), sha256.New()
		source := io.LimitReader(rand.NewChaCha8([32]byte{1}), 16<<20)
		transfer(t, way.from, way.to, way.address, io.TeeReader(source, sent), got)
		if fmt.Sprintf("%x", sent.Sum(nil)) != fmt.Sprintf("%x", got.Sum(nil)) {
			t.Errorf("%s: not what was sent arrived", way.name)
		}
		frames, large := 0, 0
		for {
			f, kind, ok := wire.read(t, 50*time.Millisecond)
			if !ok {
				break
			}
			if f.size == 0 || kind == 0x0806 || f.vlan != way.vlan {
				continue
			}
			if frames++; f.size > 1514 {
				large++
			}
		}
		if frames == 0 || large == 0 && way.from != l.far {
			t.Errorf("%s: of %d frames on the wire with VLAN %d, %d are large segments", way.name, frames, way.vlan, large)
		}
		wire.file.Close()
	}
}

// BenchmarkVLAN compares a container's TCP through a VLAN with the same without one.
func BenchmarkVLAN(b *testing.B) {
	for _, id := range []int{noTag, 100} {
		name := "untagged"
		if id != noTag {
			name = "tagged"
		}
		b.Run(name, func(b *testing.B) {
			l := newVLANLab(b)
			var c *place
			if id == noTag {
				here(b, "ip link add br1 type bridge", "ip link set br1 addrgenmode none up", "ip link set eth0 master br1")
				c = container(b, "br1", 1)
				l.far.run(b, "ip addr add 198.18.1.2/24 dev wire")
			} else {
				v := vlan(1, id)
				do(b, l.k, add(v)...)
				c = behind(b, v, 1)
				l.station(b, id, "198.18.1.2/24")
			}
			c.run(b, "ip addr add 198.18.1.1/24 dev eth0")
			l.settle(b)
			const size = 1 << 30
			b.SetBytes(size)
			for b.Loop() {
				transfer(b, c, l.far, "198.18.1.2", io.LimitReader(zeros{}, size), io.Discard)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }
