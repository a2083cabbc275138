package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A thread is an OS thread that lives in one network namespace and runs the
// functions given to it, one at a time. Processes started on it are born in the
// namespace and, having a parent-death signal, die with the thread at the latest.
// (Go sends a parent-death signal when the starting thread ends, not the process;
// a thread of the common pool could end at any time.)
type thread struct {
	calls chan func()
	tid   int
}

// newThread starts a thread and runs enter on it, which moves it to its namespace.
func newThread(enter func() error) (*thread, error) {
	type outcome struct {
		t   *thread
		err error
	}
	started := make(chan outcome)
	go func() {
		runtime.LockOSThread()
		// The main thread does not end with its goroutine, only with the process.
		if unix.Gettid() == os.Getpid() {
			t, err := newThread(enter)
			runtime.UnlockOSThread()
			started <- outcome{t, err}
			return
		}
		t := &thread{calls: make(chan func()), tid: unix.Gettid()}
		if err := enter(); err != nil {
			started <- outcome{nil, err}
			return
		}
		started <- outcome{t, nil}
		for call := range t.calls {
			call()
		}
		// Ending without UnlockOSThread ends the thread.
	}()
	o := <-started
	return o.t, o.err
}

// do runs f on the thread and returns its error. Functions must not call do on
// the same thread, nor leave by runtime.Goexit (as t.FailNow does).
func (t *thread) do(f func() error) error {
	err := errors.New("the function left its thread by runtime.Goexit")
	done := make(chan struct{})
	t.calls <- func() {
		defer close(done)
		err = f()
	}
	<-done
	return err
}

// close ends the thread and waits until the kernel has let go of it.
func (t *thread) close() error {
	close(t.calls)
	task := "/proc/self/task/" + strconv.Itoa(t.tid)
	for deadline := time.Now().Add(closeTimeout); ; time.Sleep(50 * time.Microsecond) {
		if _, err := os.Stat(task); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("thread %d does not end", t.tid)
		}
	}
}

// newNetNS makes a network namespace with lo up, mounts it at path, and returns
// a thread that lives in it.
func newNetNS(path string) (*thread, error) {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	t, err := newThread(func() error {
		ns, err := netns.New()
		if err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		defer ns.Close()
		// Nobody else has these addresses; detecting that takes seconds.
		for _, links := range []string{"all", "default"} {
			if err := setSysctl("net/ipv6/conf/"+links+"/accept_dad", "0"); err != nil {
				return err
			}
		}
		if err := loopbackUp(); err != nil {
			return err
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount a network namespace on %s: %w", path, err)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, ignoreMissing(os.Remove(path)))
	}
	return t, nil
}

// removeNetNS unmounts the network namespace at path, which ends once its last
// thread and process have left it.
func removeNetNS(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unmount network namespace %s: %w", path, err)
	}
	return ignoreMissing(os.Remove(path))
}
