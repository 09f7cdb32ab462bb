package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dockway/dockway/driver"
	"github.com/dockway/dockway/plugin"
)

// patience is how long the command line waits for an answer: longer than the daemon has for it, which says
// then what takes so long.
const patience = 15 * time.Second

// daemon is a running dockway.
type daemon struct {
	socket string
	client *http.Client
}

// find gives the daemon on the socket that is named, with a flag or in the environment, or else
// the one that answers in the directory where engines look for plugins.
func find(dir, flag, env string) (*daemon, error) {
	for _, named := range []string{flag, env} {
		if named != "" {
			return newDaemon(named), nil
		}
	}
	places := []string{filepath.Join(dir, "dockway.sock")}
	managed, err := filepath.Glob(filepath.Join(dir, "*", "dockway.sock"))
	if err != nil {
		return nil, fmt.Errorf("look for dockway's socket: %w", err)
	}
	var found []string
	var refused error
	for _, place := range append(places, managed...) {
		conn, err := net.DialTimeout("unix", place, time.Second)
		switch {
		case err == nil:
			found = append(found, place)
			_ = conn.Close() // nothing was said on it
		case errors.Is(err, fs.ErrPermission):
			refused = err
		}
	}
	switch {
	case len(found) == 1:
		return newDaemon(found[0]), nil
	case len(found) > 1:
		return nil, fmt.Errorf("several dockways answer: choose one with --socket: %s", strings.Join(found, ", "))
	case refused != nil:
		return nil, fmt.Errorf("only root may ask dockway: %w", refused)
	case os.Geteuid() != 0:
		return nil, fmt.Errorf("no dockway answers below %s: only root may look there", dir)
	}
	return nil, fmt.Errorf("no dockway answers below %s: is it running (docker plugin ls, systemctl status dockway)? --socket names another place", dir)
}

func newDaemon(socket string) *daemon { return &daemon{socket: socket, client: unixClient(socket)} }

func unixClient(socket string) *http.Client {
	return &http.Client{Timeout: patience, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
}

// get asks for what is at a path.
func (d *daemon) get(ctx context.Context, path string, reply any) error {
	body, err := d.ask(ctx, path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, reply); err != nil {
		return fmt.Errorf("understand the answer of %s: %w", d.socket, err)
	}
	return nil
}

// copy prints what is at a path as it is.
func (d *daemon) copy(ctx context.Context, path string, out io.Writer) error {
	body, err := d.ask(ctx, path)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s\n", body)
	return err
}

// post sends a request and gives the answer.
func (d *daemon) post(ctx context.Context, path string, request, reply any) error {
	text, err := json.Marshal(request)
	if err != nil {
		return err
	}
	body, err := d.exchange(ctx, http.MethodPost, path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, reply); err != nil {
		return fmt.Errorf("understand the answer of %s: %w", d.socket, err)
	}
	return nil
}

func (d *daemon) ask(ctx context.Context, path string) ([]byte, error) {
	return d.exchange(ctx, http.MethodGet, path, nil)
}

func (d *daemon) exchange(ctx context.Context, method, path string, request io.Reader) ([]byte, error) {
	status, body, err := fetch(ctx, d.client, method, path, request)
	if err != nil {
		return nil, fmt.Errorf("ask dockway on %s: %w", d.socket, err)
	}
	if status != http.StatusOK {
		var refusal struct{ Err string }
		if err := json.Unmarshal(body, &refusal); err != nil || refusal.Err == "" {
			return nil, fmt.Errorf("what answers on %s is no dockway: %d %.100q", d.socket, status, body)
		}
		return nil, errors.New(refusal.Err)
	}
	return body, nil
}

func fetch(ctx context.Context, client *http.Client, method, path string, request io.Reader) (status int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost/"+path, request)
	if err != nil {
		return 0, nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		if cause := errors.Unwrap(err); cause != nil { // without the URL, which names no host
			err = cause
		}
		return 0, nil, err
	}
	body, err = io.ReadAll(resp.Body)
	return resp.StatusCode, body, errors.Join(err, resp.Body.Close())
}

// names are the networks' names by ID.
type names map[string]string

// of is a network's name, or else its ID as the engine shows it.
func (n names) of(id string) string {
	if name := n[id]; name != "" {
		return name
	}
	return brief(id)
}

// names asks for the networks' names: of the engine, which does not tell its drivers, and else of
// dockway, which knows those given with -o network_name. What does not answer is done without.
func (d *daemon) names(ctx context.Context, engine string) names {
	out := names{}
	var networks []driver.NetworkInfo
	if err := d.get(ctx, plugin.NetworksPath, &networks); err == nil {
		for _, n := range networks {
			out[n.ID] = n.Name
		}
	}
	socket, ok := strings.CutPrefix(engine, "unix://")
	if engine == "" {
		socket, ok = "/var/run/docker.sock", true
	}
	if !ok {
		return out // another host's engine
	}
	client := unixClient(socket)
	client.Timeout = 2 * time.Second
	var known []struct{ Id, Name string }
	if status, body, err := fetch(ctx, client, http.MethodGet, "networks", nil); err == nil && status == http.StatusOK && json.Unmarshal(body, &known) == nil {
		for _, n := range known {
			if _, ours := out[n.Id]; ours {
				out[n.Id] = n.Name
			}
		}
	}
	return out
}

func brief(id string) string { return id[:min(12, len(id))] }
