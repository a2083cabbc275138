package conflist

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/conf"
	"github.com/skipstack/skipstack/test/trace"
)

// marker makes this test binary install or uninstall: its value is a job.
const marker = "CONFLIST_TEST_JOB"

type job struct {
	Options
	Uninstall bool
}

func TestMain(m *testing.M) {
	text := os.Getenv(marker)
	if text == "" {
		os.Exit(m.Run())
	}
	var j job
	err := json.Unmarshal([]byte(text), &j)
	if err == nil && j.Uninstall {
		_, err = j.Options.Uninstall(context.Background(), true)
	} else if err == nil {
		_, err = j.Install(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// versions are texts that a primary plugin writes, one after the other.
func version(t testing.TB, n int) []byte {
	t.Helper()
	return fmt.Appendf(nil, "{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"n\",\n  \"_version\": %d,\n  \"plugins\": [\n    {\n      \"type\": \"bridge\",\n      \"_padding\": %q\n    }\n  ]\n}\n", n, strings.Repeat("x", n%97*50))
}

// observe reads a file again and again until stop is called, and checks that it can
// be loaded each time. absent says whether it may be missing.
func observe(t testing.TB, path string, absent bool) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for n := 0; ; n++ {
			text, err := os.ReadFile(path)
			switch {
			case errors.Is(err, fs.ErrNotExist) && absent:
			case err != nil:
				t.Error(err)
			default:
				if _, err := libcni.NetworkConfFromBytes(text); err != nil {
					t.Errorf("a runtime reads %q: %v", text, err)
				}
			}
			select {
			case <-done:
				if n < 10 {
					t.Errorf("it was looked at %d times only", n)
				}
				return
			case <-time.After(200 * time.Microsecond):
			}
		}
	}()
	return func() { close(done); <-ended }
}

// Installs and uninstalls at once: the list can be loaded at all times, has one entry
// or none, and in the end what the last one left.
func TestAtOnce(t *testing.T) {
	original := sample(t, "calico.conflist")
	b := newBed(t, map[string]string{"10.conflist": original})
	file := filepath.Join(b.conf, "10.conflist")
	stop := observe(t, file, false)
	for range 5 {
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				var err error
				if i%4 == 3 {
					_, err = b.opts.Uninstall(t.Context(), false)
				} else {
					_, err = b.opts.Install(t.Context())
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if got := string(read(t, file)); got != original && got != string(read(t, "testdata/golden/calico.conflist")) {
			t.Errorf("left is\n%s", got)
		}
	}
	stop()
	b.install()
	b.uninstall(true)
	wantTree(t, b.conf, map[string]string{"10.conflist": "-rw-r--r-- " + original})
}

// A primary plugin that writes at the same time loses nothing: what it wrote last is
// what is there, with the entry or without.
func TestPrimaryRewrites(t *testing.T) {
	for name, rewrite := range map[string]func(path string, text []byte) error{
		"by renaming": func(path string, text []byte) error {
			if err := os.WriteFile(path+".new", text, 0o644); err != nil {
				return err
			}
			return os.Rename(path+".new", path)
		},
		"in place": func(path string, text []byte) error {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			for len(text) > 0 {
				n := min(len(text), 1+rand.IntN(200))
				if _, err := f.Write(text[:n]); err != nil {
					return err
				}
				text = text[n:]
				runtime.Gosched()
			}
			return nil
		},
		"by removing": func(path string, text []byte) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.WriteFile(path, text, 0o644)
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, map[string]string{"10.conflist": string(version(t, 0))})
			b.opts.BinDir = b.bin
			file := filepath.Join(b.conf, "10.conflist")
			const rounds = 60
			with := 0
			for n := 1; n <= rounds; n++ {
				var all sync.WaitGroup
				all.Go(func() {
					time.Sleep(rand.N(2 * time.Millisecond)) // hits all parts of an install
					if err := rewrite(file, version(t, n)); err != nil {
						t.Error(err)
					}
				})
				all.Go(func() {
					_, err := b.opts.Install(t.Context())
					if err != nil && !errors.Is(err, ErrNoNetwork) && !errors.Is(err, fs.ErrNotExist) {
						t.Error(err)
					}
				})
				all.Wait()
				text := read(t, file)
				back, err := Remove(text)
				if err != nil || !bytes.Equal(back, version(t, n)) {
					t.Fatalf("after version %d: error %v, %s", n, err, text)
				}
				if Has(text) {
					with++
				}
			}
			if with == 0 || with == rounds {
				t.Logf("%d of %d installs came after the rewrite", with, rounds) // no race was met
			}
			b.install()
			if got := tree(t, b.conf); len(got) != 1 || !Has(read(t, file)) {
				t.Errorf("left are %q", got)
			}
		})
	}
}

// Without room for what is to be written nothing changes, and nothing is left.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The mount is the thread's own, and ends with it.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			t.Error(err)
			return
		}
		root := t.TempDir()
		for _, err := range []error{
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("none", root, "tmpfs", 0, "size=128k"),
		} {
			if err != nil {
				t.Error(err)
				return
			}
		}
		defer unix.Unmount(root, unix.MNT_DETACH)
		for _, name := range []string{"10.conflist", "10.conf"} {
			diskFull(t, root, name)
		}
	}()
	<-done
}

func diskFull(t *testing.T, root, name string) {
	confDir, binDir := filepath.Join(root, "conf"), filepath.Join(root, "bin")
	text := version(t, 96) // two pages
	if filepath.Ext(name) == ".conf" {
		text = fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"n","type":"bridge","_padding":%q}`, strings.Repeat("x", 5000))
	}
	filler, build := filepath.Join(root, "filler"), filepath.Join(root, "build")
	failed, succeeded := 0, 0
	for free := range 12 {
		for _, dir := range []string{confDir, binDir} {
			if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o755)); err != nil {
				t.Error(err)
				return
			}
		}
		o := Options{ConfDir: confDir, BinDir: binDir, Binary: build}
		if err := errors.Join(
			os.WriteFile(filepath.Join(confDir, name), text, 0o644),
			os.WriteFile(build, bytes.Repeat([]byte("b"), 3*4096), 0o755),
			os.WriteFile(filler, nil, 0o644),
		); err != nil {
			t.Error(err)
			return
		}
		var st unix.Statfs_t
		if err := unix.Statfs(root, &st); err != nil {
			t.Error(err)
			return
		}
		if err := os.WriteFile(filler, make([]byte, (int(st.Bfree)-free)*int(st.Bsize)), 0o644); err != nil {
			t.Error(err)
			return
		}
		before := tree(t, confDir)
		_, err := o.Install(t.Context())
		switch {
		case err == nil:
			succeeded++
			if active, err := o.activeIn(confDir); err != nil || !Has(active.Text) {
				t.Errorf("%d pages free: it is not installed (%v)", free, err)
			}
		case errors.Is(err, unix.ENOSPC):
			failed++
			wantTree(t, confDir, before)
			if got := tree(t, binDir); len(got) > 1 || len(got) == 1 && len(got["skipstack"]) != len("-rwxr-xr-x ")+3*4096 {
				t.Errorf("%d pages free: %d files are left", free, len(got))
			}
		default:
			t.Errorf("%d pages free: %v", free, err)
		}
		if err := os.Remove(filler); err != nil {
			t.Error(err)
		}
		if _, err := o.Install(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := o.Uninstall(t.Context(), true); err != nil {
			t.Error(err)
		}
		wantTree(t, confDir, before)
		if got := tree(t, binDir); len(got) != 0 {
			t.Errorf("left are %d files", len(got))
		}
	}
	if failed < 3 || succeeded < 1 {
		t.Errorf("%s: %d failed, %d succeeded", name, failed, succeeded)
	}
}

// mutates says whether a call may change what others see.
func mutates(s trace.Step) bool {
	switch s.Nr {
	case unix.SYS_OPENAT2, unix.SYS_FSYNC, unix.SYS_FCHMOD, unix.SYS_FCHOWN, unix.SYS_FSETXATTR, unix.SYS_COPY_FILE_RANGE, unix.SYS_SENDFILE, unix.SYS_FCNTL:
		return true
	}
	return s.Changes()
}

// Killed before any of its steps, an install or uninstall leaves a configuration that
// runtimes load, with the entry or without, and the next one finishes the work.
func TestKilled(t *testing.T) {
	for _, name := range []string{"10.conflist", "10.conf", "10.json"} {
		for _, uninstall := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s uninstall=%v", name, uninstall), func(t *testing.T) {
				t.Parallel()
				killed(t, name, uninstall)
			})
		}
	}
}

func killed(t *testing.T, name string, uninstall bool) {
	original := version(t, 3)
	if filepath.Ext(name) != ".conflist" {
		original = []byte(sample(t, "crio-old-bridge.conf"))
	}
	b := newBed(t, map[string]string{name: string(original)})
	before := tree(t, b.conf)
	env, err := json.Marshal(job{b.opts, uninstall})
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	steps, outcomes := 0, map[bool]int{}
	for kill := 1; ; kill++ {
		if uninstall {
			b.install()
		}
		n := 0
		status, _, err := trace.Run(exe, os.ProcAttr{Env: []string{marker + "=" + string(env)}, Files: []*os.File{null, null, os.Stderr}}, func(s trace.Step) trace.Fate {
			if !mutates(s) {
				return trace.GoOn
			}
			if n++; n == kill {
				return trace.Kill
			}
			return trace.GoOn
		})
		if err != nil {
			t.Fatal(err)
		}
		active, err := b.opts.activeIn(b.conf)
		if err != nil {
			t.Fatalf("killed before step %d: %v", kill, err)
		}
		text := active.Text
		has := Has(text)
		outcomes[has]++
		_, listErr := libcni.NetworkConfFromBytes(text)
		_, confErr := libcni.NetworkPluginConfFromBytes(text)
		if filepath.Ext(active.Path) == ".conflist" && listErr != nil || filepath.Ext(active.Path) != ".conflist" && (confErr != nil || !bytes.Equal(text, original)) {
			t.Errorf("killed before step %d, it has left %s: %s", kill, active.Path, text)
		}
		if _, err := os.Stat(filepath.Join(b.bin, "skipstack")); has && err != nil {
			t.Errorf("killed before step %d: the entry names a plugin that is not there: %v", kill, err)
		}
		finished := status.Exited()
		if finished && status.ExitStatus() != 0 {
			t.Fatalf("it has failed with %d", status.ExitStatus())
		}
		b.install()
		if active, err = b.opts.activeIn(b.conf); err != nil || !Has(active.Text) {
			t.Errorf("killed before step %d, the next install has left %s, error %v", kill, active.Path, err)
		}
		b.uninstall(true)
		wantTree(t, b.conf, before)
		if got := tree(t, b.bin); got["skipstack"] != "" || len(got) != 6 {
			t.Errorf("killed before step %d: left are %q", kill, got)
		}
		if t.Failed() {
			return
		}
		if finished {
			steps = kill
			break
		}
	}
	if steps < 8 || outcomes[true] == 0 || outcomes[false] == 0 {
		t.Errorf("%d steps, outcomes %v", steps, outcomes)
	}
}

// An extended attribute, such as SELinux's label, and the owner stay.
func TestLookStays(t *testing.T) {
	b := newBed(t, map[string]string{"10.conflist": sample(t, "flannel.conflist")})
	file := filepath.Join(b.conf, "10.conflist")
	root := os.Geteuid() == 0
	if root {
		if err := os.Chown(file, 12, 34); err != nil {
			t.Fatal(err)
		}
	}
	attributed := unix.Setxattr(file, "user.test", []byte("value"), 0)
	if attributed != nil && !errors.Is(attributed, unix.ENOTSUP) {
		t.Fatal(attributed)
	}
	b.install()
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	if root && (st.Uid != 12 || st.Gid != 34) {
		t.Errorf("owner %d:%d", st.Uid, st.Gid)
	}
	if attributed == nil {
		value := make([]byte, 16)
		if n, err := unix.Getxattr(file, "user.test", value); err != nil || string(value[:n]) != "value" {
			t.Errorf("attribute %q, error %v", value[:max(n, 0)], err)
		}
	}
	if !Has(read(t, file)) || conf.Entry == nil {
		t.Error("it is not installed")
	}
}

// What another process puts there at the very moment of the exchange stays.
func TestExchangeLosesNothing(t *testing.T) {
	b := newBed(t, map[string]string{"10.conflist": "0"})
	d, err := openDir(t.Context(), b.conf, false)
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	file := filepath.Join(b.conf, "10.conflist")
	before, after := 0, 0
	for n := 1; n <= 1000; n++ {
		base, err := d.read("10.conflist")
		if err != nil {
			t.Fatal(err)
		}
		temp, err := d.temp(strings.NewReader("ours"), 0, &base)
		if err != nil {
			t.Fatal(err)
		}
		theirs := fmt.Sprint(n)
		b.write(file+".new", theirs)
		start := make(chan struct{})
		var all sync.WaitGroup
		all.Go(func() {
			<-start
			for range rand.IntN(3000) { // hits all parts of the exchange
				runtime.Gosched()
			}
			if err := os.Rename(file+".new", file); err != nil {
				t.Error(err)
			}
		})
		close(start)
		done, err := d.exchange(t.Context(), temp, base)
		all.Wait()
		if err != nil {
			t.Fatal(err)
		}
		if done {
			before++
		} else {
			after++
		}
		if got := string(read(t, file)); got != theirs {
			t.Fatalf("round %d, exchanged %v: there is %q, want %q", n, done, got, theirs)
		}
	}
	t.Logf("%d were exchanged before the other's, %d were not", before, after)
	if got := tree(t, b.conf); len(got) != 1 {
		t.Errorf("left are %q", got)
	}
}
