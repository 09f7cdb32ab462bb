package main

import (
	"context"
	"fmt"
	"io"
	"os/signal"
	"runtime"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/plugin"
)

const pluginDir = "/run/docker/plugins"

// root is the command line. getenv gives the environment.
func root(getenv func(string) string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dockway",
		Short: "Windows HNS container networking for Docker on Linux",
		Long: `dockway is a network driver and address manager for Docker. Networks and containers are
managed with docker; dockway shows what became of them on this host.`,
		Example: `  docker network create -d dockway:latest --ipam-driver dockway:latest web
  docker run -d --network web -p 8080:80 nginx
  dockway ports`,
		SilenceUsage:  true, // an error is one line
		SilenceErrors: true, // main prints it
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.CompletionOptions.HiddenDefaultCmd = true
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w (see %s --help)", err, cmd.CommandPath())
	})
	cmd.AddCommand(serveCommand(getenv), versionCommand())
	show(cmd, getenv, "status", "Show whether all is well", `Whether the kernel holds what the record wants, how often others' changes were undone, and
what on this host can keep networks from working.`, plugin.StatusPath, printStatus)
	show(cmd, getenv, "networks", "List the networks", "The networks of this host.", plugin.NetworksPath, printNetworks)
	show(cmd, getenv, "endpoints", "List the endpoints", "The containers' connections to networks on this host.", plugin.EndpointsPath, printEndpoints)
	show(cmd, getenv, "ports", "List the published ports", "The published ports of this host. docker port cannot show those of a plugin.", plugin.PortsPath, printPorts)
	show(cmd, getenv, "peers", "List the hosts of the cluster", "The hosts that overlay networks span, as this host sees them, and the time that a message takes\nto them and back.", plugin.PeersPath, printPeers)
	cmd.AddCommand(overlayCommand(getenv), keygenCommand(), keyCommand(getenv))
	return cmd
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "dockway %s (%s %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}

func serveCommand(getenv func(string) string) *cobra.Command {
	env := func(key, otherwise string) string {
		if v := getenv(key); v != "" {
			return v
		}
		return otherwise
	}
	var c config
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the plugin",
		Long: `Answers the engine on a socket until SIGTERM or SIGINT. The engine itself runs this in a
managed plugin; as a service of the host it is run by systemd. Names in brackets are of the
environment. The gossip's key has no flag, because every user sees flags: it is GOSSIP_KEY.`,
		Example: `  dockway serve
  dockway serve --log-level debug --state-dir /srv/dockway`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
			defer stop()
			c.notify, c.cluster.key = getenv("NOTIFY_SOCKET"), getenv("GOSSIP_KEY")
			return serve(ctx, c, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.socket, "socket", env("DOCKWAY_SOCKET", pluginDir+"/dockway.sock"), "socket to answer on [DOCKWAY_SOCKET]")
	f.StringVar(&c.stateDir, "state-dir", "/var/lib/dockway", "directory of the record")
	f.StringVar(&c.logLevel, "log-level", env("LOG_LEVEL", "info"), "what to log: error, warning, info or debug [LOG_LEVEL]")
	f.StringVar(&c.defaultPools, "default-pools", env("DEFAULT_POOLS", ""), "subnets to choose from when a network has none, as 10.64.0.0/11:24,fd00:80::/48:64 [DEFAULT_POOLS]")
	f.StringVar(&c.collectAfter, "collect-after", env("COLLECT_AFTER", "2m"), "how long to keep what no engine knows any more, 1s or more [COLLECT_AFTER]")
	f.StringVar(&c.procSys, "proc-sys", "/proc/sys", "where the host's settings are")
	f.StringVar(&c.cluster.name, "node-name", env("NODE_NAME", ""), "this host's name in the cluster; the host name unless given [NODE_NAME]")
	f.StringVar(&c.cluster.label, "cluster", env("CLUSTER", "dockway"), "label of the hosts that belong together [CLUSTER]")
	f.StringVar(&c.cluster.join, "join", env("JOIN", ""), "hosts to find the others by, separated by commas [JOIN]")
	f.StringVar(&c.cluster.advertise, "advertise", env("ADVERTISE", ""), "address, or interface, at which other hosts reach this one [ADVERTISE]")
	f.StringVar(&c.cluster.gossipPort, "gossip-port", env("GOSSIP_PORT", "7947"), "TCP and UDP port of gossip [GOSSIP_PORT]")
	f.StringVar(&c.cluster.vxlanPort, "vxlan-port", env("VXLAN_PORT", "14789"), "UDP port of VXLAN, the same on all hosts [VXLAN_PORT]")
	f.StringVar(&c.namespaces, "namespaces", "/run/dockway/netns", "directory to hold overlay networks' namespaces in, below a mount that is shared with the host")
	cmd.SetContext(context.Background())
	return cmd
}

// show adds a command that asks the daemon for what is at a path and prints it.
func show[T any](parent *cobra.Command, getenv func(string) string, name, short, long, path string, print func(io.Writer, T, func() names) error) {
	var asJSON bool
	var dial func() (*daemon, error)
	cmd := &cobra.Command{
		Use:   name,
		Short: short,
		Long:  long,
		Example: fmt.Sprintf(`  dockway %[1]s
  dockway %[1]s --json`, name),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := dial()
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if asJSON {
				return d.copy(cmd.Context(), path, out)
			}
			var reply T
			if err := d.get(cmd.Context(), path, &reply); err != nil {
				return err
			}
			return print(out, reply, func() names { return d.names(cmd.Context(), getenv("DOCKER_HOST")) })
		},
	}
	dial = daemonFlag(cmd, getenv)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	parent.AddCommand(cmd)
}

// daemonFlag gives a command the flag that names dockway's socket, and what finds the daemon there.
func daemonFlag(cmd *cobra.Command, getenv func(string) string) func() (*daemon, error) {
	var socket string
	cmd.Flags().StringVar(&socket, "socket", "", "dockway's socket; below "+pluginDir+" it is found [DOCKWAY_SOCKET]")
	return func() (*daemon, error) { return find(pluginDir, socket, getenv("DOCKWAY_SOCKET")) }
}
