// Package regular reads files that may turn out to be something else: a FIFO or a
// device in the place of a file must not stop or fill the reader.
package regular

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotRegular is wrapped where there is something else than a regular file.
	ErrNotRegular = errors.New("not a regular file")
	// ErrTooLarge is wrapped where a file has more bytes than it may.
	ErrTooLarge = errors.New("too large")
)

// Read reads a regular file of at most so many bytes, following symbolic links. It
// waits for nobody: to open a FIFO would otherwise last until there is a writer.
//
// The error wraps [ErrNotRegular], [ErrTooLarge], or what the kernel said.
func Read(path string, most int64) ([]byte, error) { return read(path, most, 0) }

// ReadNoFollow is [Read], but a symbolic link in the place of the file is an error
// that wraps ELOOP.
func ReadNoFollow(path string, most int64) ([]byte, error) {
	return read(path, most, unix.O_NOFOLLOW)
}

func read(path string, most int64, flags int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|flags, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ReadOpen(f, most)
}

// ReadOpen reads an open file, which the caller closes. The errors are those of
// [Read].
func ReadOpen(f *os.File, most int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: f.Name(), Err: ErrNotRegular}
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > most {
		return nil, &fs.PathError{Op: "read", Path: f.Name(), Err: fmt.Errorf("%w: larger than %d bytes", ErrTooLarge, most)}
	}
	return data, nil
}
