package machine

import (
	"bufio"
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/test/vm/job"
)

// TestArchive reads an archive as the kernel does.
func TestArchive(t *testing.T) {
	var b bytes.Buffer
	a := NewArchive(&b)
	files := map[string]string{"init": "x", "a/b/four": "four", "a/b/empty": "", "a/five5": "five5"}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := a.File(name, 0o755, []byte(files[name])); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	got, dirs := map[string]string{}, map[string]bool{".": true}
	for data := b.Bytes(); ; {
		field := func(i int) int {
			n, err := strconv.ParseInt(string(data[6+8*i:14+8*i]), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return int(n)
		}
		if string(data[:6]) != "070701" {
			t.Fatalf("no header at %q", data[:6])
		}
		name := string(data[110 : 110+field(11)-1])
		if name == "TRAILER!!!" {
			break
		}
		start := (110 + field(11) + 3) &^ 3
		content := string(data[start : start+field(6)])
		if !dirs[filepath.Dir(name)] {
			t.Errorf("%s comes before its directory", name)
		}
		if field(1)&0o170000 == modeDir {
			dirs[name] = true
		} else {
			got[name] = content
		}
		data = data[(start+len(content)+3)&^3:]
	}
	if !reflect.DeepEqual(got, files) {
		t.Errorf("%q, want %q", got, files)
	}
}

func TestComplaints(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	healthy := "[    1.0] Linux version 6.1\n[    2.0] evm: HMAC attrs: 0x1\n[  161.6] hrtimer: interrupt took 21618370 ns\n"
	for _, bad := range []string{
		"[   12.1] WARNING: CPU: 0 PID: 77 at net/core/stream.c:217 sk_stream_kill_queues+0x57/0x60",
		"[   12.1] BUG: kernel NULL pointer dereference, address: 0000000000000008",
		"[   12.1] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [vm:77]",
		"[   12.1] Oops: 0000 [#1] PREEMPT SMP NOPTI",
		"[   12.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
		"[   12.1] INFO: task datapath.test:90 blocked for more than 120 seconds.",
		"[   12.1] Kernel panic - not syncing: Attempted to kill init!",
		"[   12.1] refcount_t: underflow; use-after-free.",
		"[   12.1] kernel BUG at net/core/skbuff.c:4230!",
		"[   12.1] invalid opcode: 0000 [#1] PREEMPT SMP NOPTI",
		"[   12.1] Call trace:", // of arm64
		"[   12.1] Memory cgroup out of memory: Killed process 90 (datapath.test) total-vm:1240856kB",
		"[   12.1] unregister_netdevice: waiting for lo to become free. Usage count = 2",
	} {
		if err := os.WriteFile(path, []byte(healthy+bad+"\r\n"+healthy), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := complaints(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || got[0] != bad {
			t.Errorf("found %q, want %q", got, bad)
		}
	}
}

// TestRead wants every line to be an event.
func TestRead(t *testing.T) {
	var got []job.Event
	collect := func(e job.Event) error { got = append(got, e); return nil }
	if err := read(bufio.NewScanner(strings.NewReader(`{"Kind":"booted"}`+"\n"+`{"Kind":"done"}`+"\n")), collect); err != nil || len(got) != 2 {
		t.Errorf("%v, %v", got, err)
	}
	if err := read(bufio.NewScanner(strings.NewReader(`{"Kind":"booted"}`+"\npanic: oh\n")), collect); err == nil {
		t.Error("took a broken line")
	}
}
