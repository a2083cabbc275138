package verdict

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// scratchPrefix begins the names of scratch cgroups; nothing else is swept.
const scratchPrefix = "skipstack-probe-"

// scratch is a cgroup that is removed when the run ends. The open directory
// carries a flock(2): its owner lives for as long as it is held, which, unlike a
// process id, means the same in every PID namespace and is not reused.
type scratch struct {
	dir *os.File
	id  uint64 // cgroup id
}

// newScratch makes a cgroup below root.
func newScratch(root string) (*scratch, error) {
	for {
		suffix := make([]byte, 4)
		rand.Read(suffix)
		path := filepath.Join(root, fmt.Sprintf("%s%d-%s", scratchPrefix, os.Getpid(), hex.EncodeToString(suffix)))
		if err := os.Mkdir(path, 0o755); err != nil {
			return nil, fmt.Errorf("make a scratch cgroup: %w", err)
		}
		dir, id, err := lockDir(path)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make a scratch cgroup: %w", err), os.Remove(path))
		}
		if dir != nil {
			return &scratch{dir: dir, id: id}, nil
		}
		// A sweep came before the lock and takes it away.
	}
}

// lockDir opens a directory and locks it; nil if another process holds it or has
// removed it.
func lockDir(path string) (*os.File, uint64, error) {
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	var opened, named unix.Stat_t
	err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		err = unix.Fstat(int(dir.Fd()), &opened)
	}
	if err == nil {
		err = unix.Stat(path, &named)
	}
	switch {
	case err == nil && opened.Ino == named.Ino:
		return dir, opened.Ino, nil
	case err == nil, errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, unix.ENOENT):
		return nil, 0, dir.Close()
	default:
		dir.Close()
		return nil, 0, fmt.Errorf("lock %s: %w", path, err)
	}
}

// remove removes the cgroup. A process that has just ended may hold it a moment
// longer; more than the given time is an error.
func (s *scratch) remove(within time.Duration) error {
	defer s.dir.Close()
	end := time.Now().Add(within)
	for {
		err := unix.Rmdir(s.dir.Name())
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			return fmt.Errorf("remove the scratch cgroup %s: %w", s.dir.Name(), err)
		}
		time.Sleep(time.Millisecond)
	}
}

// sweep removes scratch cgroups whose owner is dead. One that still holds a
// process is left to the next sweep: the worker's end is near, it dies with its
// parent.
func sweep(ctx context.Context, root string) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("look for old scratch cgroups: %w", err)
	}
	for _, e := range entries {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !e.IsDir() || !strings.HasPrefix(e.Name(), scratchPrefix) {
			continue
		}
		path := filepath.Join(root, e.Name())
		if dir, _, err := lockDir(path); err == nil && dir != nil {
			_ = unix.Rmdir(path)
			dir.Close()
		}
	}
	return nil
}
