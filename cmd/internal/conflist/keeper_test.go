package conflist

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
)

// within waits until ok says so.
func within(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after a minute not yet: %s", what)
		}
	}
}

// running is a keeper that runs until the test ends.
type running struct {
	mu    sync.Mutex
	all   []KeeperState
	ended chan error
	stop  func()
}

func keep(t testing.TB, o Options) *running {
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{ended: make(chan error, 1)}
	k := &Keeper{Options: o, Notify: func(s KeeperState) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.all = append(r.all, s)
	}}
	go func() { r.ended <- k.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-r.ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

func (r *running) last() KeeperState {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.all) == 0 {
		return KeeperState{}
	}
	return r.all[len(r.all)-1]
}

// A primary plugin that rewrites, removes and delays its file: in the end there is
// one entry in what it wrote last, and at no time a list that cannot be loaded.
func TestKeeper(t *testing.T) {
	b := newBed(t, nil)
	file := filepath.Join(b.conf, "10.conflist")
	r := keep(t, b.opts)
	within(t, "it says that there is no network", func() bool { return strings.Contains(r.last().Reason, ErrNoNetwork.Error()) })
	stop := observeLoadable(t, b.conf)
	rng := rand.New(rand.NewPCG(1, 2))
	var last []byte
	kept := func() bool {
		text := read(t, file)
		back, err := Remove(text)
		_, statErr := os.Stat(filepath.Join(b.bin, "skipstack"))
		return err == nil && statErr == nil && Has(text) && bytes.Equal(back, last)
	}
	for n := 1; n <= 100; n++ {
		last = version(t, n)
		switch rng.IntN(4) {
		case 0: // delayed
			if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(rng.IntN(30)) * time.Millisecond)
			fallthrough
		case 1: // as libraries for atomic writes do
			b.write(file+".tmp", string(last))
			if err := os.Rename(file+".tmp", file); err != nil {
				t.Fatal(err)
			}
		case 2: // in place, in two parts
			f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
			if err != nil {
				t.Fatal(err)
			}
			_, err1 := f.Write(last[:len(last)/2])
			time.Sleep(time.Duration(rng.IntN(5)) * time.Millisecond)
			_, err2 := f.Write(last[len(last)/2:])
			if err := errors.Join(err1, err2, f.Close()); err != nil {
				t.Fatal(err)
			}
		case 3: // removes the binary too
			_ = os.Remove(filepath.Join(b.bin, "skipstack"))
			b.write(file+".tmp", string(last))
			if err := os.Rename(file+".tmp", file); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
		if n%10 == 0 {
			within(t, "there is one entry in the last version", kept)
		}
	}
	// At least one for each time that it was waited for; it counts after it has written.
	within(t, "it says so", func() bool {
		s := r.last()
		return s.Present && s.Reason == "" && s.Conflist == file && s.Repairs >= 10
	})
	stop()
	r.stop()
	if got := tree(t, b.conf); len(got) != 1 {
		t.Errorf("left are %q", got)
	}
}

// observeLoadable checks that lists which have the entry can be loaded. Those of the
// primary may be half written.
func observeLoadable(t testing.TB, dir string) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			names, _ := filepath.Glob(filepath.Join(dir, "*.conflist"))
			for _, name := range names {
				text, err := os.ReadFile(name)
				if err == nil && bytes.Contains(text, []byte("skipstack")) {
					if _, err := libcni.NetworkConfFromBytes(text); err != nil || bytes.Count(text, []byte(`"type": "skipstack"`)) != 1 {
						t.Errorf("a runtime reads %q: %v", text, err)
					}
				}
			}
			select {
			case <-done:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return func() { close(done); <-ended }
}

// The directory comes late, goes, and comes again; the file changes its name and kind.
func TestKeeperFollows(t *testing.T) {
	b := newBed(t, nil)
	if err := os.RemoveAll(filepath.Dir(b.conf)); err != nil {
		t.Fatal(err)
	}
	r := keep(t, b.opts)
	within(t, "it says that there is no network", func() bool { return strings.Contains(r.last().Reason, ErrNoNetwork.Error()) })
	installed := func(name string) func() bool {
		return func() bool {
			text, err := os.ReadFile(filepath.Join(b.conf, name))
			return err == nil && Has(text)
		}
	}
	for range 2 {
		b.write(filepath.Join(b.conf, "10-flannel.conflist"), sample(t, "flannel.conflist"))
		within(t, "it has installed", installed("10-flannel.conflist"))
		b.write(filepath.Join(b.conf, "05-ptp.conf"), `{"cniVersion":"1.0.0","name":"n","type":"ptp"}`)
		within(t, "it has converted what comes first now", installed("05-ptp.conflist"))
		// The keeper may still be writing there, and then a file appears between
		// the removal of the others and that of the directory.
		within(t, "the directory is gone", func() bool { return os.RemoveAll(b.conf) == nil })
		within(t, "it says that there is no network", func() bool { return strings.Contains(r.last().Reason, ErrNoNetwork.Error()) })
	}
}

// What it must leave alone it leaves alone, and says why.
func TestKeeperReasons(t *testing.T) {
	for name, tc := range map[string]struct {
		file, text, reason string
		present            bool
	}{
		"edited": {"10.conflist", sample(t, "edited-entry.conflist"), "other settings", true},
		"Cilium": {"05-cilium.conflist", sample(t, "cilium.conflist"), "cni.exclusive", false},
		"twice":  {"10.conflist", sample(t, "twice.conflist"), "2 times", false},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, map[string]string{tc.file: tc.text})
			if tc.present {
				b.write(filepath.Join(b.bin, "skipstack"), "version 1")
				if err := os.Chmod(filepath.Join(b.bin, "skipstack"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			before := tree(t, b.conf)
			r := keep(t, b.opts)
			within(t, "it says why", func() bool { s := r.last(); return strings.Contains(s.Reason, tc.reason) && s.Present == tc.present })
			r.stop()
			wantTree(t, b.conf, before)
		})
	}
}

// Another program that takes the entry out each time is not fought at full speed.
func TestKeeperDoesNotFight(t *testing.T) {
	b := newBed(t, map[string]string{"10.conflist": sample(t, "flannel.conflist")})
	file := filepath.Join(b.conf, "10.conflist")
	r := keep(t, b.opts)
	within(t, "it says that it is being undone", func() bool {
		if Has(read(t, file)) {
			b.write(file+".tmp", sample(t, "flannel.conflist"))
			if err := os.Rename(file+".tmp", file); err != nil {
				t.Fatal(err)
			}
		}
		return strings.Contains(r.last().Reason, "again and again")
	})
	within(t, "it has installed all the same", func() bool { return r.last().Present && Has(read(t, file)) })
}
