package podcgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const openFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC

// openDir opens a directory that the operator named; symbolic links are
// followed.
func openDir(path string) (int, error) {
	for {
		fd, err := unix.Open(path, openFlags, 0)
		switch {
		case err == nil:
			return fd, nil
		case err != unix.EINTR:
			return -1, &fs.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

func fstatfsType(fd int) (int64, error) {
	var st unix.Statfs_t
	for {
		err := unix.Fstatfs(fd, &st)
		if err != unix.EINTR {
			return int64(st.Type), err
		}
	}
}

// openBelow opens a directory below the root. It follows no symbolic link and
// crosses no mount point.
//
// It returns an error wrapping [ErrNotFound] if there is none, and [ErrRefused]
// if what is there may not be opened.
func (t *tree) openBelow(comps []string) (int, error) {
	if below := slash(comps); len(below) >= maxPath { // an expanded slice may be
		return -1, fmt.Errorf("%w: path %.64q... below %s is longer than %d bytes", ErrRefused, below, t.Root, maxPath-1)
	}
	fd, err := t.openFrom(t.fd, comps)
	if err == nil {
		return fd, nil
	}
	path := filepath.Join(t.Root, slash(comps))
	switch {
	case errors.Is(err, unix.ENOENT):
		return -1, fmt.Errorf("%w: no cgroup %s", ErrNotFound, path)
	case errors.Is(err, unix.ELOOP):
		return -1, fmt.Errorf("%w: %s leads through a symbolic link", ErrRefused, path)
	case errors.Is(err, unix.ENOTDIR):
		return -1, fmt.Errorf("%w: %s is not a directory", ErrRefused, path)
	case errors.Is(err, unix.EXDEV):
		return -1, fmt.Errorf("%w: %s leaves the cgroup hierarchy mounted at %s", ErrRefused, path, t.Root)
	default:
		return -1, &fs.PathError{Op: "open", Path: path, Err: err}
	}
}

// openFrom opens the directory comps below dirfd and returns an errno.
func (t *tree) openFrom(dirfd int, comps []string) (int, error) {
	if t.noOpenat2 {
		return t.walk(dirfd, comps)
	}
	how := unix.OpenHow{
		Flags:   openFlags,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	path := strings.Join(comps, "/")
	// openat2(2): EAGAIN if a rename or mount elsewhere races with the look-up.
	for range 16 {
		fd, err := unix.Openat2(dirfd, path, &how)
		switch err {
		case unix.EAGAIN, unix.EINTR:
			continue
		case unix.ENOSYS, unix.EPERM: // before Linux 5.6, or a seccomp filter of that age
			return t.walk(dirfd, comps)
		}
		return fd, err
	}
	return t.walk(dirfd, comps)
}

// walk is openFrom without openat2: component by component, none of which may
// be "..", a symbolic link or on another device.
func (t *tree) walk(dirfd int, comps []string) (int, error) {
	cur := -1
	for _, comp := range comps {
		parent := dirfd
		if cur >= 0 {
			parent = cur
		}
		next, err := openStep(parent, comp, t.dev)
		if cur >= 0 {
			unix.Close(cur)
		}
		if err != nil {
			return -1, err
		}
		cur = next
	}
	if cur < 0 {
		return -1, unix.EINVAL
	}
	return cur, nil
}

func openStep(dirfd int, comp string, dev uint64) (int, error) {
	if comp == "" || comp == "." || comp == ".." || strings.Contains(comp, "/") {
		return -1, unix.EXDEV // what openat2 says of ".." at the top
	}
	fd, err := unix.Openat(dirfd, comp, openFlags|unix.O_NOFOLLOW, 0)
	for err == unix.EINTR {
		fd, err = unix.Openat(dirfd, comp, openFlags|unix.O_NOFOLLOW, 0)
	}
	var st unix.Stat_t
	if err == unix.ENOTDIR {
		// O_DIRECTORY hides that it was a symbolic link.
		if unix.Fstatat(dirfd, comp, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			err = unix.ELOOP
		}
	}
	if err != nil {
		return -1, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if st.Dev != dev {
		unix.Close(fd)
		return -1, unix.EXDEV
	}
	return fd, nil
}
