package podlog

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests run this binary again where they need another process.
const childEnv = "SKIPSTACK_TEST_CHILD"

type childJob struct {
	File    string // log file
	Size    int64
	RunDir  string
	Worker  int
	Lines   int
	Repeat  bool   // the same line again and again
	HoldFor string // hold the lock of this file instead, until stdin ends
}

func TestMain(m *testing.M) {
	if raw, ok := os.LookupEnv(childEnv); ok {
		if err := runChild(raw); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func runChild(raw string) error {
	var job childJob
	if err := json.Unmarshal([]byte(raw), &job); err != nil {
		return err
	}
	if job.HoldFor != "" {
		f, err := os.Open(job.HoldFor)
		if err != nil {
			return err
		}
		if ok, err := flockWithin(f, 0); !ok || err != nil {
			return fmt.Errorf("lock: %v, %v", ok, err)
		}
		fmt.Println("locked")
		_, err = io.Copy(io.Discard, os.Stdin)
		return err
	}
	var stderr bytes.Buffer
	log, closer := newLog(Options{File: job.File, Stderr: &stderr, RunDir: job.RunDir}, limits{job.Size, patience}, time.Now)
	for i := range job.Lines {
		if job.Repeat {
			log.Warn("the same trouble", reasonKey, "again", containerKey, job.Worker)
		} else {
			log.Warn("line", "worker", job.Worker, "number", i, "pad", strings.Repeat("x", i%90))
		}
	}
	if stderr.Len() > 0 {
		return errors.New(stderr.String())
	}
	return closer.Close()
}

func startChild(t *testing.T, job childJob) (cmd *exec.Cmd, stdin io.Closer, stdout io.Reader) {
	t.Helper()
	raw, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command("/proc/self/exe")
	// The race detector would otherwise wait a second before each exit.
	cmd.Env = append(os.Environ(), childEnv+"="+string(raw), "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	if stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if stdout, err = cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, stdin, stdout
}

// stoppedHolder locks the file in a process that is then stopped.
func stoppedHolder(t *testing.T, path string) {
	t.Helper()
	cmd, _, stdout := startChild(t, childJob{HoldFor: path})
	if _, err := io.ReadFull(stdout, make([]byte, len("locked\n"))); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
}

// clock is a time that the test sets.
type clock struct{ at time.Time }

func newClock() *clock                { return &clock{time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC)} }
func (c *clock) now() time.Time       { return c.at }
func (c *clock) pass(d time.Duration) { c.at = c.at.Add(d) }

// Waiting for a stuck process once is all right, waiting at each of many lines
// is not: that would take many*lockWait. The limit leaves room for a busy
// machine.
//
// Where nobody is stuck, lines wait with patience for whoever the machine has no time
// for at the moment.
const (
	patience = time.Minute
	many     = 300
	muchLess = many * lockWait / 2
)

func lines(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(s, "\n"), "\n")
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func mustClose(t *testing.T, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestParseLevel(t *testing.T) {
	for name, want := range map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError} {
		if got, err := ParseLevel(name); err != nil || got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "INFO", "warning", "info+1", strings.Repeat("x", 1<<16)} {
		if _, err := ParseLevel(name); err == nil || len(err.Error()) > 200 {
			t.Errorf("%.20q: %.200v", name, err)
		}
	}
}

func TestOneLinePerRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	var stderr bytes.Buffer
	log, closer := New(Options{File: path, Stderr: &stderr})
	log = log.With("container", "c1", "pod", "ns/web")
	log.Warn("pod is not\naccelerated", "reason", "first\nsecond \"quoted\" \x00\r level=ERROR")
	mustClose(t, closer)
	mustClose(t, closer)
	got := readFile(t, path)
	if len(lines(got)) != 1 || strings.ContainsAny(strings.TrimSuffix(got, "\n"), "\n\r\x00") {
		t.Errorf("not one line: %q", got)
	}
	for _, want := range []string{"time=", "level=WARN", `msg="pod is not\naccelerated"`, "container=c1", "pod=ns/web", `reason="first\nsecond \"quoted\"`} {
		if !strings.Contains(got, want) {
			t.Errorf("%q lacks %q", got, want)
		}
	}
	if stderr.Len() != 0 {
		t.Errorf("stderr has %q", stderr.String())
	}
	log.Warn("late")
	if !strings.Contains(stderr.String(), "late") || strings.Contains(readFile(t, path), "late") {
		t.Errorf("a line after Close is not on stderr: %q", stderr.String())
	}
}

func TestLevels(t *testing.T) {
	for level, want := range map[slog.Level]int{slog.LevelDebug: 4, slog.LevelInfo: 3, slog.LevelWarn: 2, slog.LevelError: 1} {
		var stderr bytes.Buffer
		log, closer := New(Options{Stderr: &stderr, Level: level})
		log.Debug("m")
		log.Info("m")
		log.Warn("m")
		log.Error("m")
		mustClose(t, closer)
		if got := len(lines(stderr.String())); got != want {
			t.Errorf("%v: %d lines, want %d", level, got, want)
		}
	}
}

func TestNothingIsOpenedBeforeALine(t *testing.T) {
	dir := t.TempDir()
	log, closer := New(Options{File: filepath.Join(dir, "log"), RunDir: filepath.Join(dir, "run")})
	log.Debug("below the level")
	mustClose(t, closer)
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestNilStderr(t *testing.T) {
	log, closer := New(Options{})
	log.Error("nobody listens")
	mustClose(t, closer)
	log, closer = New(Options{File: t.TempDir()})
	log.Error("nobody listens")
	mustClose(t, closer)
}

func TestFileIsAppendedWithMode0600(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	path := filepath.Join(t.TempDir(), "log")
	for range 2 {
		log, closer := New(Options{File: path})
		log.Info("line")
		mustClose(t, closer)
	}
	if got := len(lines(readFile(t, path))); got != 2 {
		t.Errorf("%d lines, want 2", got)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

func TestFileThatCannotBeUsed(t *testing.T) {
	target := filepath.Join(t.TempDir(), "target")
	if err := os.WriteFile(target, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		plant func(t *testing.T, path string)
		says  string
	}{
		"symbolic link":    {func(t *testing.T, path string) { must(t, os.Symlink(target, path)) }, "symbolic link"},
		"dangling link":    {func(t *testing.T, path string) { must(t, os.Symlink(target+"x", path)) }, "symbolic link"},
		"hard link":        {func(t *testing.T, path string) { must(t, os.Link(target, path)) }, "hard link"},
		"directory":        {func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o700)) }, "is a directory"},
		"FIFO":             {func(t *testing.T, path string) { must(t, unix.Mkfifo(path, 0o600)) }, "not a regular file"},
		"FIFO with reader": {plantReadFIFO, "not a regular file"},
		"no directory":     {func(t *testing.T, path string) { must(t, os.Remove(filepath.Dir(path))) }, "create its directory"},
		"file as directory": {func(t *testing.T, path string) {
			must(t, os.Remove(filepath.Dir(path)))
			must(t, os.WriteFile(filepath.Dir(path), nil, 0o600))
		}, "not a directory"},
		"another user's":    {plantForeign, "belongs to uid"},
		"cannot be rotated": {plantFull, "not a regular file"},
		"somebody else's":   {func(t *testing.T, path string) { must(t, os.WriteFile(path, []byte(foreignText), 0o600)) }, "not a log of skipstack's"},
		"old one is a link": {func(t *testing.T, path string) {
			must(t, os.WriteFile(path, fullLog(maxSize), 0o600))
			must(t, os.Symlink(target, path+".1"))
		}, ".1 is a symbolic link"},
		"old one is somebody else's": {func(t *testing.T, path string) {
			must(t, os.WriteFile(path, fullLog(maxSize), 0o600))
			must(t, os.WriteFile(path+".1", []byte(foreignText), 0o600))
		}, ".1 is not a log of skipstack's"},
		"full and kept open": {plantStuck, "keeps it locked"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "sub", "log")
			must(t, os.Mkdir(filepath.Dir(path), 0o700))
			c.plant(t, path)
			var stderr bytes.Buffer
			log, closer := New(Options{File: path, Stderr: &stderr})
			start := time.Now()
			log.Warn("first")
			for range many {
				log.Warn("second")
			}
			if took := time.Since(start); took > muchLess {
				t.Errorf("took %v", took)
			}
			mustClose(t, closer)
			if strings.HasSuffix(name, "somebody else's") {
				kept := path
				if strings.HasPrefix(name, "old") {
					kept += ".1"
				}
				if got := readFile(t, kept); got != foreignText {
					t.Errorf("%s has changed: %.100q", kept, got)
				}
			}
			got := lines(stderr.String())
			if len(got) != many+2 || !strings.Contains(got[0], c.says) || !strings.Contains(got[0], path) ||
				!strings.Contains(got[1], "msg=first") || !strings.Contains(got[many+1], "msg=second") {
				t.Errorf("stderr has\n%s\nwant a complaint (%s, %s), first, and many times second", stderr.String(), path, c.says)
			}
		})
	}
	if got := readFile(t, target); got != "keep" {
		t.Errorf("a link's target was written: %q", got)
	}
	if _, err := os.Lstat(target + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a link's target was created: %v", err)
	}
}

// foreignText is of another program that uses the same format, almost.
const foreignText = "time=noon level=INFO msg=mine\n"

// fullLog begins like a log of ours.
func fullLog(size int) []byte {
	const first = "time=2026-01-01T12:00:00.000+01:00 level=WARN msg=first\n"
	return append([]byte(first), make([]byte, size-len(first))...)
}

func TestOurLinesAreKnown(t *testing.T) {
	for line, ours := range map[string]bool{
		"time=2026-01-01T12:00:00.000Z level=INFO msg=m":                   true,
		"time=2026-01-01T12:00:00.000-11:30 level=ERROR+2 msg=\"a b\" x=1": true,
		foreignText: false,
		"{\"time\":\"2026-01-01T12:00:00Z\",\"level\":\"INFO\"}": false,
		"\ntime=2026-01-01T12:00:00.000Z level=INFO msg=m":       false,
		"time=2026-01-01T12:00:00.000Z":                          false,
		"\x00":                                                   false,
		"":                                                       true, // an empty file
	} {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := (&file{path: path, maxSize: maxSize}).open(); (err == nil) != ours {
			t.Errorf("%q: %v", line, err)
		}
	}
	// As slog writes them on this machine.
	for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
		var b bytes.Buffer
		log, closer := New(Options{Stderr: &b, Level: slog.LevelDebug})
		log.Log(t.Context(), level, "two words")
		mustClose(t, closer)
		if !ourLine.Match(b.Bytes()) {
			t.Errorf("not known: %q", b.String())
		}
	}
}

func plantReadFIFO(t *testing.T, path string) {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
}

func plantForeign(t *testing.T, path string) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file away")
	}
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 12345, 0); err != nil {
		t.Fatal(err)
	}
}

func plantFull(t *testing.T, path string) {
	if err := os.WriteFile(path, fullLog(maxSize), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path+".1", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
}

func plantStuck(t *testing.T, path string) {
	if err := os.WriteFile(path, fullLog(maxSize+slack), 0o600); err != nil {
		t.Fatal(err)
	}
	stoppedHolder(t, path)
}

func TestFullFileSystem(t *testing.T) {
	const env = "SKIPSTACK_TEST_MOUNTS"
	if os.Getenv(env) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run", "^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), env+"=1", "GORACE=atexit_sleep_ms=0")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		if os.Geteuid() != 0 {
			cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
		}
		out, err := cmd.CombinedOutput()
		if os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission) {
			t.Skip("no unprivileged user namespaces: cannot mount")
		}
		if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k,mode=0700"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 1<<17), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	log, closer := New(Options{File: filepath.Join(dir, "log"), Stderr: &stderr, RunDir: filepath.Join(dir, "run")})
	log.Warn("first")
	log.Warn("first")
	mustClose(t, closer)
	got := lines(stderr.String())
	if len(got) != 3 || !strings.Contains(got[0], "no space left") || !strings.Contains(got[1], "msg=first") || !strings.Contains(got[2], "msg=first") {
		t.Errorf("stderr has\n%s", stderr.String())
	}
}

func TestLongLineIsCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	log, closer := New(Options{File: path})
	log.Warn("long", "reason", strings.Repeat("ü", 1<<16))
	log.Warn("next")
	mustClose(t, closer)
	got := lines(readFile(t, path))
	if len(got) != 2 || len(got[0]) > maxLine || len(got[0]) < maxLine-20 || !strings.HasSuffix(got[0], "ü...") {
		t.Errorf("%d lines, the first of %d bytes ends in %.20q", len(got), len(got[0]), got[0][len(got[0])-20:])
	}
}

func TestRotation(t *testing.T) {
	const size = 10_000
	path := filepath.Join(t.TempDir(), "log")
	// What another program keeps beside it is not touched.
	if err := os.WriteFile(path+".2", []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	total := 0
	for range 5 {
		log, closer := newLog(Options{File: path, Stderr: &stderr}, limits{size, patience}, time.Now)
		for range 100 {
			log.Warn("line", "worker", 0, "number", total, "pad", strings.Repeat("x", total%90))
			total++
		}
		mustClose(t, closer)
	}
	if stderr.Len() != 0 {
		t.Errorf("stderr has %q", stderr.String())
	}
	if seen := checkRotated(t, path, size, 1, total); seen[0] == total {
		t.Error("nothing was rotated away")
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 3 {
		t.Errorf("%v, %v, want log, log.1, log.2", entries, err)
	}
	if got := readFile(t, path+".2"); got != "keep" {
		t.Errorf("log.2 has %q", got)
	}
}

// A process that has the file open notices that another one has renamed it.
func TestRotatedByAnother(t *testing.T) {
	const size = 10_000
	path := filepath.Join(t.TempDir(), "log")
	idle, idleCloser := newLog(Options{File: path}, limits{size, patience}, time.Now)
	idle.Warn("before")
	busy, busyCloser := newLog(Options{File: path}, limits{size, patience}, time.Now)
	for i := 0; ; i++ {
		busy.Warn("line", "number", i)
		if _, err := os.Stat(path + ".1"); err == nil {
			break
		}
	}
	rotated := readFile(t, path+".1")
	idle.Warn("after")
	mustClose(t, idleCloser)
	mustClose(t, busyCloser)
	if got := readFile(t, path); len(lines(got)) != 2 || !strings.Contains(got, "msg=after") {
		t.Errorf("log has %q", got)
	}
	if got := readFile(t, path+".1"); got != rotated || !strings.Contains(got, "msg=before") {
		t.Errorf("log.1 has changed: %q", got)
	}
	// logrotate without "create".
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	again, closer := newLog(Options{File: path}, limits{size, patience}, time.Now)
	again.Warn("one")
	if err := os.Rename(path, path+".2"); err != nil {
		t.Fatal(err)
	}
	again.Warn("two")
	mustClose(t, closer)
	if got := readFile(t, path); len(lines(got)) != 1 || !strings.Contains(got, "msg=two") {
		t.Errorf("log has %q", got)
	}
}

var rotatedLine = regexp.MustCompile(`^time=\S+ level=WARN msg=line worker=(\d+) number=(\d+) pad=(x*|"")$`)

// checkRotated fails unless path.1 and path hold the last lines of every
// worker, whole, in order, and without a gap. It returns their numbers.
func checkRotated(t *testing.T, path string, size, workers, total int) []int {
	t.Helper()
	next := make([]int, workers)
	seen := make([]int, workers)
	for i := range next {
		next[i] = -1
	}
	for _, name := range []string{path + ".1", path} {
		data := readFile(t, name)
		if len(data) > size || !strings.HasSuffix(data, "\n") {
			t.Errorf("%s has %d bytes, the limit is %d; it ends in %q", name, len(data), size, data[max(0, len(data)-20):])
		}
		for _, line := range lines(data) {
			m := rotatedLine.FindStringSubmatch(line)
			if m == nil {
				t.Fatalf("%s: broken line %q", name, line)
			}
			worker, _ := strconv.Atoi(m[1])
			number, _ := strconv.Atoi(m[2])
			if next[worker] != -1 && next[worker] != number {
				t.Fatalf("%s: worker %d: line %d, want %d", name, worker, number, next[worker])
			}
			next[worker] = number + 1
			seen[worker]++
		}
	}
	for worker, n := range next {
		if n != total && n != -1 {
			t.Errorf("worker %d: the last line is %d of %d", worker, n-1, total)
		}
	}
	return seen
}

func TestRotationByManyProcesses(t *testing.T) {
	const workers, each, size = 4, 1000, 100_000
	path := filepath.Join(t.TempDir(), "log")
	var cmds []*exec.Cmd
	for w := range workers {
		cmd, _, _ := startChild(t, childJob{File: path, Size: size, Worker: w, Lines: each})
		cmds = append(cmds, cmd)
	}
	for _, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	checkRotated(t, path, size, workers, each)
}

func TestGoroutinesShareALog(t *testing.T) {
	const workers, each = 8, 50
	path := filepath.Join(t.TempDir(), "log")
	log, closer := newLog(Options{File: path, RunDir: filepath.Join(t.TempDir(), "run")}, limits{1 << 20, patience}, time.Now)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				log.Warn("line", "reason", strconv.Itoa(w*each+i))
			}
		})
	}
	wg.Wait()
	mustClose(t, closer)
	if got := len(lines(readFile(t, path))); got != workers*each {
		t.Errorf("%d lines, want %d", got, workers*each)
	}
}

func TestStoppedProcessKeepsTheLogLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stoppedHolder(t, path)
	var stderr bytes.Buffer
	log, closer := New(Options{File: path, Stderr: &stderr})
	start := time.Now()
	for range many {
		log.Warn("line")
	}
	if took := time.Since(start); took > muchLess {
		t.Errorf("%d lines took %v", many, took)
	}
	mustClose(t, closer)
	if got := len(lines(readFile(t, path))); got != many || stderr.Len() != 0 {
		t.Errorf("%d lines, stderr %q", got, stderr.String())
	}
}

// repeats returns the log lines of what do logs.
func repeats(t *testing.T, o Options, c *clock, do func(log *slog.Logger)) []string {
	t.Helper()
	var stderr bytes.Buffer
	o.Stderr = &stderr
	log, closer := newLog(o, limits{maxSize, lockWait}, c.now)
	do(log)
	mustClose(t, closer)
	return lines(stderr.String())
}

func TestRepeats(t *testing.T) {
	c := newClock()
	o := Options{RunDir: filepath.Join(t.TempDir(), "run")}
	// Each call stands for a CNI call.
	warn := func(container, reason string) []string {
		return repeats(t, o, c, func(log *slog.Logger) {
			log.With("container", container).Warn("pod is not accelerated", "reason", reason)
		})
	}
	expect := func(got []string, count int, contains string) {
		t.Helper()
		if len(got) != count || count > 0 && !strings.Contains(got[0]+"\n", contains) {
			t.Errorf("got %q, want %d lines that contain %q", got, count, contains)
		}
		if contains == "\n" && count > 0 && strings.Contains(got[0], suppressedKey) {
			t.Errorf("%q counts what was not suppressed", got)
		}
	}
	expect(warn("c1", "why"), 1, "\n")
	expect(warn("c1", "why"), 0, "")
	expect(warn("c2", "why"), 0, "")
	expect(warn("c2", "because"), 1, "\n")
	c.pass(repeatGap - time.Nanosecond)
	expect(warn("c3", "why"), 0, "")
	c.pass(time.Nanosecond)
	expect(warn("c4", "why"), 1, "suppressed=3\n")
	expect(warn("c5", "why"), 0, "")
	expect(warn("c5", "because"), 1, "\n")
	c.pass(repeatGap)
	expect(warn("c5", "why"), 1, "suppressed=1\n")
	c.pass(repeatGap)
	expect(warn("c5", "why"), 1, "\n")

	// A clock that is set back does not silence the log until it has caught up.
	c.pass(-24 * time.Hour)
	expect(warn("c6", "why"), 1, "\n")
	expect(warn("c6", "why"), 0, "")
}

func TestRepeatsAreTold(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(log *slog.Logger)
		want int
	}{
		"same":             {func(log *slog.Logger) { log.Warn("m"); log.Warn("m") }, 1},
		"messages":         {func(log *slog.Logger) { log.Warn("m"); log.Warn("n") }, 2},
		"levels":           {func(log *slog.Logger) { log.Warn("m"); log.Error("m") }, 2},
		"reasons":          {func(log *slog.Logger) { log.Warn("m", "reason", "a"); log.Warn("m", "reason", "b") }, 2},
		"errors":           {func(log *slog.Logger) { log.Warn("m", "error", "a"); log.Warn("m", "error", "b") }, 2},
		"reason and error": {func(log *slog.Logger) { log.Warn("m", "error", "a"); log.Warn("m", "reason", "a") }, 2},
		"parts":            {func(log *slog.Logger) { log.Warn("ma", "reason", "b"); log.Warn("m", "reason", "ab") }, 2},
		"with": {func(log *slog.Logger) {
			log.With("reason", "a").Warn("m")
			log.With("reason", "b").Warn("m")
			log.With("reason", "a").With("x", 1).Warn("m")
			log.Warn("m", "reason", "a")
		}, 2},
		"with, twice from one": {func(log *slog.Logger) {
			base := log.With("reason", 1, "reason", 2, "reason", 3)
			a, b := base.With("reason", "a"), base.With("reason", "b")
			a.Warn("m")
			b.Warn("m")
		}, 2},
		"group":           {func(log *slog.Logger) { log.WithGroup("g").Warn("m"); log.WithGroup("g").Warn("m") }, 1},
		"warn, container": {func(log *slog.Logger) { log.Warn("m", "container", "a"); log.Warn("m", "container", "b") }, 1},
		"info, container": {func(log *slog.Logger) {
			log.Info("m", "container", "a")
			log.With("container", "a").Info("m")
			log.Info("m", "container", "b")
		}, 2},
		"debug": {func(log *slog.Logger) { log.Debug("m"); log.Debug("m") }, 2},
	} {
		t.Run(name, func(t *testing.T) {
			o := Options{RunDir: filepath.Join(t.TempDir(), "run"), Level: slog.LevelDebug}
			if got := repeats(t, o, newClock(), c.do); len(got) != c.want {
				t.Errorf("%d lines, want %d: %q", len(got), c.want, got)
			}
		})
	}
	if got := repeats(t, Options{}, newClock(), func(log *slog.Logger) { log.Warn("m"); log.Warn("m") }); len(got) != 2 {
		t.Errorf("without run directory: %q", got)
	}
}

// Lines of a log file that cannot be opened come from every CNI call.
func TestComplaintIsNotRepeated(t *testing.T) {
	o := Options{RunDir: filepath.Join(t.TempDir(), "run"), File: t.TempDir()}
	c := newClock()
	for call, want := range []int{2, 1, 1} {
		got := repeats(t, o, c, func(log *slog.Logger) { log.Warn(fmt.Sprint("call ", call)) })
		if len(got) != want {
			t.Errorf("call %d: %q, want %d lines", call, got, want)
		}
	}
}

func TestTableDoesNotGrow(t *testing.T) {
	c := newClock()
	o := Options{RunDir: filepath.Join(t.TempDir(), "run")}
	path := filepath.Join(o.RunDir, repeatsFile)
	repeats(t, o, c, func(log *slog.Logger) {
		for i := range 1000 {
			c.pass(time.Millisecond)
			log.Warn("m", "reason", strconv.Itoa(i))
		}
	})
	fi, err := os.Stat(path)
	if err != nil || fi.Size() != int64(tableLen) || fi.Mode() != 0o600 {
		t.Errorf("%v, %v, want %d bytes, mode 0600", fi, err, tableLen)
	}
	entries, err := os.ReadDir(o.RunDir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	// The youngest are remembered.
	got := repeats(t, o, c, func(log *slog.Logger) {
		for i := range slots {
			log.Warn("m", "reason", strconv.Itoa(999-i))
		}
	})
	if len(got) != 0 {
		t.Errorf("%d lines were forgotten", len(got))
	}
}

func TestTableThatCannotBeUsed(t *testing.T) {
	for name, c := range map[string]struct {
		plant func(t *testing.T, runDir, path string) error
		want  int // lines of two that are the same
	}{
		"empty": {func(t *testing.T, _, path string) error { return os.WriteFile(path, nil, 0o600) }, 1},
		"short": {func(t *testing.T, _, path string) error { return os.WriteFile(path, []byte(magic), 0o600) }, 1},
		"long":  {func(t *testing.T, _, path string) error { return os.WriteFile(path, make([]byte, 1<<20), 0o600) }, 1},
		"garbage": {func(t *testing.T, _, path string) error {
			return os.WriteFile(path, bytes.Repeat([]byte{0xff}, tableLen), 0o600)
		}, 1},
		"garbage slot": {func(t *testing.T, _, path string) error {
			return os.WriteFile(path, append([]byte(magic), bytes.Repeat([]byte{0x80}, tableLen-len(magic))...), 0o600)
		}, 1},
		"link":      {func(t *testing.T, _, path string) error { return os.Symlink("/etc/hostname", path) }, 2},
		"FIFO":      {func(t *testing.T, _, path string) error { return unix.Mkfifo(path, 0o600) }, 2},
		"directory": {func(t *testing.T, _, path string) error { return os.Mkdir(path, 0o700) }, 2},
		"unsafe":    {func(t *testing.T, runDir, _ string) error { return os.Chmod(runDir, 0o777) }, 2},
		"no directory": {func(t *testing.T, runDir, _ string) error {
			return errors.Join(os.Remove(runDir), os.WriteFile(runDir, nil, 0o600))
		}, 2},
		"long, with the magic": {func(t *testing.T, _, path string) error {
			return os.WriteFile(path, append([]byte(magic), make([]byte, 1<<20)...), 0o600)
		}, 1},
		"stopped process": {func(t *testing.T, _, path string) error {
			err := os.WriteFile(path, nil, 0o600)
			stoppedHolder(t, path)
			return err
		}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			o := Options{RunDir: filepath.Join(t.TempDir(), "run")}
			if err := os.Mkdir(o.RunDir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := c.plant(t, o.RunDir, filepath.Join(o.RunDir, repeatsFile)); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			got := repeats(t, o, newClock(), func(log *slog.Logger) {
				log.Warn("m")
				log.Warn("m")
				for i := range many {
					log.Debug("m")
					log.Warn("m", "reason", i)
				}
			})
			got = got[:len(got)-many]
			if took := time.Since(start); took > muchLess {
				t.Errorf("took %v", took)
			}
			if len(got) != c.want {
				t.Errorf("%d lines, want %d: %q", len(got), c.want, got)
			}
			if fi, err := os.Stat(filepath.Join(o.RunDir, repeatsFile)); c.want == 1 && (err != nil || fi.Size() != int64(tableLen)) {
				t.Errorf("%v, %v, want %d bytes", fi, err, tableLen)
			}
		})
	}
}

// However many processes meet the same trouble at once, each line is either
// written or counted.
func TestRepeatsByManyProcesses(t *testing.T) {
	const workers, each = 4, 200
	dir := t.TempDir()
	job := childJob{File: filepath.Join(dir, "log"), Size: maxSize, RunDir: filepath.Join(dir, "run"), Lines: each, Repeat: true}
	var cmds []*exec.Cmd
	for w := range workers {
		job.Worker = w
		cmd, _, _ := startChild(t, job)
		cmds = append(cmds, cmd)
	}
	for _, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	c := &clock{time.Now().Add(repeatGap)}
	last := repeats(t, Options{RunDir: job.RunDir}, c, func(log *slog.Logger) { log.Warn("the same trouble", reasonKey, "again") })
	if len(last) != 1 {
		t.Fatalf("%q", last)
	}
	written := lines(readFile(t, job.File))
	sum := len(written)
	for _, line := range append(written, last...) {
		if m := regexp.MustCompile(suppressedKey + `=(\d+)$`).FindStringSubmatch(line); m != nil {
			n, _ := strconv.Atoi(m[1])
			sum += n
		}
	}
	if sum != workers*each || len(written) == sum {
		t.Errorf("%d lines written, %d in all, want %d", len(written), sum, workers*each)
	}
}

func FuzzTally(f *testing.F) {
	empty := make([]byte, tableLen)
	copy(empty, magic)
	f.Add(empty, int64(1))
	f.Add(bytes.Repeat([]byte{0xff}, tableLen), int64(1)<<62)
	f.Add(bytes.Repeat([]byte{0x7f}, tableLen), int64(repeatGap))
	f.Add(bytes.Repeat([]byte{0x80}, tableLen), int64(1)<<62)
	f.Fuzz(func(t *testing.T, data []byte, now int64) {
		if now <= 0 {
			return
		}
		table := make([]byte, tableLen)
		copy(table, data)
		key := [keyLen]byte{1, 2, 3}
		copy(key[:], table[len(magic):]) // often a slot's
		at, first, _ := tally(table, key, now)
		if at < len(magic) || at+slotLen > tableLen || (at-len(magic))%slotLen != 0 {
			t.Fatalf("no slot's offset: %d", at)
		}
		written := int64(binary.LittleEndian.Uint64(table[at+keyLen:]))
		if written <= 0 || written > now || now-written >= int64(repeatGap) {
			t.Fatalf("first: %v, by a line that was written at %d, it is %d", first, written, now)
		}
		if again, ok, _ := tally(table, key, now); ok || again != at {
			t.Fatalf("the repeat is written, or counted elsewhere (%d, not %d)", again, at)
		}
		if first && now < 1<<62 {
			if _, ok, n := tally(table, key, now+int64(repeatGap)); !ok || n != 1 {
				t.Fatalf("after the gap: %v, %d", ok, n)
			}
		}
	})
}
