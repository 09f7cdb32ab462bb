package ipam_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/dockway/dockway/driver/store"
	"github.com/dockway/dockway/ipam"
)

const childVariable = "DOCKWAY_IPAM_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childVariable); dir != "" {
		if err := churn(dir); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// churn requests and releases addresses for ever, and says what it is about to release and what it got.
func churn(dir string) error {
	s, err := store.Open(dir)
	if err != nil {
		return err
	}
	m, err := ipam.New(s, nil, ipam.Config{})
	if err != nil {
		return err
	}
	ctx := context.Background()
	pools := m.Pools()
	if len(pools) == 0 {
		if _, err := m.RequestPool(ctx, ipam.PoolRequest{Space: string(ipam.Local), Pool: "10.0.0.0/27"}); err != nil {
			return err
		}
		pools = m.Pools()
	}
	id := pools[0].ID
	rng := rand.New(rand.NewPCG(uint64(os.Getpid()), 1))
	for {
		held := m.Held(id)
		if len(held) > 20 || len(held) > 0 && rng.IntN(2) == 0 {
			a := held[rng.IntN(len(held))].Address.String()
			fmt.Println("releasing", a)
			if err := m.ReleaseAddress(ctx, id, a); err != nil {
				return err
			}
			fmt.Println("released", a)
			continue
		}
		p, err := m.RequestAddress(ctx, ipam.AddressRequest{PoolID: id})
		if err != nil {
			return err
		}
		fmt.Println("got", p.Addr())
	}
}

// Killed at any moment, a manager that starts again from the disk knows every address that it had given, and no other but
// the one it was about to give or to release.
func TestKillNine(t *testing.T) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(7, 8))
	held := make(map[string]bool)
	for round := range 40 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childVariable+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		releasing := ""
		lines, count, until := bufio.NewScanner(out), 0, rng.IntN(60)
		for {
			if count == until {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
			count++
			if !lines.Scan() {
				break
			}
			switch words := strings.Fields(lines.Text()); {
			case len(words) == 2 && words[0] == "got":
				if held[words[1]] {
					t.Fatalf("round %d: %s was given twice", round, words[1])
				}
				held[words[1]] = true
			case len(words) == 2 && words[0] == "releasing":
				releasing = words[1]
			case len(words) == 2 && words[0] == "released":
				delete(held, words[1])
				releasing = ""
			case len(words) > 0:
				t.Fatal(lines.Text())
			}
		}
		_ = cmd.Wait()
		if count <= until {
			t.Fatal("the child ended by itself")
		}

		s, err := store.Open(dir)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		m, err := ipam.New(s, nil, ipam.Config{})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		now, more := make(map[string]bool), 0
		for _, p := range m.Pools() {
			for _, h := range m.Held(p.ID) {
				now[h.Address.String()] = true
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		for a := range held {
			if !now[a] && a != releasing {
				t.Errorf("round %d: %s was given and is forgotten", round, a)
			}
		}
		for a := range now {
			if !held[a] {
				more++
			}
		}
		if more > 1 || more == 1 && releasing != "" {
			t.Errorf("round %d: held %v, known to be held %v, releasing %q", round, now, held, releasing)
		}
		held = now
	}
}

// A full manager's state comes back from the disk.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	ctx := context.Background()
	var before []string
	for round := range 2 {
		s, err := store.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		m, err := ipam.New(s, nil, ipam.Config{Seed: "host"})
		if err != nil {
			t.Fatal(err)
		}
		if round == 0 {
			for _, v6 := range []bool{false, true} {
				r, err := m.RequestPool(ctx, ipam.PoolRequest{Space: string(ipam.Local), V6: v6})
				if err != nil {
					t.Fatal(err)
				}
				for range 5 {
					if _, err := m.RequestAddress(ctx, ipam.AddressRequest{PoolID: r.ID}); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		var now []string
		for _, p := range m.Pools() {
			now = append(now, fmt.Sprint(p))
			for _, h := range m.Held(p.ID) {
				now = append(now, fmt.Sprint(h.Address, h.Kind))
			}
		}
		if round == 1 && fmt.Sprint(now) != fmt.Sprint(before) || len(now) != 12 {
			t.Errorf("now %v, before %v", now, before)
		}
		before = now
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
