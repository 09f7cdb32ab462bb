package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/docker/docker/client"
)

// Engine names one of the engines that setup.sh puts into the cache.
type Engine string

// The engines.
const (
	Debian Engine = "debian" // 20.10
	Moby   Engine = "moby"   // the current one
)

// Image is the container image of the lab: busybox, and this program as /probe.
const Image = "lab"

// Host is a machine with an engine.
type Host struct {
	*Machine
	Engine Engine
	Flags  []string // of dockerd, besides what the lab needs
	plugs  []plug
	engine *exec.Cmd
}

// cache is where setup.sh puts engines.
func cache() (string, error) {
	if dir := os.Getenv("DOCKWAY_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "dockway"), err
}

// Host starts a machine with an engine. Like most hosts that run one, it passes bridged frames to
// iptables.
func (l *Lab) Host(name string, engine Engine, flags ...string) (*Host, error) {
	dir, err := cache()
	if err != nil {
		return nil, err
	}
	bin := filepath.Join(dir, string(engine), "bin")
	if _, err := os.Stat(filepath.Join(bin, "dockerd")); err != nil {
		return nil, fmt.Errorf("engine %s is not set up (make setup): %w", engine, err)
	}
	m, err := l.Machine(name)
	if err != nil {
		return nil, err
	}
	m.env = []string{"PATH=" + bin + ":/usr/sbin:/usr/bin:/sbin:/bin", "DOCKER_HOST=unix:///run/docker.sock", "DOCKER_CONFIG=" + m.dir, "HOME=" + m.dir}
	h := &Host{Machine: m, Engine: engine, Flags: flags}
	return h, h.StartEngine()
}

// plug is a link of a host's.
type plug struct {
	lan       *LAN
	link      string
	addresses []string
}

// Plug connects the host to a segment, now and after each reboot.
func (h *Host) Plug(n *LAN, link string, addresses ...string) error {
	h.plugs = append(h.plugs, plug{n, link, addresses})
	return n.Plug(h.Machine, link, addresses...)
}

// StartEngine starts the engine and waits until it answers.
func (h *Host) StartEngine() error {
	if _, err := h.Script("sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1; rm -f /run/docker.pid"); err != nil {
		return err
	}
	log, err := os.OpenFile(h.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() //nolint:errcheck // the engine has its own
	group, err := h.engineGroup()
	if err != nil {
		return err
	}
	join := `for g in /sys/fs/cgroup/$0/cgroup.procs /sys/fs/cgroup/*/$0/cgroup.procs; do [ ! -e "$g" ] || echo $$ >"$g"; done; exec "$@"`
	args := []string{"sh", "-ec", join, group, "dockerd", "--data-root", filepath.Join(h.dir, "data"), "--exec-root", "/run/docker", "--pidfile", "/run/docker.pid",
		"-H", "unix:///run/docker.sock", "--cgroup-parent", "/" + filepath.Join(filepath.Dir(group), "containers")}
	h.engine = h.Command(context.Background(), append(args, h.Flags...)...)
	h.engine.Stdout, h.engine.Stderr = log, log
	if err := h.engine.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func(engine *exec.Cmd) { ended <- engine.Wait() }(h.engine)
	return WaitFor(60*time.Second, "engine "+string(h.Engine)+" of "+h.Name, func() (bool, error) {
		select {
		case err := <-ended:
			return false, fmt.Errorf("it ended: %w\n%s", err, h.Log(20))
		default:
		}
		_, err := h.Docker("version")
		return err == nil, err
	})
}

// LogFile is the engine's log.
func (h *Host) LogFile() string { return filepath.Join(h.dir, "engine.log") }

// Log gives the last lines of the engine's log, the plugin's among them.
func (h *Host) Log(lines int) string {
	text, err := os.ReadFile(h.LogFile())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// StopEngine ends the engine as a service manager does, and waits for it.
func (h *Host) StopEngine() error { return h.signalEngine("TERM") }

// KillEngine ends the engine without warning.
func (h *Host) KillEngine() error { return h.signalEngine("KILL") }

// PauseEngine stops the engine where it is: it goes on when ResumeEngine is called.
func (h *Host) PauseEngine() error {
	_, err := h.Script("kill -STOP $(cat /run/docker.pid)")
	return err
}

// ResumeEngine lets a paused engine go on, and nsenter, which stops with it and would not notice its end.
func (h *Host) ResumeEngine() error {
	_, err := h.Script("kill -CONT $(cat /run/docker.pid)")
	// nsenter stops itself when it hears of the engine's stop, which may be just now.
	return errors.Join(err, WaitFor(10*time.Second, "nsenter to go on", func() (bool, error) {
		if err := h.engine.Process.Signal(syscall.SIGCONT); err != nil {
			return false, err
		}
		time.Sleep(20 * time.Millisecond)
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.engine.Process.Pid))
		return err == nil && !strings.Contains(string(stat), ") T "), err
	}))
}

func (h *Host) signalEngine(signal string) error {
	pid, err := h.Script("cat /run/docker.pid; kill -" + signal + " $(cat /run/docker.pid)")
	if err != nil {
		return err
	}
	return WaitFor(45*time.Second, "the end of "+h.Name+"'s engine", func() (bool, error) {
		_, err := h.Script("test ! -e /proc/" + strings.Fields(pid)[0])
		return err == nil, nil
	})
}

// Reboot ends everything on the host at once, as a power cut does, and starts it anew: only what
// was on its disk is left.
func (h *Host) Reboot() error {
	h.PowerOff()
	return h.PowerOn()
}

// PowerOff ends everything on the host at once, its links too. Nothing can be asked of it then but to
// be powered on.
func (h *Host) PowerOff() {
	h.end()
	for _, p := range h.plugs {
		_ = p.lan.Unplug(h.Machine, p.link) // the kernel may have done so, but it takes its time, and answers meanwhile
	}
}

// PowerOn starts a host that is off, and its engine.
func (h *Host) PowerOn() error {
	if err := h.boot(); err != nil {
		return err
	}
	for _, p := range h.plugs {
		if err := p.lan.Plug(h.Machine, p.link, p.addresses...); err != nil {
			return err
		}
	}
	return h.StartEngine()
}

// Docker runs the engine's command line on the host.
func (h *Host) Docker(args ...string) (string, error) {
	return h.Run(append([]string{"docker"}, args...)...)
}

// Client speaks to the engine's API.
func (h *Host) Client() (*client.Client, error) {
	socket := fmt.Sprintf("unix:///proc/%d/root/run/docker.sock", h.PID())
	return client.NewClientWithOpts(client.WithHost(socket), client.WithAPIVersionNegotiation())
}

// LoadImage makes Image of Debian's busybox and a program that becomes /probe in it.
func (h *Host) LoadImage(probe string) error {
	root := filepath.Join(h.dir, "image")
	script := fmt.Sprintf(`rm -rf %[1]s; mkdir -p %[1]s/bin %[1]s/tmp
cp /bin/busybox %[1]s/bin/
for a in sh true ip ping sleep cat ls nc arping sysctl; do ln -s busybox %[1]s/bin/$a; done
cp %[2]s %[1]s/probe
tar -C %[1]s -c . | docker import --change 'CMD ["sleep","100000"]' - %[3]s`, root, probe, Image)
	_, err := h.Script(script)
	return err
}

// Plugin is the name of the plugin under test, as users give it.
const Plugin = "dockway:latest"

// InstallPlugin makes a managed plugin of a folder with config.json and rootfs, and enables it.
func (h *Host) InstallPlugin(dir string, settings ...string) error {
	if _, err := h.Docker("plugin", "create", Plugin, dir); err != nil {
		return err
	}
	if len(settings) > 0 {
		if _, err := h.Docker(append([]string{"plugin", "set", Plugin}, settings...)...); err != nil {
			return err
		}
	}
	_, err := h.Docker("plugin", "enable", Plugin)
	return err
}

// SetPlugin gives the plugin other settings, for which the engine has to stop it.
func (h *Host) SetPlugin(settings ...string) error {
	_, disabled := h.Docker("plugin", "disable", "-f", Plugin)
	_, set := h.Docker(append([]string{"plugin", "set", Plugin}, settings...)...)
	_, enabled := h.Docker("plugin", "enable", Plugin)
	return errors.Join(disabled, set, enabled)
}

// PluginPID finds the plugin's process, as the host sees it.
func (h *Host) PluginPID() (string, error) {
	out, err := h.Run("pgrep", "-f", "^/dockway serve")
	if err != nil {
		return "", err
	}
	pids := strings.Fields(out)
	if len(pids) != 1 {
		return "", fmt.Errorf("%s runs %d plugins: %s", h.Name, len(pids), out)
	}
	return pids[0], nil
}

// KillPlugin ends the plugin without warning. The engine starts it again.
func (h *Host) KillPlugin() error {
	pid, err := h.PluginPID()
	if err != nil {
		return err
	}
	_, err = h.Run("kill", "-9", pid)
	return err
}

// WaitPlugin waits until a plugin other than the given process answers, and the engine has taken note
// of it.
func (h *Host) WaitPlugin(but string) error {
	return WaitFor(30*time.Second, "the plugin of "+h.Name, func() (bool, error) {
		pid, err := h.PluginPID()
		if err != nil || pid == but {
			return false, err
		}
		out, err := h.Dockway("status", "--json")
		return err == nil && strings.Contains(out, `"in_sync":true`) && strings.Contains(out, `"registered":true`), errors.Join(err, errors.New(out))
	})
}

// Dockway runs dockway's command line on the host.
func (h *Host) Dockway(args ...string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	return h.Run(append([]string{filepath.Join(root, "build/dockway")}, args...)...)
}

// Root is the folder of the module that the working directory is in.
func Root() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = filepath.Dir(dir)
	}
	return "", err
}
