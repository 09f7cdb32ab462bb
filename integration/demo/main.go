// Command demo shows dockway's main job in a lab: hosts with real engines, the plugin installed as
// users install it, and every cell of the table of who reaches whom tried on the spot.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dockway/dockway/integration/lab"
)

func main() {
	lab.Main()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	err := run(ctx)
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case interrupted:
		fmt.Fprintln(os.Stderr, "\ninterrupted; nothing is left behind")
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, paint(red, "demo: ")+err.Error())
		os.Exit(1)
	}
}

// world is what the demo plays in.
type world struct {
	ctx     context.Context
	start   time.Time
	probe   string
	built   string
	lab     *lab.Lab
	lan     *lab.LAN
	outside *lab.Machine
	hosts   []*host
	mu      sync.Mutex
	failed  int
}

// host is one of the two simulated hosts.
type host struct {
	*lab.Host
	ip      string // on the LAN
	subnet  string // of its network web
	version string // of its engine
	other   *host
	web1    string // addresses of containers
	web2    string
	gateway string // of web
}

const outsideIP = "198.18.0.100"

func run(ctx context.Context) error {
	w := &world{ctx: ctx, start: time.Now()}
	defer func() {
		if w.lab != nil {
			w.lab.Close()
		}
	}()
	title("The lab: two hosts with engines of their own, and a machine outside, on one LAN")
	for _, act := range []func() error{w.prepare, w.containers, w.table, w.show, w.kill, w.flush} {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := act(); err != nil {
			return err
		}
	}
	if w.failed > 0 {
		return fmt.Errorf("%d of the things shown FAILED", w.failed)
	}
	fmt.Printf("\n%s after %s. The lab is removed. Next: make install, and your first network:\n"+
		"  docker network create -d dockway:latest --ipam-driver dockway:latest web\n"+
		"  docker run -d --network web -p 8080:80 …\n", paint(green, "All ok"), time.Since(w.start).Round(100*time.Millisecond))
	return nil
}

// prepare starts the lab.
func (w *world) prepare() error {
	root, err := lab.Root()
	if err != nil {
		return err
	}
	w.built = filepath.Join(root, "build", "plugin")
	if _, err := os.Stat(filepath.Join(w.built, "rootfs", "dockway")); err != nil {
		return fmt.Errorf("the plugin is not built (make plugin): %w", err)
	}
	if w.lab, err = lab.New(w.say); err != nil {
		return err
	}
	if w.probe, err = w.lab.BuildProbe(); err != nil {
		return err
	}
	if w.lan, err = w.lab.LAN("lan"); err != nil {
		return err
	}
	if w.outside, err = w.lab.Machine("outside"); err != nil {
		return err
	}
	if err := w.lan.Plug(w.outside, "eth0", outsideIP+"/24"); err != nil {
		return err
	}
	for _, network := range []string{"tcp", "udp"} {
		serve := w.outside.Command(context.Background(), w.probe, "serve", network, ":80")
		if err := serve.Start(); err != nil {
			return err
		}
		go serve.Wait() //nolint:errcheck // it ends with the lab
	}
	w.say("outside: %s, serves port 80", outsideIP)
	w.hosts = []*host{{ip: "198.18.0.1", subnet: "10.81.0.0/24"}, {ip: "198.18.0.2", subnet: "10.82.0.0/24"}}
	w.hosts[0].other, w.hosts[1].other = w.hosts[1], w.hosts[0]
	return w.each(func(h *host) error {
		engine := lab.Debian
		if h == w.hosts[1] {
			engine = lab.Moby
		}
		return w.raise(h, engine)
	})
}

// raise starts a host and installs the plugin.
func (w *world) raise(h *host, engine lab.Engine) error {
	w.say("%s: starting its engine", engine)
	var err error
	if h.Host, err = w.lab.Host(string(engine), engine); err != nil {
		return err
	}
	if h.version, err = h.engineVersion(); err != nil {
		return err
	}
	w.say("%s: %s, %s runs", h.Name, h.ip, h.version)
	if err := errors.Join(h.Plug(w.lan, "eth0", h.ip+"/24"), h.LoadImage(w.probe)); err != nil {
		return err
	}
	if err := h.InstallPlugin(w.built); err != nil {
		return err
	}
	w.say("%s: plugin %s is installed and enabled", h.Name, lab.Plugin)
	return nil
}

// engineVersion is short. An engine built from Go modules does not know its own: its folder does.
func (h *host) engineVersion() (string, error) {
	said, err := h.Docker("version", "-f", "{{.Server.Version}}")
	if err != nil {
		return "", err
	}
	where, err := h.Script("readlink -f $(command -v dockerd)")
	if err != nil {
		return "", err
	}
	if built := regexp.MustCompile(`moby-(v[0-9.]+(?:-(?:beta|rc)\.[0-9]+)?)`).FindStringSubmatch(where); built != nil {
		return "moby " + built[1], nil
	}
	said, _, _ = strings.Cut(said, "+")
	return "Docker " + said, nil
}

// containers makes networks and containers, on both hosts alike.
func (w *world) containers() error {
	title("On each host: two nat networks and three containers")
	commands := func(h *host) [][]string {
		serve := []string{lab.Image, "sh", "-c", "/probe serve udp :80 & exec /probe serve tcp :80"}
		return [][]string{
			{"network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "--subnet", h.subnet, "web"},
			{"network", "create", "-d", lab.Plugin, "--ipam-driver", lab.Plugin, "app"},
			append([]string{"run", "-d", "--name", "web1", "--network", "web", "-p", "8080:80", "-p", "8080:80/udp",
				"-p", "127.0.0.1:8081:80", "-p", "127.0.0.1:8081:80/udp"}, serve...),
			{"run", "-d", "--name", "web2", "--network", "web", lab.Image, "sleep", "100000"},
			append([]string{"run", "-d", "--name", "app1", "--network", "app"}, serve...),
		}
	}
	for _, c := range commands(w.hosts[0]) {
		line, _, long := strings.Cut("docker "+strings.Join(c, " "), " sh -c")
		if long {
			line += " …"
		}
		fmt.Println("  " + paint(dim, "$ "+line))
	}
	return w.each(func(h *host) error {
		for _, c := range commands(h) {
			if _, err := h.Docker(c...); err != nil {
				return err
			}
		}
		for _, ask := range []struct {
			container, field string
			to               *string
		}{{"web1", "IPAddress", &h.web1}, {"web2", "IPAddress", &h.web2}, {"web1", "Gateway", &h.gateway}} {
			var err error
			if *ask.to, err = h.Docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{."+ask.field+"}}{{end}}", ask.container); err != nil {
				return err
			}
		}
		// Somebody on the LAN who knows the way to the containers.
		if _, err := w.outside.Run("ip", "route", "replace", h.subnet, "via", h.ip); err != nil {
			return err
		}
		return lab.WaitFor(5*time.Second, "web1 on "+h.Name, func() (bool, error) {
			_, err := h.Run(w.probe, "-timeout", "1s", "ask", "tcp", h.web1+":80")
			return err == nil, err
		})
	})
}

// each does something on both hosts at once.
func (w *world) each(do func(*host) error) error {
	errs := make([]error, len(w.hosts))
	var wg sync.WaitGroup
	for i, h := range w.hosts {
		wg.Go(func() { errs[i] = do(h) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// say tells of progress.
func (w *world) say(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fmt.Printf("  %s %s\n", paint(dim, fmt.Sprintf("%5.1fs", time.Since(w.start).Seconds())), fmt.Sprintf(format, args...))
}

func title(text string) { fmt.Println("\n" + paint(bold, text)) }

const (
	bold  = "1"
	dim   = "2"
	red   = "31;1"
	green = "32;1"
)

var terminal = func() bool {
	_, err := unix.IoctlGetTermios(int(os.Stdout.Fd()), unix.TCGETS)
	return err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}()

// paint colours a text on a terminal.
func paint(colour, text string) string {
	if !terminal {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}
