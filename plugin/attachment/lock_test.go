package attachment

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

func withTimeout(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func mustLock(t *testing.T, s *Store) *Lock {
	t.Helper()
	l, err := s.Lock(withTimeout(t, patience))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func mustUnlock(t *testing.T, l *Lock) {
	t.Helper()
	if err := l.Unlock(); err != nil {
		t.Fatal(err)
	}
}

// wantBusy fails unless the lock is refused at the context's end. Time passes only
// while Lock waits, so that it is exact on a busy machine.
func wantBusy(t *testing.T, s *Store) (err error) {
	t.Helper()
	const budget = 50 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var l *Lock
		l, err = s.Lock(withTimeout(t, budget))
		took := time.Since(start)
		if l != nil || !errors.Is(err, ErrBusy) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Lock = %v, %v, want ErrBusy", l, err)
		}
		if took != budget {
			t.Errorf("Lock took %v of a budget of %v", took, budget)
		}
	})
	return err
}

func TestLock(t *testing.T) {
	s := newTestStore(t)
	l := mustLock(t, s)
	err := wantBusy(t, s)
	if want := fmt.Sprintf("process %d", os.Getpid()); !strings.Contains(err.Error(), want) {
		t.Errorf("%v does not name %s", err, want)
	}
	mustUnlock(t, l)
	path := filepath.Join(s.dir, lockFile)
	if data, err := os.ReadFile(path); err != nil || len(data) != 0 {
		t.Errorf("after Unlock the lock file holds %q, %v, want an empty file", data, err)
	}

	next := mustLock(t, s)
	// The first holder's second Unlock must not release the second one's lock.
	mustUnlock(t, l)
	wantBusy(t, s)
	mustUnlock(t, next)
	mustUnlock(t, next)
	mustUnlock(t, mustLock(t, s))
}

func TestLockWithEndedContext(t *testing.T) {
	s := newTestStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if l, err := s.Lock(ctx); l != nil || !errors.Is(err, ErrBusy) || !errors.Is(err, context.Canceled) {
		t.Errorf("Lock = %v, %v", l, err)
	}
}

func TestLockCancelled(t *testing.T) {
	s := newTestStore(t)
	l := mustLock(t, s)
	defer l.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error)
	go func() {
		_, err := s.Lock(ctx)
		got <- err
	}()
	cancel()
	select {
	case err := <-got:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("Lock: %v", err)
		}
	case <-time.After(patience):
		t.Error("Lock outlives its context")
	}
}

func TestLockExcludes(t *testing.T) {
	s := newTestStore(t)
	var inside atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for range 5 {
				l, err := s.Lock(withTimeout(t, patience))
				if err != nil {
					t.Error(err)
					return
				}
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d hold the lock", n)
				}
				inside.Add(-1)
				if err := l.Unlock(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// refcount does what ADD and DEL do: the file link-<id> stands for the BPF
// link of a cgroup, which must be there while attachments use it, and only
// then.
func refcount(s *Store, worker, rounds int) error {
	check := func(id uint64, link string) (int, error) {
		all, err := s.ByCgroup(id)
		if err != nil {
			return 0, err
		}
		_, err = os.Stat(link)
		if (err == nil) != (len(all) > 0) {
			return 0, fmt.Errorf("cgroup %d: %d attachments, link: %v", id, len(all), err)
		}
		return len(all), nil
	}
	step := func(i int) (err error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		l, err := s.Lock(ctx)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, l.Unlock()) }()
		id := uint64(i%2 + 1)
		link := filepath.Join(filepath.Dir(s.dir), fmt.Sprintf("link-%d", id))
		n, err := check(id, link)
		if err != nil {
			return err
		}
		r := testRecord(worker*10+i%2, id)
		if i%4 < 2 {
			if n == 0 {
				if err := os.WriteFile(link, nil, 0o600); err != nil {
					return err
				}
			}
			return s.Put(r)
		}
		if err := s.Delete(r.Key); err != nil {
			return err
		}
		left, err := s.ByCgroup(id)
		if err == nil && len(left) == 0 && n > 0 {
			err = os.Remove(link)
		}
		return err
	}
	for i := range rounds * 4 {
		if err := step(i); err != nil {
			return fmt.Errorf("worker %d, round %d: %w", worker, i, err)
		}
	}
	return nil
}

func TestReferenceCountsUnderLock(t *testing.T) {
	s := newTestStore(t)
	var children []*child
	for w := range 4 {
		children = append(children, startChild(t, childJob{Do: "refcount", Dir: s.dir, Worker: w}))
	}
	for _, c := range children {
		if err := c.finish(); err != nil {
			t.Error(err)
		}
	}
	wantExactly(t, s)
	if links, _ := filepath.Glob(filepath.Join(filepath.Dir(s.dir), "link-*")); len(links) != 0 {
		t.Errorf("left: %v", links)
	}
}

// One stuck process stops nobody.
func TestStoppedLockHolder(t *testing.T) {
	s := newTestStore(t)
	holder := startChild(t, childJob{Do: "lock", Dir: s.dir})
	holder.reached()
	holder.stop()
	err := wantBusy(t, s)
	for _, want := range []string{fmt.Sprintf("process %d", holder.cmd.Process.Pid), "stopped", filepath.Join(s.dir, lockFile)} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	r := testRecord(1, 7)
	mustPut(t, s, r)
	wantIndexed(t, s, 7)
	if err := s.Repair(); err != nil {
		t.Error(err)
	}
	wantExactly(t, s, r)
	mustDelete(t, s, r.Key)
	wantExactly(t, s)

	if err := holder.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error)
	go func() {
		l, err := s.Lock(withTimeout(t, patience))
		if err == nil {
			err = l.Unlock()
		}
		waiting <- err
	}()
	if err := holder.finish(); err != nil {
		t.Error(err)
	}
	if err := <-waiting; err != nil {
		t.Errorf("the lock was not to be had after its holder went on: %v", err)
	}
}

func TestDeathReleasesLock(t *testing.T) {
	s := newTestStore(t)
	holder := startChild(t, childJob{Do: "lock", Dir: s.dir})
	holder.reached()
	holder.stop()
	wantBusy(t, s)
	holder.kill()
	l := mustLock(t, s)
	// The dead holder's pid must not be taken for ours.
	if err := wantBusy(t, s); strings.Contains(err.Error(), fmt.Sprintf("process %d,", holder.cmd.Process.Pid)) {
		t.Errorf("%v names the dead holder", err)
	}
	mustUnlock(t, l)
}

func TestLockIsNotInherited(t *testing.T) {
	s := newTestStore(t)
	l := mustLock(t, s)
	defer l.Unlock()
	other := startChild(t, childJob{Do: "lock", Dir: filepath.Join(t.TempDir(), "other")})
	other.reached()
	fds := fmt.Sprintf("/proc/%d/fd", other.cmd.Process.Pid)
	entries, err := os.ReadDir(fds)
	if err != nil || len(entries) < 3 {
		t.Fatal(entries, err)
	}
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(fds, e.Name())); err == nil && strings.HasPrefix(target, s.dir) {
			t.Errorf("a child process has %s open", target)
		}
	}
}

// Somebody clears the run directory while the lock is held and waited for.
func TestRunDirClearedUnderLock(t *testing.T) {
	s := newTestStore(t)
	first := mustLock(t, s)
	got := make(chan *Lock)
	go func() {
		l, err := s.Lock(withTimeout(t, patience))
		if err != nil {
			t.Error(err)
		}
		got <- l
	}()
	waitUntil(t, "the waiter has the lock file open", func() bool { return openFiles(t, filepath.Join(s.dir, lockFile)) == 2 })
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
	mustUnlock(t, first)
	l := <-got
	if l == nil {
		return
	}
	// The waiter must have locked what newcomers lock.
	wantBusy(t, s)
	mustUnlock(t, l)
}

func waitUntil(t *testing.T, what string, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !reached(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// openFiles counts this process's descriptors of path.
func openFiles(t *testing.T, path string) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && target == path {
			n++
		}
	}
	return n
}

func TestLockFilePlanted(t *testing.T) {
	target := filepath.Join(t.TempDir(), "target")
	for name, plant := range map[string]func(t *testing.T, path string){
		"symbolic link":          func(t *testing.T, path string) { writeFile(t, target, []byte("keep")); symlink(t, target, path) },
		"dangling symbolic link": func(t *testing.T, path string) { symlink(t, target+"x", path) },
		"FIFO": func(t *testing.T, path string) {
			if err := syscall.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newTestStore(t)
			mkdirMode(t, s.dir, 0o700)
			plant(t, filepath.Join(s.dir, lockFile))
			if l, err := s.Lock(withTimeout(t, patience)); !errors.Is(err, ErrUnsafe) {
				t.Errorf("Lock = %v, %v, want ErrUnsafe", l, err)
			}
		})
	}
	if data, err := os.ReadFile(target); err != nil || string(data) != "keep" {
		t.Errorf("target: %q, %v", data, err)
	}
	if _, err := os.Lstat(target + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the link's target was created: %v", err)
	}
}
