package conflist

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/regular"
	"golang.org/x/sys/unix"
)

// ErrBusy is wrapped where another process held a directory's lock, or a file open
// for writing, for too long.
var ErrBusy = errors.New("busy")

// ErrNoNetwork is wrapped where a directory has no network configuration.
var ErrNoNetwork = errors.New("no network configuration")

const (
	// poll is how often a lock is tried.
	poll = 5 * time.Millisecond
	// settle is how long a file may be open for writing, or half written.
	settle = 2 * time.Second
	// turns is how often an edit is begun again because the file has changed.
	turns = 100

	tempPrefix, tempSuffix = ".skipstack-", ".tmp"
	// savedSuffix is that of a .conf that was converted. No runtime loads it.
	savedSuffix = ".skipstack-saved"
)

// dir is a directory of the node's that is locked against other skipstacks.
// Everything goes by names inside it: nothing that a symbolic link may name outside
// is touched.
type dir struct {
	root *os.Root
	self *os.File // the directory, which has the lock
}

// openDir opens and locks a directory. It waits for the lock no longer than ctx, and
// sweeps what dead processes have left. For looking only, it does neither.
func openDir(ctx context.Context, path string, look bool) (*dir, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	self, err := root.Open(".")
	if err != nil {
		root.Close()
		return nil, err
	}
	d := &dir{root, self}
	if look {
		return d, nil
	}
	for {
		err = unix.Flock(int(self.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			d.sweep()
			return d, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			d.close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			d.close()
			return nil, fmt.Errorf("lock %s: %w: another skipstack is at it: %w", path, ErrBusy, ctx.Err())
		case <-time.After(poll):
		}
	}
}

// close releases the lock too.
func (d *dir) close() {
	d.self.Close()
	d.root.Close()
}

// writable asks the kernel, which knows of immutable directories and read-only mounts.
// With AT_EACCESS the library might ask the mode bits instead, where that is EPERM.
func (d *dir) writable() error {
	return unix.Faccessat(int(d.self.Fd()), ".", unix.W_OK, 0)
}

func (d *dir) path(name string) string { return filepath.Join(d.root.Name(), name) }

// sweep removes temporary files. Who makes them has the lock.
func (d *dir) sweep() {
	names, err := d.names()
	if err != nil {
		return // reported by what follows
	}
	for _, name := range names {
		if strings.HasPrefix(name, tempPrefix) && strings.HasSuffix(name, tempSuffix) {
			_ = d.root.Remove(name) // the next one tries again
		}
	}
}

func (d *dir) names() ([]string, error) {
	entries, err := fs.ReadDir(d.root.FS(), ".")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if !e.IsDir() {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// file is what was read of one.
type file struct {
	name string // of the file itself, where a symbolic link was followed
	text []byte
	stat unix.Stat_t
}

func (f file) is(o unix.Stat_t) bool { return f.stat.Dev == o.Dev && f.stat.Ino == o.Ino }

// resolve follows symbolic links inside the directory.
func (d *dir) resolve(name string) (string, error) {
	for i := range 8 {
		info, err := d.root.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) && i > 0 {
			return "", refuse("%s is named by a symbolic link, but is not there", d.path(name))
		}
		if err != nil {
			return "", err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			if !info.Mode().IsRegular() {
				return "", refuse("%s is not a regular file", d.path(name))
			}
			return name, nil
		}
		target, err := d.root.Readlink(name)
		if err != nil {
			return "", err
		}
		to := filepath.Clean(target)
		if filepath.IsAbs(to) {
			if filepath.Dir(to) != filepath.Clean(d.root.Name()) {
				return "", refuse("%s is a symbolic link out of the directory, to %s: edit what makes that file", d.path(name), target)
			}
			to = filepath.Base(to)
		}
		if strings.Contains(to, "/") || to == ".." || to == "." {
			return "", refuse("%s is a symbolic link out of the directory, to %s: edit what makes that file", d.path(name), target)
		}
		name = to
	}
	return "", refuse("%s is a loop of symbolic links", d.path(name))
}

// read reads a regular file, following links inside the directory.
func (d *dir) read(name string) (file, error) {
	name, err := d.resolve(name)
	if err != nil {
		return file{}, err
	}
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return file{}, err
	}
	defer f.Close()
	return readOpen(name, f)
}

func readOpen(name string, f *os.File) (file, error) {
	out := file{name: name}
	if err := unix.Fstat(int(f.Fd()), &out.stat); err != nil {
		return file{}, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	var err error
	out.text, err = regular.ReadOpen(f, plugin.MaxConflist)
	if errors.Is(err, regular.ErrNotRegular) || errors.Is(err, regular.ErrTooLarge) {
		err = refuse("%w", err)
	}
	return out, err
}

// temp makes a temporary file, complete and on the disk, that looks like the model:
// mode, owner, extended attributes (SELinux's label, ACLs).
func (d *dir) temp(text io.Reader, mode fs.FileMode, model *file) (name string, err error) {
	var random [8]byte
	rand.Read(random[:]) // never fails
	// The suffix keeps runtimes from loading it.
	made := tempPrefix + hex.EncodeToString(random[:]) + tempSuffix
	f, err := d.root.OpenFile(made, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer func() {
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			_ = d.root.Remove(made)
			err = fmt.Errorf("write in %s: %w", d.root.Name(), err)
		}
	}()
	if _, err = io.Copy(f, text); err != nil {
		return "", err
	}
	if model != nil {
		if err = d.copyLook(f, *model); err != nil {
			return "", err
		}
	} else if err = f.Chmod(mode); err != nil {
		return "", err
	}
	return made, f.Sync()
}

func (d *dir) copyLook(to *os.File, model file) error {
	fd := int(to.Fd())
	var made unix.Stat_t
	if err := unix.Fstat(fd, &made); err != nil {
		return err
	}
	if made.Uid != model.stat.Uid || made.Gid != model.stat.Gid {
		if err := to.Chown(int(model.stat.Uid), int(model.stat.Gid)); err != nil {
			return fmt.Errorf("keep the owner: %w", err)
		}
	}
	if err := unix.Fchmod(fd, model.stat.Mode&0o7777); err != nil {
		return fmt.Errorf("keep the mode: %w", err)
	}
	from, err := d.root.OpenFile(model.name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	// Where attributes cannot be read or set, new files get what is usual there.
	names := make([]byte, 4096)
	n, err := unix.Flistxattr(int(from.Fd()), names)
	if err != nil {
		return nil
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 4096)
		if n, err := unix.Fgetxattr(int(from.Fd()), name, value); err == nil {
			_ = unix.Fsetxattr(fd, name, value[:n], 0)
		}
	}
	return nil
}

// edit replaces a file's text by what change makes of it, and returns both. It loses
// nothing that another process writes meanwhile: see exchange. The error wraps
// fs.ErrNotExist where the file goes away.
func (d *dir) edit(ctx context.Context, name string, change func([]byte) ([]byte, error)) (before, after []byte, err error) {
	for range turns {
		base, err := d.read(name)
		if err != nil {
			return nil, nil, err
		}
		want, err := change(base.text)
		if err != nil || bytes.Equal(want, base.text) {
			return base.text, base.text, err
		}
		temp, err := d.temp(bytes.NewReader(want), 0, &base)
		if err != nil {
			return base.text, nil, err
		}
		done, err := d.exchange(ctx, temp, base)
		if err != nil || done {
			return base.text, want, err
		}
	}
	return nil, nil, fmt.Errorf("%s: %w: it is rewritten all the time", d.path(name), ErrBusy)
}

// hasWriter says whether somebody has an open file open for writing: a read lease
// is granted only where nobody has (fcntl(2), F_SETLEASE). Where leases are not
// supported, nobody has.
func hasWriter(f *os.File) bool {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	if err == nil {
		_, _ = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	}
	return errors.Is(err, unix.EAGAIN)
}

// exchange puts the temporary file in base's place, and says whether base is what
// was there. If not, whatever another process has put there meanwhile is there again.
//
// To look and then rename would lose what is written in between. So the two names are
// exchanged (renameat2(2)), and what has come out is looked at: if it is not base, or
// no longer as it was read, it is put back in.
func (d *dir) exchange(ctx context.Context, temp string, base file) (done bool, err error) {
	fd := int(d.self.Fd())
	// What comes out may be somebody's, but what is named temp in the end is not.
	defer func() {
		if removeErr := d.root.Remove(temp); removeErr != nil && !errors.Is(removeErr, fs.ErrNotExist) && err == nil {
			err = fmt.Errorf("remove a temporary file: %w", removeErr)
		}
		if syncErr := d.self.Sync(); err == nil && syncErr != nil {
			err = fmt.Errorf("sync %s: %w", d.root.Name(), syncErr)
		}
	}()
	ours, err := d.read(temp)
	if err != nil {
		return false, err
	}
	placed := []file{ours} // what we have put there
	for range turns {
		err := unix.Renameat2(fd, temp, fd, base.name, unix.RENAME_EXCHANGE)
		switch {
		case errors.Is(err, unix.ENOENT):
			// The other process has removed its file. What was on its way back in
			// is older than that.
			return false, nil
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENOTSUP):
			return d.renameOver(temp, base)
		case err != nil:
			return false, fmt.Errorf("rename to %s: %w", d.path(base.name), err)
		}
		out, err := d.readQuiet(ctx, temp)
		if err != nil {
			// Whatever it is, it is not to be lost.
			if err := unix.Renameat2(fd, temp, fd, base.name, unix.RENAME_EXCHANGE); err != nil {
				return false, fmt.Errorf("put %s back: %w", d.path(base.name), err)
			}
			return false, err
		}
		known := func(f file) bool { return f.is(out.stat) && bytes.Equal(f.text, out.text) }
		if known(base) && len(placed) == 1 {
			return true, nil
		}
		if slices.ContainsFunc(placed, known) {
			return false, nil
		}
		placed = append(placed, out)
	}
	return false, fmt.Errorf("%s: %w: it is rewritten all the time", d.path(base.name), ErrBusy)
}

// readQuiet reads a file, once nobody has it open for writing any more.
func (d *dir) readQuiet(ctx context.Context, name string) (file, error) {
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return file{}, err
	}
	defer f.Close()
	for deadline := time.Now().Add(settle); hasWriter(f); time.Sleep(poll) {
		if time.Now().After(deadline) || ctx.Err() != nil {
			return file{}, fmt.Errorf("%w: another process has it open for writing", ErrBusy)
		}
	}
	return readOpen(name, f)
}

// renameOver is for file systems that cannot exchange names.
func (d *dir) renameOver(temp string, base file) (bool, error) {
	now, err := d.read(base.name)
	if err != nil {
		return false, err
	}
	if !now.is(base.stat) || !bytes.Equal(now.text, base.text) {
		return false, nil
	}
	if err := d.root.Rename(temp, base.name); err != nil {
		return false, err
	}
	return true, nil
}
