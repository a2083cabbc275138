package podlog

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/attachment"
)

// The file log-repeats is a magic string and a table of fixed size. A slot
// holds a hash, the time when its line was last written (nanoseconds since
// 1970, little endian, 0 in an empty slot), and how often it was suppressed
// since.
const (
	repeatsFile = "log-repeats"
	magic       = "skipstack log-repeats, format 1\n"
	keyLen      = 16
	slotLen     = keyLen + 8 + 8
	slots       = 128
	tableLen    = len(magic) + slots*slotLen
)

// limiter counts repeats in the run directory.
type limiter struct {
	runDir string
	wait   time.Duration // for the lock, see lockWait
	now    func() time.Time

	mu     sync.Mutex
	broken bool // repeats cannot be counted: write them
}

// allow says whether a line with this key is to be written, and if so, how
// many were not since the last one. When it cannot tell, it is.
//
// Where more than 128 different lines come within a minute, the one that was
// written longest ago is forgotten first, and with it its count.
func (l *limiter) allow(key [keyLen]byte) (ok bool, suppressed uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken {
		return true, 0
	}
	ok, suppressed, err := l.count(key)
	if err != nil {
		// The next line would fare no better, and cost as much.
		l.broken = true
		return true, 0
	}
	return ok, suppressed
}

func (l *limiter) count(key [keyLen]byte) (ok bool, suppressed uint64, err error) {
	f, err := openTable(l.runDir)
	if err != nil {
		return false, 0, err
	}
	defer f.Close()
	locked, err := flockWithin(f, l.wait)
	if err != nil {
		return false, 0, err
	}
	if !locked {
		return false, 0, fmt.Errorf("%s is locked", f.Name())
	}
	defer unlock(f)
	data := make([]byte, tableLen+1)
	n, err := f.ReadAt(data, 0)
	if err != nil && err != io.EOF {
		return false, 0, err
	}
	table := data[:tableLen]
	if n != tableLen || string(table[:len(magic)]) != magic {
		// New, or of another version, or damaged.
		clear(table)
		copy(table, magic)
		if err := f.Truncate(0); err != nil {
			return false, 0, err
		}
		if _, err := f.WriteAt(table, 0); err != nil {
			return false, 0, err
		}
	}
	at, ok, suppressed := tally(table, key, l.now().UnixNano())
	if _, err := f.WriteAt(table[at:at+slotLen], int64(at)); err != nil {
		return false, 0, err
	}
	return ok, suppressed, nil
}

// tally counts the line in the table, and returns the offset of the slot that
// it changed.
func tally(table []byte, key [keyLen]byte, now int64) (at int, ok bool, suppressed uint64) {
	oldest := int64(0)
	for off := len(magic); off < tableLen; off += slotLen {
		slot := table[off : off+slotLen]
		written := int64(binary.LittleEndian.Uint64(slot[keyLen:]))
		if written > 0 && [keyLen]byte(slot) == key {
			count := binary.LittleEndian.Uint64(slot[keyLen+8:])
			// A time in the future was written before the clock was set back.
			if written <= now && now-written < int64(repeatGap) {
				binary.LittleEndian.PutUint64(slot[keyLen+8:], count+1)
				return off, false, 0
			}
			fill(slot, key, now)
			return off, true, count
		}
		if at == 0 || written < oldest {
			at, oldest = off, written
		}
	}
	fill(table[at:at+slotLen], key, now)
	return at, true, 0
}

func fill(slot []byte, key [keyLen]byte, now int64) {
	copy(slot, key[:])
	binary.LittleEndian.PutUint64(slot[keyLen:], uint64(now))
	binary.LittleEndian.PutUint64(slot[keyLen+8:], 0)
}

func openTable(runDir string) (*os.File, error) {
	run, err := attachment.OpenRunDir(runDir, true)
	if err != nil {
		return nil, err
	}
	defer run.Close()
	path := filepath.Join(run.Name(), repeatsFile)
	fd, err := unix.Openat(int(run.Fd()), repeatsFile,
		unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
