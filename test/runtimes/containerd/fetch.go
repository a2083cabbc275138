// Package containerd runs Debian's containerd for tests, beside whatever the machine
// has: with its own programs, configuration, state and socket.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/skipstack/skipstack/test/debian"
)

// A Series is a containerd that tests run on.
type Series struct {
	Name   string // of the directory in the cache
	prefix string // of the package's version; empty: the release's own
}

var (
	// V1 is the containerd of the machine's own release. Before 1.7 it does not pass
	// cgroupPath.
	V1 = Series{Name: "containerd-1"}
	// V2 is the newest of version 2 that starts here.
	V2 = Series{Name: "containerd-2", prefix: "2."}
)

// Programs are the unpacked programs of a series.
type Programs struct {
	Dir     string // of containerd's own
	Path    string // directories to look for all, as in $PATH
	Version string // of containerd
}

// Fetch unpacks containerd, runc and nft below cache, or finds them there.
func Fetch(ctx context.Context, cache string, apt *debian.APT, s Series) (*Programs, error) {
	own := filepath.Join(cache, V1.Name)
	err := fetch(own, func() error {
		packages, err := apt.Missing(ctx, false, "containerd", "runc", "nftables")
		if err != nil {
			return err
		}
		return apt.Unpack(ctx, own, packages)
	})
	if err != nil {
		return nil, err
	}
	if err := wrap(own, "nft", "usr/sbin/nft"); err != nil {
		return nil, err
	}
	dir := own
	if s.prefix != "" {
		dir = filepath.Join(cache, s.Name)
		if err := fetch(dir, func() error { return fetchNewest(ctx, dir, apt, s.prefix) }); err != nil {
			return nil, err
		}
	}
	bin := filepath.Join(dir, "usr/bin")
	v, err := version(ctx, bin)
	if err != nil {
		return nil, err
	}
	dirs := []string{bin, filepath.Join(own, "wrapped"), filepath.Join(own, "usr/sbin"), "/usr/sbin", "/usr/bin", "/sbin", "/bin"}
	return &Programs{Dir: bin, Path: strings.Join(dirs, ":"), Version: v}, nil
}

// fetch makes dir unless it is there.
func fetch(dir string, f func() error) error {
	if _, err := os.Stat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	return f()
}

// fetchNewest unpacks the newest containerd of a version that starts on this
// machine: those of later releases may want a later libc.
func fetchNewest(ctx context.Context, dir string, apt *debian.APT, prefix string) error {
	versions, err := apt.Versions(ctx, "containerd")
	if err != nil {
		return err
	}
	tried := errors.New("no package has it")
	for _, v := range versions {
		if !strings.HasPrefix(v, prefix) {
			continue
		}
		if tried = apt.Unpack(ctx, dir, []string{"containerd=" + v}); tried == nil {
			if _, tried = version(ctx, filepath.Join(dir, "usr/bin")); tried == nil {
				return nil
			}
			os.RemoveAll(dir)
		}
	}
	return fmt.Errorf("fetch containerd %s: %w", prefix, tried)
}

func version(ctx context.Context, dir string) (string, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "containerd"), "--version").Output()
	if err != nil {
		return "", fmt.Errorf("start the fetched containerd: %w", err)
	}
	f := strings.Fields(string(out))
	if len(f) < 3 {
		return "", fmt.Errorf("containerd --version says %q", out)
	}
	return f[2], nil
}

// wrap makes a program find its libraries, which were unpacked beside it.
func wrap(dir, name, program string) error {
	lib := filepath.Join(dir, "usr/lib/x86_64-linux-gnu")
	script := fmt.Sprintf("#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s \"$@\"\n", lib, filepath.Join(dir, program))
	if err := os.MkdirAll(filepath.Join(dir, "wrapped"), 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "wrapped", name), []byte(script), 0o755)
}
