package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/podcgroup"
)

// cgroupRoot returns where cgroup2 is mounted.
func cgroupRoot() (string, error) { return podcgroup.FindRoot(sysfsCgroup, "/proc") }

func isFS(dir string, magic int64) bool {
	var s unix.Statfs_t
	return unix.Statfs(dir, &s) == nil && int64(s.Type) == magic
}

// killCgroup kills every process below dir and waits until the kernel says
// that none is left. A missing directory is not an error.
func killCgroup(ctx context.Context, dir string) error {
	for {
		if populated, err := isPopulated(dir); err != nil || !populated {
			return err
		}
		// cgroup.kill came with Linux 5.14 and is atomic; the loop over
		// cgroup.procs serves older kernels.
		if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil {
			pids, err := cgroupProcs(dir)
			if err != nil {
				return err
			}
			for _, pid := range pids {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		if err := sleep(ctx, time.Millisecond); err != nil {
			pids, _ := cgroupProcs(dir)
			return fmt.Errorf("kill the processes of cgroup %s (%v): %w", dir, pids, err)
		}
	}
}

func isPopulated(dir string) (bool, error) {
	events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	if isGone(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read cgroup events: %w", err)
	}
	return strings.Contains(string(events), "populated 1"), nil
}

// cgroupProcs lists the processes in dir and below it.
func cgroupProcs(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if isGone(err) {
			return nil
		}
		if err != nil || !d.IsDir() {
			return err
		}
		procs, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil && !isGone(err) {
			return err
		}
		for _, field := range strings.Fields(string(procs)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the processes of cgroup %s: %w", dir, err)
	}
	return pids, nil
}

// removeCgroup kills what runs below dir and removes the whole subtree.
func removeCgroup(ctx context.Context, dir string) error {
	if err := killCgroup(ctx, dir); err != nil {
		return err
	}
	dirs, err := subCgroups(dir)
	if err != nil {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		for {
			err := unix.Rmdir(dirs[i])
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			// A process that has just died holds its cgroup a moment longer.
			if wait := sleep(ctx, time.Millisecond); !errors.Is(err, unix.EBUSY) || wait != nil {
				return fmt.Errorf("remove cgroup %s: %w", dirs[i], err)
			}
		}
	}
	return nil
}

// subCgroups lists dir and the cgroups below it, parents first.
func subCgroups(dir string) ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if isGone(err) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the cgroups below %s: %w", dir, err)
	}
	return dirs, nil
}

// isGone also knows ENODEV, which files of a removed cgroup return.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
