// Command demo shows dockway's main job in a lab: hosts with real engines, the plugin installed as
// users install it, and for each mode every cell of the table of who reaches whom tried on the spot.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
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

func run(ctx context.Context) error {
	w := &world{ctx: ctx, start: time.Now()}
	defer func() {
		if w.lab != nil {
			w.lab.Close()
		}
	}()
	if err := w.prepare(); err != nil {
		return err
	}
	nat := w.nat()
	acts := []func() error{func() error { return w.table(nat) }}
	for _, m := range w.onTheWire() {
		acts = append(acts, func() error { return w.table(m) })
	}
	overlay := w.overlay()
	acts = append(acts, func() error { return w.table(overlay) }, w.show,
		func() error { return w.kill(nat, overlay) }, func() error { return w.flush(nat) })
	for _, act := range acts {
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

// each does something with all of them at once.
func each[T any](all []T, do func(T) error) error {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, one := range all {
		wg.Go(func() { errs[i] = do(one) })
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
