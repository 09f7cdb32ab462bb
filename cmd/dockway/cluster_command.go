package main

import (
	"cmp"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/plugin"
)

// keySize is that of AES-256, which memberlist takes for keys of 32 bytes.
const keySize = 32

func keygenCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "keygen",
		Short:   "Make a key for the gossip of a cluster",
		Long:    "Prints a random key. All hosts of a cluster have the same.",
		Example: "  docker plugin set dockway GOSSIP_KEY=$(dockway keygen)",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			key := make([]byte, keySize)
			if _, err := rand.Read(key); err != nil {
				return err
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), base64.StdEncoding.EncodeToString(key))
			return err
		},
	}
}

// keyCommand changes the keys of the whole cluster.
func keyCommand(getenv func(string) string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Change the key of the cluster's gossip",
		Long: `Changes the key on all hosts of the cluster at once, without loss: add the new key, use it,
remove the old one. Each step says which hosts have followed; go on when all have. A host that
is away meanwhile needs its GOSSIP_KEY set before it comes back.`,
		Example: `  new=$(dockway keygen)
  dockway key add $new
  dockway key use $new
  dockway key remove $old`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	for verb, short := range map[string]string{
		"add":    "Have all hosts understand a key, too",
		"use":    "Have all hosts speak with a key that they have",
		"remove": "Have all hosts forget a key that they do not speak with",
	} {
		var dial func() (*daemon, error)
		c := &cobra.Command{
			Use:     verb + " KEY",
			Short:   short,
			Long:    short + ". It says which hosts have followed.",
			Example: "  dockway key " + verb + " $(cat key)",
			Args:    cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				d, err := dial()
				if err != nil {
					return err
				}
				var replies []driver.KeyReply
				if err := d.post(cmd.Context(), plugin.ChangeKeyPath, plugin.KeyRequest{Verb: verb, Key: args[0]}, &replies); err != nil {
					return err
				}
				return printKeyReplies(cmd.OutOrStdout(), replies)
			},
		}
		dial = daemonFlag(c, getenv)
		cmd.AddCommand(c)
	}
	return cmd
}

func printKeyReplies(out io.Writer, replies []driver.KeyReply) error {
	rows := [][]string{}
	failed := 0
	for _, r := range replies {
		if r.Error != "" {
			failed++
		}
		rows = append(rows, []string{r.Host, cmp.Or(r.Error, "done")})
	}
	if err := sorted(out, []string{"HOST", "KEY"}, rows); err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d hosts have not followed: see to them and repeat the command, before the next step", failed, len(replies))
	}
	return nil
}

// overlayCommand shows who is where in an overlay network.
func overlayCommand(getenv func(string) string) *cobra.Command {
	var asJSON bool
	var dial func() (*daemon, error)
	cmd := &cobra.Command{
		Use:   "overlay [NETWORK]",
		Short: "Show who is where in an overlay network",
		Long:  "The addresses of an overlay network, or of all, with the host that each is on.",
		Example: `  dockway overlay backend
  dockway overlay backend --json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := dial()
			if err != nil {
				return err
			}
			var overlays []driver.OverlayInfo
			if err := d.get(cmd.Context(), plugin.OverlaysPath, &overlays); err != nil {
				return err
			}
			n := d.names(cmd.Context(), getenv("DOCKER_HOST"))
			if len(args) == 1 {
				if overlays = chosen(overlays, n, args[0]); len(overlays) == 0 {
					return fmt.Errorf("no overlay network of this host is called %q: dockway networks lists them", args[0])
				}
			}
			if asJSON {
				text, err := json.Marshal(overlays)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", text)
				return err
			}
			return printOverlays(cmd.OutOrStdout(), overlays, n)
		},
	}
	dial = daemonFlag(cmd, getenv)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// chosen are the networks of a name, of an ID, or of the beginning of one.
func chosen(overlays []driver.OverlayInfo, n names, name string) []driver.OverlayInfo {
	return slices.DeleteFunc(overlays, func(o driver.OverlayInfo) bool {
		return n.of(o.ID) != name && o.Name != name && (len(name) < 4 || !strings.HasPrefix(o.ID, name))
	})
}

func printOverlays(out io.Writer, overlays []driver.OverlayInfo, n names) error {
	rows := [][]string{}
	for _, o := range overlays {
		for _, i := range o.Entries {
			host := i.Host
			if i.Here {
				host = "this host"
			}
			rows = append(rows, []string{n.of(o.ID), strconv.FormatUint(uint64(i.VSID), 10), i.Address.String(), i.MAC, host, i.VTEP.String()})
		}
	}
	return sorted(out, []string{"NETWORK", "VSID", "ADDRESS", "MAC", "HOST", "HOST ADDRESS"}, rows)
}

func printPeers(out io.Writer, peers []driver.PeerInfo, _ func() names) error {
	if len(peers) == 0 {
		return errors.New("this dockway is in no cluster: set JOIN to the addresses of its hosts")
	}
	rows := [][]string{}
	bearers := map[string]int{}
	for _, p := range peers {
		bearers[p.Name]++
	}
	for _, p := range peers {
		name, rtt := p.Name, "-"
		if bearers[p.Name] > 1 {
			name = p.ID // the name, and what tells hosts of one name apart
		}
		if p.Self {
			name += " (this host)"
		}
		if p.RTT > 0 {
			rtt = p.RTT.Round(10 * time.Microsecond).String()
		}
		rows = append(rows, []string{name, p.Address.String(), p.State, rtt, strconv.Itoa(p.Facts), p.Version})
	}
	return sorted(out, []string{"HOST", "ADDRESS", "STATE", "ROUND TRIP", "FACTS", "VERSION"}, rows)
}
