// Package runtimes_test runs pods on real container runtimes, driven over CRI as a
// kubelet does it.
package runtimes_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/debian"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/runtimes/containerd"
)

// cacheEnv names the directory where the runtimes' packages are kept.
const cacheEnv = "SKIPSTACK_RUNTIMES_CACHE"

const patience = time.Minute // for what comes about by itself

func TestMain(m *testing.M) {
	if os.Getenv(cacheEnv) == "" {
		fmt.Fprintf(os.Stderr, "run `make test-runtimes`: %s is not set\n", cacheEnv)
		os.Exit(2)
	}
	os.Exit(node.Main(ownV1{m}, node.MainOptions{
		Workers: map[string]node.Worker{mountV1: coverV1},
		Build:   []string{"github.com/skipstack/skipstack/cmd/skipstack", "github.com/skipstack/skipstack/test/runtimes/peer"},
		Tools:   []string{"bridge", "host-local", "loopback", "portmap"},
		Prepare: func(ctx context.Context) (clean func(), err error) {
			sweepV1()
			return sweepV1, fetch(ctx)
		},
	}))
}

var series = []containerd.Series{containerd.V1, containerd.V2}

func fetch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for _, s := range series {
		if _, err := programs(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func programs(ctx context.Context, s containerd.Series) (*containerd.Programs, error) {
	cache := os.Getenv(cacheEnv)
	apt := &debian.APT{Dir: filepath.Join(cache, "apt"), Logf: func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	}}
	return containerd.Fetch(ctx, cache, apt, s)
}

// wait waits until f finds nothing to complain about.
func wait(t testing.TB, f func() error) {
	t.Helper()
	must.Wait(t, patience, 5*time.Millisecond, f)
}

func join(names []string) string { return strings.Join(names, ", ") }
