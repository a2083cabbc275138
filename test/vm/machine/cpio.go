package machine

import (
	"bufio"
	"fmt"
	"io"
	"path"
)

// An Archive is an initramfs in the making: a cpio archive in the format that
// Linux calls newc (Documentation/driver-api/early-userspace/buffer-format.rst).
type Archive struct {
	w    *bufio.Writer
	inos int
	dirs map[string]bool
}

// NewArchive starts an archive; [Archive.Close] ends it.
func NewArchive(w io.Writer) *Archive {
	return &Archive{w: bufio.NewWriter(w), dirs: map[string]bool{".": true, "/": true}}
}

const (
	modeDir  = 0o040000
	modeFile = 0o100000
)

// File adds a file and the directories above it.
func (a *Archive) File(name string, perm int, data []byte) error {
	if err := a.dir(path.Dir(name)); err != nil {
		return err
	}
	return a.entry(name, modeFile|perm, data)
}

func (a *Archive) dir(name string) error {
	if a.dirs[name] {
		return nil
	}
	a.dirs[name] = true
	if err := a.dir(path.Dir(name)); err != nil {
		return err
	}
	return a.entry(name, modeDir|0o755, nil)
}

func (a *Archive) entry(name string, mode int, data []byte) error {
	a.inos++
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, device, rdevice, namesize, check
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inos, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	if err := a.put([]byte(header + name + "\x00")); err != nil {
		return err
	}
	return a.put(data)
}

// put writes data and fills up to a multiple of four bytes.
func (a *Archive) put(data []byte) error {
	if _, err := a.w.Write(data); err != nil {
		return err
	}
	_, err := a.w.Write(make([]byte, -len(data)&3))
	return err
}

// Close writes the end; the writer stays open.
func (a *Archive) Close() error {
	if err := a.entry("TRAILER!!!", 0, nil); err != nil {
		return err
	}
	return a.w.Flush()
}
