package attachment

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// How often the lock is tried: the first waits are shorter than the usual
// critical section, later ones keep a hundred waiters off the CPU.
const (
	firstWait = 500 * time.Microsecond
	maxWait   = 10 * time.Millisecond
)

// ProbeLock is a flock(2) file in the run directory: whoever holds it probes the
// kernel, and may write to the run directory until it ends.
const ProbeLock = "probe.lock"

// Lock is the node-wide lock. Release it with Unlock; the death of the
// process releases it too, and no child process inherits it.
type Lock struct {
	mu sync.Mutex
	f  *os.File // nil once unlocked
}

// Lock takes the node-wide lock, <run directory>/lock, and creates it where it
// is missing. It waits no longer than ctx, whatever the holder does: it polls,
// for a waiting flock(2) could not be interrupted.
//
// When ctx ends first the error wraps [ErrBusy] and the context's error, and
// names the holder if that can be found out.
func (s *Store) Lock(ctx context.Context) (*Lock, error) {
	var f *os.File
	defer func() {
		if f != nil {
			f.Close()
		}
	}()
	for wait := firstWait; ; wait = min(wait*3/2, maxWait) {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("lock %s: %w%s: %w", filepath.Join(s.dir, lockFile), ErrBusy, describeHolder(f), err)
		}
		if f == nil {
			var err error
			if f, err = s.openLock(); err != nil {
				return nil, fmt.Errorf("open lock: %w", err)
			}
		}
		locked, err := tryFlock(f)
		if err != nil {
			return nil, fmt.Errorf("lock: %w", err)
		}
		if locked {
			current, err := s.isLockFile(f)
			if err != nil {
				return nil, fmt.Errorf("lock: %w", err)
			}
			if current {
				l := &Lock{f: f}
				f = nil
				l.writePID()
				return l, nil
			}
			// Somebody cleared the run directory while we waited: the others
			// lock a new file.
			f.Close()
			f = nil
			continue
		}
		// The jitter keeps waiters that began together from staying in step.
		timer := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-ctx.Done():
			timer.Stop()
		case <-timer.C:
		}
	}
}

// Unlock releases the lock. Unlocking again does nothing.
//
// The lock file stays: were it removed, one process could hold the lock of the
// removed file while another locks its successor.
func (l *Lock) Unlock() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	f := l.f
	l.f = nil
	// Nobody shall be told that this process holds the lock. If it fails, a
	// waiter's message is less exact, no more.
	_ = f.Truncate(0)
	// Closing alone would leave the lock to a child process that another
	// goroutine has forked and that has not yet reached exec.
	unlockErr := retry(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_UN) })
	if err := errors.Join(unlockErr, f.Close()); err != nil {
		return fmt.Errorf("unlock %s: %w", f.Name(), err)
	}
	return nil
}

func (s *Store) openLock() (*os.File, error) {
	run, err := OpenRunDir(s.dir, true)
	if err != nil {
		return nil, err
	}
	defer run.Close()
	f, err := openAt(run, lockFile, unix.O_RDWR|unix.O_CREAT, 0o600)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%w: %s is a symbolic link: remove it", ErrUnsafe, filepath.Join(s.dir, lockFile))
	}
	if err != nil {
		return nil, err
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		f.Close()
		if err == nil {
			err = fmt.Errorf("%w: %s is not a regular file: remove it", ErrUnsafe, f.Name())
		}
		return nil, err
	}
	return f, nil
}

// isLockFile says whether f is still what other processes would lock.
func (s *Store) isLockFile(f *os.File) (bool, error) {
	run, err := OpenRunDir(s.dir, false)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer run.Close()
	var ours, named unix.Stat_t
	if err := fstat(f, &ours); err != nil {
		return false, &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if err := statAt(run, lockFile, &named); err == unix.ENOENT {
		return false, nil
	} else if err != nil {
		return false, &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return sameFile(&ours, &named), nil
}

// writePID tells waiters who holds the lock. On a full file system it tells
// them nothing; the lock is held all the same.
func (l *Lock) writePID() {
	if l.f.Truncate(0) == nil {
		_, _ = l.f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
}

// describeHolder is " (process 123, name, S (sleeping))", or empty.
func describeHolder(f *os.File) string {
	if f == nil {
		return ""
	}
	var buf [32]byte
	n, _ := f.ReadAt(buf[:], 0)
	pid, err := strconv.Atoi(string(bytes.TrimSpace(buf[:n])))
	if err != nil || pid <= 0 {
		return ""
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		// Dead, or of another PID namespace: then the number means nothing here.
		return ""
	}
	var name, state string
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "Name:"); ok {
			name = strings.TrimSpace(v)
		} else if v, ok := strings.CutPrefix(line, "State:"); ok {
			state = strings.TrimSpace(v)
			break
		}
	}
	return fmt.Sprintf(" (process %d, %s, %s)", pid, name, state)
}
