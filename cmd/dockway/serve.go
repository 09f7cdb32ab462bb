package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/writer"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/driver/hostport"
	"github.com/dockway/dockway/driver/kernel"
	"github.com/dockway/dockway/driver/mode"
	"github.com/dockway/dockway/driver/plan/nft"
	"github.com/dockway/dockway/driver/store"
	"github.com/dockway/dockway/ipam"
	"github.com/dockway/dockway/ipam/dhcp"
	"github.com/dockway/dockway/plugin"
)

// drainTime is how long calls under way may go on after a signal: an engine kills its plugin
// 10 s after it has asked it to stop.
const drainTime = 8 * time.Second

// routesLimit is how long the kernel may take to list the host's routes.
const routesLimit = 5 * time.Second

// config is what serve is told.
type config struct {
	socket       string
	stateDir     string
	logLevel     string
	defaultPools string
	collectAfter string
	procSys      string
	namespaces   string
	cluster      clusterConfig
	notify       string // systemd's socket; empty: nobody to notify
}

// serve runs the plugin until ctx ends or something fails.
func serve(ctx context.Context, c config, stdout, stderr io.Writer) (err error) {
	log, err := newLog(c.logLevel, stdout, stderr)
	if err != nil {
		return err
	}
	hostSettings, err := c.cluster.settings()
	if err != nil {
		return err
	}
	pools, err := ipam.ParsePools(c.defaultPools)
	if err != nil {
		return fmt.Errorf("DEFAULT_POOLS: %w", err)
	}
	collectAfter, err := time.ParseDuration(c.collectAfter)
	if err != nil || collectAfter < minCollect {
		return fmt.Errorf("COLLECT_AFTER=%q: give a time of at least %s, such as 2m", c.collectAfter, minCollect)
	}
	closing := func(what string, c io.Closer) {
		if e := c.Close(); e != nil {
			err = errors.Join(err, fmt.Errorf("close %s: %w", what, e))
		}
	}
	record, err := store.Open(c.stateDir)
	if err != nil {
		return err
	}
	defer closing("the record", record)
	sockets, err := hostport.New(log)
	if err != nil {
		return err
	}
	defer closing("the published ports", sockets)
	host, err := kernel.New(kernel.Config{Tables: []*nft.Table{mode.InetTable(), mode.BridgeTable()}, NamespaceTables: mode.NamespaceTables(), Namespaces: c.namespaces, Sockets: sockets, ProcSys: c.procSys, Log: log})
	if err != nil {
		return fmt.Errorf("reach the kernel: %w", err)
	}
	defer closing("the kernel", host)
	seed, err := hostSeed(record)
	if err != nil {
		return err
	}
	hosts, err := newCluster(hostSettings, record, seed, log)
	if err != nil {
		return err
	}
	leases := &leases{log: log}
	client, err := dhcp.New(dhcp.Config{Log: log, Changed: leases.changed, Holder: leases.holder})
	if err != nil {
		return fmt.Errorf("speak DHCP: %w", err)
	}
	defer closing("the DHCP client", client)
	addresses, err := ipam.New(record, func() ([]netip.Prefix, error) { return routes(host) }, ipam.Config{Pools: pools, Seed: seed, Leaser: client, MAC: leases.mac, Cluster: hosts})
	if err != nil {
		return err
	}
	hosts.outgoing, hosts.busy, hosts.blocks = host.Outgoing, addresses.Busy, addresses.Blocks
	leases.addresses.Store(addresses)
	networks, err := driver.New(host, record, leases, hosts, log)
	if err != nil {
		return err
	}
	leases.networks.Store(networks)
	listener, err := plugin.Listen(c.socket, log)
	if err != nil {
		return err
	}
	server := plugin.New(plugin.Config{Networks: networks, Addresses: addresses, Cluster: hosts, Log: log})
	return run(ctx, c, log, server, listener,
		task{"the network service", networks.Run},
		task{"the cluster", hosts.run},
		task{"claims ahead", claimAhead(addresses, log)},
		task{"the collector of addresses", newCollector(networks, addresses, collectAfter, log).run})
}

// task is work in the background. It ends with its context, or with an error.
type task struct {
	name string
	do   func(context.Context) error
}

// run serves until ctx ends or a task fails. Calls are drained before the tasks are ended.
func run(ctx context.Context, c config, log *logrus.Entry, server *plugin.Server, listener net.Listener, tasks ...task) error {
	asked := ctx
	ctx, stop := context.WithCancelCause(asked)
	defer stop(nil)
	background, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	var group sync.WaitGroup
	start := func(t task) {
		group.Go(func() {
			if err := t.do(background); err != nil {
				stop(fmt.Errorf("%s ended: %w", t.name, err))
			}
		})
	}
	for _, t := range tasks {
		start(t)
	}
	start(task{"the server", func(context.Context) error { return server.Serve(listener) }})
	log.Infof("dockway %s answers on %s", version, listener.Addr())
	notify(c.notify, "READY=1", log)

	<-ctx.Done()
	log.Info("stopping")
	notify(c.notify, "STOPPING=1", log)
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	err := server.Shutdown(drain)
	end()
	group.Wait()
	if asked.Err() == nil {
		err = errors.Join(context.Cause(ctx), err)
	}
	return err
}

// newLog writes errors to stderr and everything else to stdout: the engine logs the one at level
// error and the other at level info. Both the engine and systemd write the time in front.
func newLog(level string, stdout, stderr io.Writer) (*logrus.Entry, error) {
	l, err := logrus.ParseLevel(level)
	if err != nil {
		return nil, fmt.Errorf("LOG_LEVEL=%q is not known: use error, warning, info or debug", level)
	}
	logger := logrus.New()
	logger.SetLevel(l)
	logger.SetOutput(io.Discard)
	logger.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})
	logger.AddHook(&writer.Hook{Writer: stderr, LogLevels: []logrus.Level{logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel}})
	logger.AddHook(&writer.Hook{Writer: stdout, LogLevels: []logrus.Level{logrus.WarnLevel, logrus.InfoLevel, logrus.DebugLevel, logrus.TraceLevel}})
	stdlog.SetFlags(0)
	stdlog.SetOutput(logger.WriterLevel(logrus.WarnLevel)) // net/http has complaints of its own
	return logrus.NewEntry(logger), nil
}

// notify tells systemd how far dockway is (sd_notify(3)).
func notify(socket, state string, log *logrus.Entry) {
	if socket == "" {
		return
	}
	conn, err := net.Dial("unixgram", socket)
	if err == nil {
		_, err = conn.Write([]byte(state))
		err = errors.Join(err, conn.Close())
	}
	if err != nil {
		log.WithError(err).Warnf("tell systemd %s", state)
	}
}

// routes are the host's routes as prefixes.
func routes(host *kernel.Kernel) ([]netip.Prefix, error) {
	ctx, cancel := context.WithTimeout(context.Background(), routesLimit)
	defer cancel()
	all, err := host.Routes(ctx)
	var out []netip.Prefix
	for _, r := range all {
		out = append(out, r.Prefix)
	}
	return out, err
}
