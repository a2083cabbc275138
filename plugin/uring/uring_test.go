package uring_test

import (
	"errors"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/uring"
	"github.com/skipstack/skipstack/test/must"
)

func open(t *testing.T) *uring.Ring {
	t.Helper()
	r, err := uring.New()
	if errors.Is(err, uring.ErrRefused) {
		t.Skipf("needs io_uring: %v", err)
	}
	must.Do(t, err)
	t.Cleanup(func() { must.Do(t, r.Close()) })
	return r
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	must.Do(t, err)
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// More requests than a ring has entries, each with its own result; signals that
// interrupt the waiting make no difference.
func TestWait(t *testing.T) {
	runtime.LockOSThread()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1)
	defer signal.Stop(signals)
	ring := open(t)
	r, w := pipe(t)
	buf := make([]byte, 100)
	thread := unix.Gettid()
	for n := 1; n <= len(buf); n++ {
		must.Do(t, ring.Submit(uring.Request{Op: uring.OpRead, RequestFlags: uring.ForceAsync, FD: int32(r.Fd()), Offset: uring.NoOffset}, buf))
		if res, ok, err := ring.Poll(); ok || err != nil {
			t.Fatalf("before there is anything to read: %d, %v", res, err)
		}
		var writer sync.WaitGroup
		writer.Go(func() {
			for range 10 {
				if err := unix.Tgkill(unix.Getpid(), thread, unix.SIGUSR1); err != nil {
					t.Error(err)
				}
			}
			if _, err := w.Write(buf[:n]); err != nil {
				t.Error(err)
			}
		})
		res, err := ring.Wait()
		writer.Wait()
		if int(res) != n || err != nil {
			t.Fatalf("%d, %v; want %d", res, err, n)
		}
	}
}

func TestError(t *testing.T) {
	ring := open(t)
	must.Do(t, ring.Submit(uring.Request{Op: uring.OpRead, FD: -1}, nil))
	if res, err := ring.Wait(); unix.Errno(-res) != unix.EBADF || err != nil {
		t.Errorf("%d, %v; want EBADF", res, err)
	}
}
