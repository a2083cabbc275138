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

	"golang.org/x/sys/unix"

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
			if err := fetch(ctx); err != nil {
				return sweepV1, err
			}
			remove, err := makeCache()
			return func() { sweepV1(); remove() }, err
		},
	}))
}

// cniCache is where containerd has libcni keep results, and takes no other place for it:
// the machine may have pods of its own there.
const cniCache = "/var/lib/cni"

// makeCache makes the directory where there is none. The function that it returns then
// removes it.
func makeCache() (remove func(), err error) {
	if _, err := os.Stat(cniCache); err == nil {
		return func() {}, nil
	}
	return func() { os.Remove(cniCache) }, os.MkdirAll(cniCache, 0o700)
}

// coverCache mounts an empty file system over it in the private machine.
func coverCache() (uncover func() error, err error) {
	err = unix.Mount("tmpfs", cniCache, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
	return func() error { return unix.Unmount(cniCache, unix.MNT_DETACH) }, err
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
