package main

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/dockway/dockway/driver"
)

// table prints rows in columns of equal width.
func table(out io.Writer, rows ...[]string) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		if _, err := fmt.Fprintln(w, strings.Join(row, "\t")); err != nil {
			return err
		}
	}
	return w.Flush()
}

func printStatus(out io.Writer, s driver.Status, _ func() names) error {
	sync := "yes"
	if !s.InSync {
		sync = "no: " + s.Problem
	}
	rows := [][]string{
		{"networks", strconv.Itoa(s.Networks)},
		{"endpoints", strconv.Itoa(s.Endpoints)},
		{"ports", strconv.Itoa(s.Ports)},
		{"in sync", sync},
		{"repairs", strconv.FormatUint(s.Repairs, 10)},
	}
	for _, w := range s.Warnings {
		rows = append(rows, []string{"warning", w})
	}
	return table(out, rows...)
}

func printNetworks(out io.Writer, networks []driver.NetworkInfo, known func() names) error {
	n := known()
	rows := [][]string{}
	for _, i := range networks {
		internal := "no"
		if i.Internal {
			internal = "yes"
		}
		rows = append(rows, []string{n.of(i.ID), brief(i.ID), i.Mode, strings.Join(i.Subnets, ","), i.Bridge, strconv.Itoa(i.MTU), internal, strconv.Itoa(i.Endpoints)})
	}
	return sorted(out, []string{"NAME", "NETWORK ID", "MODE", "SUBNETS", "BRIDGE", "MTU", "INTERNAL", "ENDPOINTS"}, rows)
}

func printEndpoints(out io.Writer, endpoints []driver.EndpointInfo, known func() names) error {
	n := known()
	rows := [][]string{}
	for _, i := range endpoints {
		rows = append(rows, []string{n.of(i.Network), brief(i.ID), cmp.Or(i.Address, "-"), cmp.Or(i.Address6, "-"), i.MAC, i.Link, i.State})
	}
	return sorted(out, []string{"NETWORK", "ENDPOINT ID", "ADDRESS", "IPV6 ADDRESS", "MAC", "LINK", "STATE"}, rows)
}

// sorted prints a table by its rows' first column, then as given.
func sorted(out io.Writer, head []string, rows [][]string) error {
	slices.SortStableFunc(rows, func(a, b []string) int { return strings.Compare(a[0], b[0]) })
	return table(out, append([][]string{head}, rows...)...)
}

func printPorts(out io.Writer, ports []driver.PortInfo, known func() names) error {
	n := known()
	ports = slices.SortedStableFunc(slices.Values(ports), func(a, b driver.PortInfo) int {
		return cmp.Or(cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.HostIP, b.HostIP))
	})
	rows := [][]string{}
	for _, i := range ports {
		rows = append(rows, []string{
			fmt.Sprintf("%s/%s -> %s", hostPort(i.HostIP, i.HostPort), i.Protocol, hostPort(i.ContainerIP, i.ContainerPort)),
			"network " + n.of(i.Network),
			"endpoint " + brief(i.Endpoint),
		})
	}
	return table(out, rows...)
}

func hostPort(host string, port uint16) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}
