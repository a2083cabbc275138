package plugin

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/attachment"
)

// The child is a shell script that writes down what it was given, then waits to
// be told to end.
func TestProberStart(t *testing.T) {
	dir := t.TempDir()
	out, stop := filepath.Join(dir, "out"), filepath.Join(dir, "stop")
	if err := unix.Mkfifo(stop, 0o600); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`#!/bin/sh
{
	echo "args $*"
	echo "cwd $(pwd)"
	env | sed 's/^/env /'
	for fd in /proc/$$/fd/*; do echo "fd ${fd##*/} $(readlink $fd)"; done
	echo "stat $(cat /proc/$$/stat)"
} >%[1]s.tmp
mv %[1]s.tmp %[1]s
read line <%[2]s
`, out, stop)
	exe := filepath.Join(dir, "child")
	if err := os.WriteFile(exe, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}

	// A careless runtime leaks a descriptor to the plugin.
	var leaked [2]int
	if err := unix.Pipe(leaked[:]); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leaked[0])
	defer unix.Close(leaked[1])
	leak, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", leaked[1]))
	if err != nil {
		t.Fatal(err)
	}

	conf := DefaultConfig()
	conf.RunDir = filepath.Join(dir, "run")
	conf.CgroupRoot, conf.LogFile, conf.SpliceGuard, conf.MaxConnections = "/cg", "/log", SpliceGuardOff, 99
	d := detached{exe: exe, env: []string{"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=ADD", "CNI_ARGS=x", "KEEP=1"}}
	if err := d.Start(conf, true); err != nil {
		t.Fatal(err)
	}
	// While it lives there is no second one, though its parent has let go.
	if err := (detached{exe: "/no/such/file"}).Start(conf, false); err != nil {
		t.Errorf("a second prober was started: %v", err)
	}
	if held, err := lockProbe(ended(), conf.RunDir); err == nil {
		held.Close()
		t.Error("the child does not hold the lock")
	}

	data := await(t, func() ([]byte, error) { return os.ReadFile(out) })
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	find := func(prefix string) (found []string) {
		for _, l := range lines {
			if strings.HasPrefix(l, prefix+" ") {
				found = append(found, strings.TrimPrefix(l, prefix+" "))
			}
		}
		return found
	}
	args := find("args")
	if len(args) != 1 || !strings.HasPrefix(args[0], "probe --lock-fd=3 --entry={") || !strings.HasSuffix(args[0], "} --load") {
		t.Fatalf("arguments %q", args)
	}
	entry := strings.TrimSuffix(strings.TrimPrefix(args[0], "probe --lock-fd=3 --entry="), " --load")
	if got, err := ParseConfig([]byte(entry)); err != nil || !reflect.DeepEqual(got, conf) {
		t.Errorf("the child gets %+v, error %v, want %+v", got, err, conf)
	}
	if got := find("cwd"); !slices.Equal(got, []string{"/"}) {
		t.Errorf("working directory %v", got)
	}
	env := strings.Join(find("env"), "\n")
	if strings.Contains(env, "CNI_") || !strings.Contains(env, "KEEP=1") {
		t.Errorf("environment\n%s", env)
	}
	want := map[string]string{"0": "/dev/null", "2": "/dev/null", "3": filepath.Join(conf.RunDir, attachment.ProbeLock)}
	for _, fd := range find("fd") {
		number, target, _ := strings.Cut(fd, " ")
		if w, ok := want[number]; ok && target != w {
			t.Errorf("descriptor %s is %s, want %s", number, target, w)
		}
		delete(want, number)
		if target == leak {
			t.Errorf("the child inherited descriptor %s, %s", number, target)
		}
	}
	if len(want) > 0 {
		t.Errorf("descriptors %v are not open", want)
	}
	// Field 6 of stat is the session; the child leads its own.
	stat := find("stat")
	if len(stat) != 1 {
		t.Fatal(stat)
	}
	fields := strings.Fields(stat[0][strings.LastIndex(stat[0], ")")+1:])
	if pid := strings.Fields(stat[0])[0]; fields[3] != pid {
		t.Errorf("session %s of process %s", fields[3], pid)
	}

	// It ends, and so does the lock.
	w, err := os.OpenFile(stop, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	held := await(t, func() (*os.File, error) { return lockProbe(ended(), conf.RunDir) })
	held.Close()
	if err := (detached{exe: "/no/such/file"}).Start(conf, false); err == nil {
		t.Error("started a file that does not exist")
	}
	held = await(t, func() (*os.File, error) { return lockProbe(ended(), conf.RunDir) })
	held.Close()
}

// await calls f until it succeeds.
func await[T any](t *testing.T, f func() (T, error)) T {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		v, err := f()
		if err == nil {
			return v
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}
