// Command bench measures dockway against the engine's own drivers bridge and macvlan, in one run on
// one host of the lab, and prints tables. The same program runs in the lab's containers and machines.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/integration/lab"
)

func main() {
	lab.Main()
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		return part(args[0], args[1:])
	}
	s := settings{}
	flags := flag.NewFlagSet("bench", flag.ExitOnError)
	engines := flags.String("engines", "moby", "what to measure on: moby, debian, or both with a comma")
	flags.StringVar(&s.only, "only", "", "parts to measure, with commas: "+strings.Join(partNames(), ", "))
	flags.IntVar(&s.rounds, "rounds", 7, "rounds of which the median is taken")
	flags.DurationVar(&s.each, "each", time.Second, "how long one round of traffic is")
	write := flags.Bool("write", false, "keep the tables in docs/benchmarks.md, in place of those of the same engine and network")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	var all []*report
	for engine := range strings.SplitSeq(*engines, ",") {
		reports, err := measureOn(ctx, lab.Engine(engine), s)
		if ctx.Err() != nil {
			return errors.New("interrupted; nothing is left behind")
		}
		if err != nil {
			return fmt.Errorf("on engine %s: %w", engine, err)
		}
		for _, r := range reports {
			fmt.Printf("\n%s\n\n%s", r.heading, r.table())
		}
		all = append(all, reports...)
	}
	if *write {
		return keep(all)
	}
	return nil
}

// part is what the program does inside the lab.
func part(name string, args []string) error {
	number := func(i int) int {
		if i >= len(args) {
			return 0
		}
		n, err := strconv.Atoi(args[i])
		if err != nil {
			panic(err) // only this program calls itself
		}
		return n
	}
	switch name {
	case "serve": // CPU: each kind of server
		return serveAll(number(0))
	case "measure": // KIND ADDRESS CPU MILLISECONDS
		address, err := netip.ParseAddrPort(args[1])
		if err != nil {
			return err
		}
		l, err := measure(args[0], address, number(2), time.Duration(number(3))*time.Millisecond)
		if err != nil {
			return err
		}
		return printJSON(l)
	case "redirect": // FROM TO [peer]
		return redirect(args[0], args[1], len(args) > 2)
	case "network": // SOCKET create|delete
		if args[1] == "create" {
			return dial(args[0]).createNetwork()
		}
		return dial(args[0]).deleteNetwork()
	case "start": // SOCKET FIRST LAST FIRSTPORT PORTS: endpoints, each with ports
		p := dial(args[0])
		for i := number(1); i <= number(2); i++ {
			if _, err := p.start(i, number(3)+(i-number(1))*number(4), number(4)); err != nil {
				return err
			}
		}
		return nil
	case "stop": // SOCKET FIRST LAST
		p := dial(args[0])
		for i := number(1); i <= number(2); i++ {
			if err := p.stop(i); err != nil {
				return err
			}
		}
		return nil
	case "control": // SOCKET NUMBER PORT ROUNDS
		c, err := control(args[0], number(1), number(2), number(3))
		if err != nil {
			return err
		}
		return printJSON(c)
	}
	return fmt.Errorf("no part %q", name)
}
