// Command probe is what the lab runs inside containers and on machines without an engine: it
// serves and asks over TCP and UDP, counts what arrives, asks for neighbours and carries VLANs.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

const usage = `probe serve tcp|udp ADDRESS           answer each client with its address, until ended
probe ask tcp|udp ADDRESS             print what the server says: the address it saw
probe hold tcp ADDRESS                one connection, a line each 10 ms there and back, until a line on stdin; prints how many
` + streamUsage + "\n" + pulseUsage + "\n" + neighbourUsage + "\n" + trunkUsage + "\n" + rawUsage

func main() {
	timeout := flag.Duration("timeout", 2*time.Second, "how long to wait for an answer")
	flag.Parse()
	if err := run(flag.Args(), *timeout); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string, timeout time.Duration) error {
	if len(args) < 3 {
		return errors.New(usage)
	}
	command, network, address := args[0], args[1], args[2]
	switch {
	case command == "arp" && len(args) == 3:
		return arp(args[1], args[2], timeout)
	case command == "nd" && len(args) == 3:
		return nd(args[1], args[2], timeout)
	case command == "ping" && len(args) == 4:
		return ping(args[1], args[2], args[3], timeout)
	case command == "trunk" && len(args) == 4:
		return trunk(args[1], args[2], args[3])
	}
	switch command + " " + network {
	case "serve tcp":
		return serveTCP(address)
	case "serve udp":
		return serveUDP(address)
	case "ask tcp", "ask udp":
		said, err := ask(network, address, timeout)
		if err == nil {
			fmt.Println(said)
		}
		return err
	case "hold tcp":
		return hold(address, timeout)
	case "stream serve":
		return serveStream(address, timeout)
	case "stream to":
		return streamTo(address, timeout)
	case "pulse serve":
		return servePulse(address)
	case "pulse to":
		return sendPulse(address)
	}
	return raw(command+" "+network, address, args[3:], timeout)
}

// serveTCP tells each client its address, and then sends back every line it gets.
func serveTCP(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close() //nolint:errcheck // the client sees it
			if _, err := fmt.Fprintln(conn, conn.RemoteAddr()); err != nil {
				return
			}
			lines := bufio.NewScanner(conn)
			for lines.Scan() {
				if _, err := fmt.Fprintln(conn, lines.Text()); err != nil {
					return
				}
			}
		}()
	}
}

func serveUDP(address string) error {
	conn, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	b := make([]byte, 1500)
	for {
		_, from, err := conn.ReadFrom(b)
		if err != nil {
			return err
		}
		if _, err := conn.WriteTo([]byte(from.String()+"\n"), from); err != nil {
			return err
		}
	}
}

func ask(network, address string, timeout time.Duration) (string, error) {
	deadline := time.Now().Add(timeout)
	conn, err := net.DialTimeout(network, address, timeout)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck // asked and answered
	if err := conn.SetDeadline(deadline); err != nil {
		return "", err
	}
	if network == "udp" {
		if _, err := conn.Write([]byte("?")); err != nil {
			return "", err
		}
	}
	said, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(said), err
}

// hold keeps a connection busy until a line comes on stdin. It fails when the connection does.
func hold(address string, timeout time.Duration) error {
	conn, err := net.DialTimeout("tcp", address, timeout)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // done with it
	answers := bufio.NewReader(conn)
	if _, err := answers.ReadString('\n'); err != nil {
		return err
	}
	fmt.Println("holding")
	stop := make(chan struct{})
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // the end of stdin ends it too
		close(stop)
	}()
	for n := 0; ; n++ {
		select {
		case <-stop:
			fmt.Println(n)
			return nil
		case <-time.After(10 * time.Millisecond):
		}
		if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			return err
		}
		want := fmt.Sprintf("line %d\n", n)
		if _, err := conn.Write([]byte(want)); err != nil {
			return fmt.Errorf("after %d lines: %w", n, err)
		}
		if got, err := answers.ReadString('\n'); err != nil || got != want {
			return fmt.Errorf("after %d lines: got %q, %w", n, got, err)
		}
	}
}
