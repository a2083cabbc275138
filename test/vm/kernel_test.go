package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/debian"
	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/vm/machine"
)

// emulator is a script in place of QEMU: its kernel says $CONSOLE on the first
// serial port, and $EVENTS come from the second.
const emulator = `#!/bin/sh
if [ "$1" = --version ]; then
	echo "QEMU emulator version 10.0.2"
	exit
fi
while [ $# -gt 0 ]; do
	case "$1" in
	file:*) printf '%s\n' "$CONSOLE" >"${1#file:}" ;;
	esac
	shift
done
printf '%s\n' "$EVENTS"
`

// fakeLab has that emulator, and a kernel of no bytes.
func fakeLab(t *testing.T, out *strings.Builder) *lab {
	t.Helper()
	write := func(file string, perm os.FileMode, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), perm); err != nil {
			t.Fatal(err)
		}
	}
	path := t.TempDir()
	write(filepath.Join(path, "qemu-system-x86_64"), 0o755, emulator)
	t.Setenv("PATH", path+":"+os.Getenv("PATH"))

	cache := t.TempDir()
	write(filepath.Join(cache, "kernel-6.1/boot/vmlinuz-6.1.0-test"), 0o644, "")
	write(filepath.Join(cache, "kernel-6.1/lib/modules/6.1.0-test/kernel/net/veth.ko"), 0o644, "")
	l := &lab{
		arch: machine.AMD64, cache: cache, bin: filepath.Join(cache, "bin"), out: out, limit: time.Minute, cpus: 1,
		apt: &debian.APT{Dir: filepath.Join(cache, "apt"), Logf: t.Logf},
	}
	for _, p := range programs {
		write(filepath.Join(l.bin, p.name), 0o755, "")
	}
	write(filepath.Join(l.bin, "guest"), 0o755, "")
	var err error
	if l.qemu, err = machine.FetchQEMU(context.Background(), cache, l.apt); err != nil {
		t.Fatal(err)
	}
	return l
}

// A run fails if a test does, if the kernel complains on its console though every
// test passes, and if the machine dies. Then its console is kept, and what was left
// out is said in any case.
func TestKernel(t *testing.T) {
	const (
		booted = `{"Kind":"booted","Text":"6.1.0-test","Version":"#1 SMP Debian 6.1.9-1 (2026-01-02)"}` + "\n"
		loaded = `{"Kind":"output","Run":0,"Text":"{\"Error\":\"\"}"}` + "\n" + `{"Kind":"ended","Run":0}` + "\n"
		done   = `{"Kind":"done"}`
		quiet  = "[    1.0] Linux version 6.1.0-test\n[    9.0] reboot: Power down"
	)
	for _, tc := range []struct {
		name, console, events string
		failed                string // why; empty: it has not
	}{
		{"healthy", quiet, booted + loaded + done, ""},
		{"warning", "[    5.0] WARNING: CPU: 0 PID: 77 at net/core/stream.c:217 sk_stream_kill_queues+0x57/0x60\n" + quiet, booted + loaded + done,
			"the kernel complained: [    5.0] WARNING: CPU: 0 PID: 77"},
		{"oops", "[    5.0] Oops: 0000 [#1] PREEMPT SMP NOPTI\n[    5.1] Kernel panic - not syncing: Fatal exception", booted,
			"the kernel complained: [    5.0] Oops: 0000 [#1]"},
		{"ends early", quiet, booted + loaded, "ended before its script did"},
		{"test fails", quiet, booted + strings.ReplaceAll(loaded, `\"\"`, `\"no\"`) + done, "the datapath does not load: no"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("CONSOLE", tc.console)
			t.Setenv("EVENTS", strings.TrimSpace(tc.events))
			var out strings.Builder
			l := fakeLab(t, &out)
			scaled := loads
			scaled.scaled = []string{"the moon: too far"}
			plans := []plan{{kernel: "6.1", suites: []suite{scaled}}}
			runs := l.all(t.Context(), plans, 1)
			l.summarise(&out, setCI, plans, runs)

			c := total(runs)
			if tc.failed == "" && c != (report.Counts{Passed: 1}) || tc.failed != "" && c.Failed == 0 || !strings.Contains(out.String(), tc.failed) {
				t.Errorf("%+v, and should fail by %q:\n%s", c, tc.failed, &out)
			}
			if runs[0].Kernel != "6.1.0-test" || runs[0].Version != "6.1.9-1" {
				t.Errorf("kernel %q, %q", runs[0].Kernel, runs[0].Version)
			}
			if len(runs[0].Suites) > 0 && !strings.Contains(out.String(), "not all of load: the moon: too far\n") {
				t.Errorf("does not say what was left out:\n%s", &out)
			}
			console, err := os.ReadFile(filepath.Join(l.logs(plans[0]), "console"))
			switch {
			case tc.failed == "" && !os.IsNotExist(err):
				t.Errorf("the log of a healthy kernel was kept: %v", err)
			case tc.failed != "" && (err != nil || strings.TrimSpace(string(console)) != tc.console):
				t.Errorf("the console was not kept: %q, %v", console, err)
			}
			const again = "again: go run ./test/vm -set ci -arch amd64 -kernel 6.1"
			if strings.Contains(out.String(), again) != (tc.failed != "") {
				t.Errorf("how to run it again:\n%s", &out)
			}
		})
	}
}
