package attachment

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxTries bounds loops that start over because another process got in
// between; each turn needs a new coincidence of that kind.
const maxTries = 100

const dirFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// OpenRunDir opens the run directory at path, by default [DefaultRunDir].
// Files in it are then reached through the returned descriptor, so that
// nobody can put another directory in its place. The caller must close it.
//
// With create, a missing directory is made with mode 0700; otherwise the error
// wraps [fs.ErrNotExist]. The error wraps [ErrUnsafe] if path is a symbolic
// link, is not a directory, belongs to another user, or can be written by
// others: whoever can write there could choose what root reads and unlinks.
func OpenRunDir(path string, create bool) (*os.File, error) {
	if path == "" {
		path = DefaultRunDir
	}
	// Also drops a trailing slash, which would make the kernel follow a link.
	path = filepath.Clean(path)
	for range maxTries {
		fd, err := openFD(unix.AT_FDCWD, path, dirFlags, 0)
		if errors.Is(err, unix.ENOENT) && create {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return nil, fmt.Errorf("create run directory: %w", err)
			}
			if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, fmt.Errorf("create run directory: %w", err)
			}
			continue
		}
		if err != nil {
			return nil, dirError(path, err)
		}
		return checkDir(os.NewFile(uintptr(fd), path))
	}
	return nil, fmt.Errorf("open run directory %s: it is removed again and again", path)
}

// openSub opens the directory name in parent, under the conditions of
// OpenRunDir.
func openSub(parent *os.File, name string, create bool) (*os.File, error) {
	path := filepath.Join(parent.Name(), name)
	for range maxTries {
		fd, err := openFD(int(parent.Fd()), name, dirFlags, 0)
		if errors.Is(err, unix.ENOENT) && create {
			err := retry(func() error { return unix.Mkdirat(int(parent.Fd()), name, 0o700) })
			if err != nil && err != unix.EEXIST {
				return nil, &fs.PathError{Op: "mkdir", Path: path, Err: err}
			}
			continue
		}
		if err != nil {
			return nil, dirError(path, err)
		}
		return checkDir(os.NewFile(uintptr(fd), path))
	}
	return nil, fmt.Errorf("open directory %s: it is removed again and again", path)
}

func dirError(path string, err error) error {
	if err == unix.ENOTDIR || err == unix.ELOOP {
		// The kernel says ENOTDIR for a symbolic link too.
		if fi, lerr := os.Lstat(path); lerr == nil && !fi.IsDir() {
			return fmt.Errorf("%w: %s is not a directory but a %s: remove it, or choose another run directory",
				ErrUnsafe, path, fileKind(fi.Mode()))
		}
	}
	return &fs.PathError{Op: "open", Path: path, Err: err}
}

func fileKind(mode fs.FileMode) string {
	switch {
	case mode&fs.ModeSymlink != 0:
		return "symbolic link"
	case mode.IsRegular():
		return "file"
	}
	return "special file"
}

// checkDir returns dir, or closes it and returns why it cannot be trusted.
func checkDir(dir *os.File) (*os.File, error) {
	var st unix.Stat_t
	err := fstat(dir, &st)
	switch {
	case err != nil:
		err = &fs.PathError{Op: "stat", Path: dir.Name(), Err: err}
	case st.Uid != uint32(os.Geteuid()):
		err = fmt.Errorf("%w: %s belongs to uid %d, this process runs as uid %d: run as its owner, or choose another run directory",
			ErrUnsafe, dir.Name(), st.Uid, os.Geteuid())
	case st.Mode&0o022 != 0:
		err = fmt.Errorf("%w: %s can be written by others (mode %04o): check what is in it, then chmod 0700 it",
			ErrUnsafe, dir.Name(), st.Mode&0o7777)
	default:
		return dir, nil
	}
	dir.Close()
	return nil, err
}

// openAt opens name in dir and follows no symbolic link. It waits for nobody,
// so that a FIFO in the place of a file cannot stop the caller.
func openAt(dir *os.File, name string, flags int, perm uint32) (*os.File, error) {
	path := filepath.Join(dir.Name(), name)
	fd, err := openFD(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, perm)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func openFD(dir int, name string, flags int, perm uint32) (fd int, err error) {
	err = retry(func() (err error) {
		fd, err = unix.Openat(dir, name, flags, perm)
		return err
	})
	return fd, err
}

// unlinkAt removes the file name from dir. That it is gone already is no
// error; removed says whether it was there.
func unlinkAt(dir *os.File, name string) (removed bool, err error) {
	err = retry(func() error { return unix.Unlinkat(int(dir.Fd()), name, 0) })
	if err == unix.ENOENT {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "unlink", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return true, nil
}

func linkAt(fromDir *os.File, from string, toDir *os.File, to string) error {
	err := retry(func() error { return unix.Linkat(int(fromDir.Fd()), from, int(toDir.Fd()), to, 0) })
	if err != nil {
		return &os.LinkError{Op: "link", Old: filepath.Join(fromDir.Name(), from), New: filepath.Join(toDir.Name(), to), Err: err}
	}
	return nil
}

// removeEmpty removes the directory name in parent unless it is in use.
func removeEmpty(parent *os.File, name string) error {
	err := retry(func() error { return unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR) })
	switch err {
	case nil, unix.ENOENT, unix.ENOTEMPTY, unix.EEXIST:
		return nil
	}
	return &fs.PathError{Op: "rmdir", Path: filepath.Join(parent.Name(), name), Err: err}
}

func fstat(f *os.File, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstat(int(f.Fd()), st) })
}

func statAt(dir *os.File, name string, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstatat(int(dir.Fd()), name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

func sameFile(a, b *unix.Stat_t) bool {
	return a.Dev == b.Dev && a.Ino == b.Ino
}

// tryFlock takes an exclusive lock on f's file if nobody has one. Locks belong
// to the open file, so two goroutines of a process exclude each other as well,
// and the kernel drops a dead process's locks.
func tryFlock(f *os.File) (bool, error) {
	err := retry(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "flock", Path: f.Name(), Err: err}
	}
	return true, nil
}

func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
