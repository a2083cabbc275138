package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// dirPrefix begins the names of the cgroups and directories that are made
	// outside the private namespaces. Sweep looks at no others.
	dirPrefix = "skipstack-node-"
	// isolatedEnv tells the program that Isolate started that it is isolated.
	isolatedEnv = "SKIPSTACK_NODE"
	// unifiedEnv tells it that Command.UnifiedCgroups was set.
	unifiedEnv = "SKIPSTACK_NODE_UNIFIED_CGROUPS"
	// stopGrace is how long an isolated program may take to end after SIGTERM.
	stopGrace = 30 * time.Second
)

var (
	// ErrPrivilege is returned where the caller may not make namespaces and cgroups.
	ErrPrivilege = errors.New("a private node needs root")
	// ErrLeftover is returned where something outlived its owner.
	ErrLeftover = errors.New("left behind")
)

// Command is a program for [Isolate] to run.
type Command struct {
	Args           []string // arguments after the program's name, which is the running program's own
	Env            []string // nil: none
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	ExtraFiles     []*os.File // the program's descriptors from 3 on
	// UnifiedCgroups has [Prepare] mount cgroup2 on /sys/fs/cgroup, and nothing else
	// there, whatever the machine has.
	UnifiedCgroups bool
}

// Isolated says whether [Isolate] started this process.
func Isolated() bool {
	return os.Getpid() == 1 && os.Getenv(isolatedEnv) != ""
}

// Isolate runs the running program again, as the first process of new mount,
// network, cgroup and PID namespaces and in a cgroup of its own, and returns its
// exit code (128 plus the signal's number if a signal ended it). The program
// should call [Prepare] first. Whatever the program started ends with it.
//
// When ctx is done the program gets SIGTERM, and SIGKILL half a minute later. What
// killed callers of Isolate left is swept first. The error wraps [ErrPrivilege]
// if the caller lacks the right, [ErrLeftover] if something could not be removed.
func Isolate(ctx context.Context, c Command) (exit int, err error) {
	if os.Geteuid() != 0 {
		return 0, ErrPrivilege
	}
	root, err := cgroupRoot()
	if err != nil {
		return 0, err
	}
	if err := Sweep(ctx, root); err != nil {
		return 0, err
	}
	dir, lock, err := lockedDir(root)
	if err != nil {
		return 0, err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		if rmErr := removeCgroup(clean, dir); rmErr != nil {
			err = errors.Join(err, fmt.Errorf("%w: %w", ErrLeftover, rmErr))
		}
		lock.Close()
	}()

	// The parent-death signal is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", c.Args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(c.Env[:len(c.Env):len(c.Env)], isolatedEnv+"="+filepath.Base(dir))
	if c.UnifiedCgroups {
		cmd.Env = append(cmd.Env, unifiedEnv+"=1")
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = c.Stdin, c.Stdout, c.Stderr, c.ExtraFiles
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// Unshared after the child entered its cgroup, so that this cgroup
		// becomes the root of the cgroup namespace.
		Unshareflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP,
		Cloneflags:   unix.CLONE_NEWPID,
		UseCgroupFD:  true,
		CgroupFD:     int(lock.Fd()),
		Pdeathsig:    unix.SIGKILL,
		Setpgid:      true, // it gets a terminal's signals from here, and once
	}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return 0, fmt.Errorf("%w with CAP_SYS_ADMIN: %w", ErrPrivilege, err)
		}
		return 0, fmt.Errorf("start in new namespaces: %w", err)
	}
	ended := make(chan struct{})
	go stopOnCancel(ctx, cmd.Process, ended)
	err = cmd.Wait()
	close(ended)
	var exitErr *exec.ExitError
	if err != nil && !errors.As(err, &exitErr) {
		return 0, fmt.Errorf("run in new namespaces: %w", err)
	}
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return cmd.ProcessState.ExitCode(), nil
}

func stopOnCancel(ctx context.Context, p *os.Process, ended <-chan struct{}) {
	select {
	case <-ended:
		return
	case <-ctx.Done():
	}
	_ = p.Signal(unix.SIGTERM)
	select {
	case <-ended:
	case <-time.After(stopGrace):
		// The first process of a PID namespace takes all others with it.
		_ = p.Kill()
	}
}

// lockedDir makes a directory below root and locks it. The lock says that the
// owner lives; unlike a process id it holds across PID namespaces and reuse.
func lockedDir(root string) (string, *os.File, error) {
	for {
		suffix := make([]byte, 4)
		rand.Read(suffix)
		dir := filepath.Join(root, fmt.Sprintf("%s%d-%s", dirPrefix, os.Getpid(), hex.EncodeToString(suffix)))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return "", nil, fmt.Errorf("make a private directory: %w", err)
		}
		f, locked, err := tryLock(dir)
		if err != nil {
			return "", nil, errors.Join(err, ignoreMissing(os.Remove(dir)))
		}
		if locked {
			return dir, f, nil
		}
		// A sweep came between and takes the directory away.
	}
}

// tryLock locks the directory dir unless another process holds it or has removed it.
func tryLock(dir string) (*os.File, bool, error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("lock %s: %w", dir, err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, false, f.Close()
	}
	if err != nil {
		return nil, false, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	opened, err := f.Stat()
	if err != nil {
		return nil, false, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	if named, err := os.Stat(dir); err != nil || !os.SameFile(opened, named) {
		return nil, false, f.Close()
	}
	return f, true, nil
}

// Sweep removes the cgroups, and kills the processes in them, that callers of
// [Isolate] left below the cgroup2 mount root when they were killed. Cgroups
// whose owner lives are not touched.
func Sweep(ctx context.Context, root string) error {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	return sweep(root, func(dir string) error { return removeCgroup(ctx, dir) })
}

func sweep(root string, remove func(dir string) error) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	var failed []error
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), dirPrefix) {
			continue
		}
		dir := filepath.Join(root, e.Name())
		lock, locked, err := tryLock(dir)
		if err != nil {
			failed = append(failed, fmt.Errorf("sweep: %w", err))
		}
		if !locked {
			continue
		}
		if err := remove(dir); err != nil {
			failed = append(failed, fmt.Errorf("sweep: %w", err))
		}
		lock.Close()
	}
	return errors.Join(failed...)
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
