// Package podlog is the plugin's log: lines for the node's operator, each about
// one pod.
//
// Every CNI call is a process of its own, and hundreds of them may meet the
// same trouble. So that the log stays short whatever happens, the file is
// rotated by the processes that write it, and repeated lines are counted
// instead of written, across processes. Neither ever fails the caller: a line
// that cannot be filed goes to standard error, and one that cannot be counted
// is written.
package podlog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"
)

// Attributes that the log looks at. Callers give them with [slog.Logger.With]
// or with the record.
const (
	containerKey = "container" // container id
	reasonKey    = "reason"
	errorKey     = "error"
	// suppressedKey is added to a line: so many repeats of it were not written.
	suppressedKey = "suppressed"
)

const (
	maxSize   = 1 << 20 // bytes in a log file
	maxLine   = 8 << 10 // bytes in a line
	repeatGap = time.Minute
	// lockWait is how long a line waits for another process that writes one.
	// That takes microseconds, so whoever needs longer is stuck.
	lockWait = 100 * time.Millisecond
)

// Options of a log.
type Options struct {
	// File is appended to, and created with mode 0600. At 1 MiB it is renamed
	// to <File>.1, which replaces an older one. Its directory must exist. It
	// must be a regular file of this user, reached by one name only. It, and
	// <File>.1 when that is replaced, must be empty or begin with a line of
	// this log. Otherwise lines go to Stderr. Empty means Stderr.
	File string
	// Stderr takes the lines that File does not. Nil discards them.
	Stderr io.Writer
	// Level is the lowest level that is written.
	Level slog.Level
	// RunDir holds the file log-repeats, which lets processes count repeats
	// together. Empty means that repeats are written.
	RunDir string
}

// ParseLevel returns the level named debug, info, warn or error.
func ParseLevel(name string) (slog.Level, error) {
	switch name {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("unknown log level %.64q: use debug, info, warn or error", name)
}

// New returns a log, and what closes its file. It opens nothing before there
// is something to write. Lines logged after Close go to Stderr.
//
// A warning or error with the same text, and the same attributes reason and
// error, is written once a minute at most, whichever pod it is about. For info
// the attribute container must be the same too. Debug lines are all written.
// The next line that is written says how many were suppressed before it.
func New(o Options) (*slog.Logger, io.Closer) {
	return newLog(o, limits{maxSize, lockWait}, time.Now)
}

// limits are others in tests.
type limits struct {
	size int64         // see maxSize
	wait time.Duration // see lockWait
}

func newLog(o Options, l limits, now func() time.Time) (*slog.Logger, io.Closer) {
	if o.Stderr == nil {
		o.Stderr = io.Discard
	}
	s := &sink{stderr: o.Stderr}
	if o.File != "" {
		s.file = &file{path: o.File, maxSize: l.size, wait: l.wait}
	}
	h := &handler{inner: slog.NewTextHandler(s, &slog.HandlerOptions{Level: o.Level})}
	if o.RunDir != "" {
		h.limit = &limiter{runDir: o.RunDir, wait: l.wait, now: now}
	}
	// The complaint goes past the file, but is limited like any other.
	complaints := *h
	complaints.inner = slog.NewTextHandler(o.Stderr, nil)
	s.complain = slog.New(&complaints)
	return slog.New(h), s
}

// handler is a slog.Handler that leaves out repeats.
type handler struct {
	inner     slog.Handler
	limit     *limiter // nil: none
	container string
	why       []string // values of reason and error given to With
}

func (h *handler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.inner.Enabled(ctx, level)
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.inner = h.inner.WithAttrs(attrs)
	with.why = append([]string(nil), h.why...)
	for _, a := range attrs {
		with.note(a)
	}
	return &with
}

func (h *handler) WithGroup(name string) slog.Handler {
	with := *h
	with.inner = h.inner.WithGroup(name)
	return &with
}

func (h *handler) note(a slog.Attr) {
	switch a.Key {
	case containerKey:
		h.container = a.Value.Resolve().String()
	case reasonKey, errorKey:
		h.why = append(h.why, a.Key, a.Value.Resolve().String())
	}
}

// Handle writes the record or counts it. It returns no error: nobody could do
// more about it than the sink has done.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	if h.limit != nil && r.Level >= slog.LevelInfo {
		ok, suppressed := h.limit.allow(h.repeatKey(r))
		if !ok {
			return nil
		}
		if suppressed > 0 {
			r = r.Clone()
			r.AddAttrs(slog.Uint64(suppressedKey, suppressed))
		}
	}
	_ = h.inner.Handle(ctx, r)
	return nil
}

// repeatKey is the same for records of which one is enough.
func (h *handler) repeatKey(r slog.Record) [keyLen]byte {
	about := handler{container: h.container, why: append([]string(nil), h.why...)}
	r.Attrs(func(a slog.Attr) bool {
		about.note(a)
		return true
	})
	parts := append([]string{r.Level.String(), r.Message}, about.why...)
	if r.Level < slog.LevelWarn {
		parts = append(parts, about.container)
	}
	hash := sha256.New()
	for _, part := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(part)))
		hash.Write(n[:])
		hash.Write([]byte(part))
	}
	return [keyLen]byte(hash.Sum(nil))
}

// sink is where lines go: to the file, else to stderr.
type sink struct {
	mu       sync.Mutex
	file     *file // nil: none, or closed
	stderr   io.Writer
	complain *slog.Logger
	told     bool // that the file cannot be used
}

// Write takes one line, as slog's handlers do.
func (s *sink) Write(line []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	length := len(line)
	line = cut(line)
	if s.file != nil {
		err := s.file.write(line)
		if err == nil {
			return length, nil
		}
		if !s.told {
			s.told = true
			s.complain.Warn("log file cannot be used, logging to standard error", errorKey, err.Error())
		}
	}
	_, _ = s.stderr.Write(line)
	return length, nil
}

// cut shortens a line that is too long.
func cut(line []byte) []byte {
	const mark = "...\n"
	if len(line) <= maxLine {
		return line
	}
	return append(bytes.ToValidUTF8(line[:maxLine-len(mark)], nil), mark...)
}

// Close closes the file. Closing again does nothing.
func (s *sink) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return nil
	}
	err := s.file.close()
	s.file = nil
	return err
}
