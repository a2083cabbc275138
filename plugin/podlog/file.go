package podlog

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// slack is how far beyond maxSize a file may grow while a stuck process
// prevents its rotation.
const slack = 64 << 10

// maxTurns bounds how often write starts over because of a rotation.
const maxTurns = 10

// file is a log file that several processes append to. Each takes an flock on
// it for the time of a line, so that only one of them renames it, and none
// writes to a file that has been renamed.
type file struct {
	path    string
	maxSize int64
	wait    time.Duration // for the lock, see lockWait
	f       *os.File      // nil: not open
	hurry   bool          // the lock was not to be had: do not wait for it again
	stuck   error         // the file is full and cannot be rotated: do not try again
}

func (l *file) write(line []byte) error {
	if l.stuck != nil {
		return l.stuck
	}
	for range maxTurns {
		if l.f == nil {
			if err := l.open(); err != nil {
				return err
			}
		}
		again, err := l.writeOnce(line)
		if err != nil || !again {
			return err
		}
		l.close()
	}
	return fmt.Errorf("write %s: it is renamed again and again", l.path)
}

// writeOnce writes to the open file unless that is, or has to be, renamed;
// then the line is for the next file.
func (l *file) writeOnce(line []byte) (again bool, err error) {
	wait := l.wait
	if l.hurry {
		wait = 0
	}
	locked, err := flockWithin(l.f, wait)
	if err != nil {
		return false, err
	}
	defer func() {
		if locked {
			unlock(l.f)
		}
	}()
	l.hurry = !locked
	var open, named unix.Stat_t
	if err := unix.Fstat(int(l.f.Fd()), &open); err != nil {
		return false, &fs.PathError{Op: "stat", Path: l.path, Err: err}
	}
	err = unix.Fstatat(unix.AT_FDCWD, l.path, &named, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil && err != unix.ENOENT {
		return false, &fs.PathError{Op: "stat", Path: l.path, Err: err}
	}
	if err == unix.ENOENT || open.Dev != named.Dev || open.Ino != named.Ino {
		return true, nil
	}
	size := open.Size + int64(len(line))
	if size > l.maxSize && locked {
		// The path still is this file, and stays it while we hold its lock.
		if err := checkOld(l.path + ".1"); err != nil {
			l.stuck = fmt.Errorf("%s is full: %w", l.path, err)
			return false, l.stuck
		}
		return true, os.Rename(l.path, l.path+".1")
	}
	if size > l.maxSize+slack {
		// Only now it is worth while to wait for the lock once more.
		locked, err = flockWithin(l.f, l.wait)
		if err == nil && !locked {
			l.stuck = fmt.Errorf("%s is full, and another process keeps it locked", l.path)
			err = l.stuck
		}
		l.hurry = !locked
		return true, err
	}
	_, err = l.f.Write(line)
	return false, err
}

// open opens or creates the file, and refuses what somebody else could have
// put in its place.
func (l *file) open() error {
	// Without O_NONBLOCK, a FIFO without reader would stop us.
	const flags = unix.O_RDWR | unix.O_APPEND | unix.O_CREAT | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	f, err := os.OpenFile(filepath.Clean(l.path), flags, 0o600)
	switch {
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%s is a symbolic link: name the file itself", l.path)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: create its directory", err)
	case err != nil:
		return err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	switch {
	case err != nil:
		err = &fs.PathError{Op: "stat", Path: l.path, Err: err}
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = fmt.Errorf("%s is not a regular file", l.path)
	case st.Uid != uint32(os.Geteuid()):
		err = fmt.Errorf("%s belongs to uid %d, this process runs as uid %d", l.path, st.Uid, os.Geteuid())
	case st.Nlink > 1:
		// A user's hard link could make us append to any file of ours.
		err = fmt.Errorf("%s is a hard link to a file with other names", l.path)
	default:
		err = checkOurs(f, l.path)
	}
	if err != nil {
		f.Close()
		return err
	}
	l.f = f
	return nil
}

// ourLine is how each line of ours begins, as slog.TextHandler writes it.
var ourLine = regexp.MustCompile(`^time=\d{4}-\d\d-\d\dT\S{1,24} level=(DEBUG|INFO|WARN|ERROR)\S{0,8} msg=`)

// checkOurs refuses a file that somebody else has written: who names it by
// mistake must not lose it, or find lines of ours in it. An empty file is nobody's.
func checkOurs(f *os.File, path string) error {
	head := make([]byte, 100) // more than ourLine takes
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return err
	}
	if n > 0 && !ourLine.Match(head[:n]) {
		return fmt.Errorf("%s is not a log of skipstack's: name a file of its own, or remove this one", path)
	}
	return nil
}

// checkOld refuses what a rotation must not replace.
func checkOld(path string) error {
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%s is a symbolic link: remove it", path)
	case err != nil:
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return err
	}
	return checkOurs(f, path)
}

func (l *file) close() error {
	if l.f == nil {
		return nil
	}
	f := l.f
	l.f = nil
	return f.Close()
}

// flockWithin takes the exclusive lock of f, and tries so for the time of wait.
// It polls, since a waiting flock(2) could not be given up.
func flockWithin(f *os.File, wait time.Duration) (bool, error) {
	const first, longest = 20 * time.Microsecond, 2 * time.Millisecond
	deadline := time.Now().Add(wait)
	for pause := first; ; pause = min(2*pause, longest) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return true, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			return false, &fs.PathError{Op: "flock", Path: f.Name(), Err: err}
		}
		if !time.Now().Before(deadline) {
			return false, nil
		}
		// The jitter keeps those that wait from staying in step.
		time.Sleep(pause/2 + rand.N(pause))
	}
}

// unlock drops the lock even if a forked child shares the open file. It cannot
// fail on an open file.
func unlock(f *os.File) {
	_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
}
