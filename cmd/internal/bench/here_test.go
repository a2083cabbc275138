package bench

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/test/node"
)

// These tests run `skipstack bench --conflist` on the machine of the tests, which is
// private to them.

// machine has a conflist for it. Its name keeps tests that run at once apart.
func machine(t *testing.T, mode string) (conflist string, n *node.Node, leases string) {
	t.Helper()
	node.Need(t)
	n, err := node.New(node.Options{}) // for its bpffs and run directory
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if link, err := netlink.LinkByName("bench0"); err == nil {
			_ = netlink.LinkDel(link)
		}
		_ = os.RemoveAll(hereDir)
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	leases = filepath.Join(dir, "leases")
	list, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": "users", "plugins": []any{
		map[string]any{"type": "bridge", "bridge": "bench0", "isGateway": true, "ipam": map[string]any{
			"type": "host-local", "dataDir": leases, "ranges": []any{[]any{map[string]any{"subnet": "10.99.0.0/24"}}},
		}},
		// No capabilities: the bench adds what it needs.
		map[string]any{"type": "skipstack", "mode": mode, "bpffs": n.BPFFS, "runDir": n.RunDir},
	}})
	if err != nil {
		t.Fatal(err)
	}
	conflist = filepath.Join(dir, "10-users.conflist")
	if err := os.WriteFile(conflist, list, 0o600); err != nil {
		t.Fatal(err)
	}
	return conflist, n, leases
}

func hereArgs(conflist string, more ...string) []string {
	return append([]string{"--conflist=" + conflist, "--cni-path=" + node.ProgramDir(), "--quick", "--tests=rr", "--max-pairs=7"}, more...)
}

// clean checks that a bench has left nothing of its own.
func clean(t *testing.T, n *node.Node, leases string) {
	t.Helper()
	nothingLeft(t)
	if _, err := os.Stat(hereDir); !os.IsNotExist(err) {
		t.Errorf("left: %s (%v)", hereDir, err)
	}
	for _, dir := range []string{filepath.Join(n.RunDir, "attachments"), filepath.Join(n.BPFFS, "skipstack/v2/links"), filepath.Join(leases, "users")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
		for _, e := range entries {
			if strings.Count(e.Name(), ".") == 3 || !strings.Contains(dir, leases) {
				t.Errorf("left: %s", filepath.Join(dir, e.Name()))
			}
		}
	}
	// The kernel removes a namespace's links a moment after the namespace.
	eventually(t, "no pod's link is left", func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Type() == "veth" {
				return fmt.Errorf("left: link %s", l.Attrs().Name)
			}
		}
		return nil
	})
}

func TestHere(t *testing.T) {
	conflist, n, leases := machine(t, "auto")
	file := filepath.Join(t.TempDir(), "result.json")
	cmd := program(hereArgs(conflist, "--json="+file, "--reference=unix")...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	clean(t, n, leases)
	content, err := os.ReadFile(file)
	var r Report
	if err == nil {
		err = json.Unmarshal(content, &r)
	}
	if err != nil || !r.Proven() || len(r.Points) != 2 {
		t.Errorf("%v\n%s\n%s", err, content, out)
	}
	if h := r.Header; !strings.HasPrefix(h.Network, "this node, network users: bridge + skipstack") || h.Verdict == "" || len(h.LeftOut) != 1 {
		t.Errorf("header %+v", h)
	}
	for _, p := range r.Points {
		if p.Path != PodIP || p.Proof != Proven || p.RedirectedBytes < p.PayloadBytes*99/100 || p.Unix == nil || p.Repeats < 5 || p.Repeats > 7 {
			t.Errorf("%+v", p)
		}
	}
}

// TestHereSecretlyOff: the user's node stops accelerating while the bench runs.
func TestHereSecretlyOff(t *testing.T) {
	conflist, n, leases := machine(t, "auto")
	out, code := disturbedHere(t, conflist, "data verified", func(int) { closeGate(t, n.BPFFS) })
	if code != ExitNotProven || !strings.Contains(out, "NOT PROVEN") {
		t.Errorf("exit code %d\n%s", code, out)
	}
	clean(t, n, leases)
}

func TestHereModeOff(t *testing.T) {
	conflist, n, leases := machine(t, "off")
	cmd := program(hereArgs(conflist)...)
	out, _ := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != ExitUsage || !bytes.Contains(out, []byte("mode is off")) || bytes.Contains(out, []byte("making")) {
		t.Errorf("exit code %d\n%s", code, out)
	}
	clean(t, n, leases)
}

// TestHereBusy: a pod that the plugin had no time to accelerate is added again.
func TestHereBusy(t *testing.T) {
	conflist, n, leases := machine(t, "auto")
	lock, err := attachment.NewStore(n.RunDir).Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out, code := disturbedHere(t, conflist, "trying again", func(int) {
		if err := lock.Unlock(); err != nil {
			t.Error(err)
		}
	})
	if code != ExitProven || !strings.Contains(out, "was not accelerated in time (busy: ") {
		t.Errorf("exit code %d\n%s", code, out)
	}
	clean(t, n, leases)
}

// TestHereKilled: an interrupted bench cleans up; what a killed one leaves, the
// next removes.
func TestHereKilled(t *testing.T) {
	conflist, n, leases := machine(t, "auto")
	out, code := disturbedHere(t, conflist, "data verified", func(pid int) { _ = unix.Kill(pid, unix.SIGTERM) })
	if code != ExitNotProven || !strings.Contains(out, "interrupted") {
		t.Errorf("SIGTERM: exit code %d\n%s", code, out)
	}
	clean(t, n, leases)

	out, code = disturbedHere(t, conflist, "data verified", func(pid int) { _ = unix.Kill(pid, unix.SIGKILL) })
	if left, err := filepath.Glob(filepath.Join(hereDir, "*/"+"attachment-*")); code == 0 || err != nil || len(left) != 2 {
		t.Fatalf("SIGKILL: exit code %d, left %v, %v\n%s", code, left, err, out)
	}
	// Another chain, whose plugins are elsewhere.
	other := filepath.Join(t.TempDir(), "20-other.conflist")
	if err := os.WriteFile(other, []byte(`{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"odd"},{"type":"skipstack"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := program(hereArgs(other, "--cni-path="+pluginDir(t, "exit 1", "exit 0"))...)
	if out, err := cmd.CombinedOutput(); err == nil || bytes.Contains(out, []byte("sweep")) {
		t.Errorf("the next: %v\n%s", err, out)
	}
	clean(t, n, leases)
	cmd = program(hereArgs(conflist)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("the one after: %v\n%s", err, out)
	}
	clean(t, n, leases)
}

// TestHereKilledSweptByPrivate: what a killed bench leaves on the node is removed by the next
// one with a private node, too, which goes on where it cannot be. A live bench keeps what
// it has.
func TestHereKilledSweptByPrivate(t *testing.T) {
	conflist, n, leases := machine(t, "auto")
	dir := pluginDir(t, "exit 1", "exit 1", chainPlugins...)
	out, code := disturbedHere(t, conflist, "data verified", func(pid int) { _ = unix.Kill(pid, unix.SIGKILL) }, "--cni-path="+dir)
	records := func() []string {
		left, err := filepath.Glob(filepath.Join(hereDir, "*/attachment-*"))
		if err != nil {
			t.Fatal(err)
		}
		return left
	}
	if left := records(); code == 0 || len(left) != 2 {
		t.Fatalf("SIGKILL: exit code %d, left %v\n%s", code, left, out)
	}
	alive := filepath.Join(hereDir, "skipstack-node-1-alive")
	if err := os.Mkdir(alive, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Open(alive)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(alive, "attachment-of-another"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	private := func(cniPath string) string {
		t.Helper()
		out, err := program("--quick", "--tests=crr", "--paths=pod", "--max-pairs=5", "--cni-path="+cniPath).CombinedOutput()
		if err != nil {
			t.Errorf("a bench with a private node: %v\n%s", err, out)
		}
		return string(out)
	}

	if err := os.Remove(filepath.Join(dir, "bridge")); err != nil {
		t.Fatal(err)
	}
	out = private(t.TempDir())
	if left := records(); strings.Count(out, "bench: not all that a killed bench left on this node") != 1 || len(left) != 3 {
		t.Errorf("without a plugin that DEL needs: left %v\n%s", left, out)
	}
	out = private(node.ProgramDir())
	if left := records(); strings.Count(out, "bench: removing pod ") != 2 || strings.Contains(out, "not all") || len(left) != 1 {
		t.Errorf("left %v\n%s", left, out)
	}
	if err := os.RemoveAll(hereDir); err != nil {
		t.Fatal(err)
	}
	clean(t, n, leases)
}

// TestHereFailedDelete: where ADD fails or is interrupted and DEL fails too, the bench says
// that something is left, and the next one removes it.
func TestHereFailedDelete(t *testing.T) {
	for _, c := range []struct {
		name, add, want string
		deletes         int
	}{
		{"ADD fails", "exit 1", "add pod server", 2},
		{"ADD is interrupted", "echo > $(dirname $0)/adding; exec sleep 1000", "interrupted: nothing is proven\n", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			conflist, n, leases := machine(t, "auto")
			dir := addPlugin(t, conflist, c.add, "echo >> $(dirname $0)/deletes; exit 1")
			cmd := program(hereArgs(conflist, "--cni-path="+dir)...)
			var said bytes.Buffer
			cmd.Stdout, cmd.Stderr = &said, &said
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(c.add, "adding") {
				eventually(t, "ADD is under way", func() error {
					_, err := os.Stat(filepath.Join(dir, "adding"))
					return err
				})
				_ = cmd.Process.Signal(unix.SIGINT)
			}
			_ = cmd.Wait()
			out := said.String()
			if code := cmd.ProcessState.ExitCode(); code != ExitNotProven || !strings.Contains(out, c.want) || !strings.Contains(out, node.ErrLeftover.Error()) || strings.Contains(out, "is removed") {
				t.Errorf("exit code %d\n%s", code, out)
			}
			if left, err := filepath.Glob(filepath.Join(hereDir, "*/attachment-*")); err != nil || len(left) != 1 {
				t.Errorf("records: %v, %v", left, err)
			}
			if deletes, err := os.ReadFile(filepath.Join(dir, "deletes")); err != nil || len(deletes) != c.deletes {
				t.Errorf("%d DELs, want %d (%v)", len(deletes), c.deletes, err)
			}
			if left, err := filepath.Glob(filepath.Join(leases, "users/10.99.0.*")); err != nil || len(left) != 1 {
				t.Errorf("leases: %v, %v", left, err)
			}

			interruptSweep(t, conflist, dir)
			writePlugin(t, dir, "exit 1", "exit 0")
			cmd = program(hereArgs(conflist, "--cni-path="+dir)...)
			if next, err := cmd.CombinedOutput(); err == nil || bytes.Contains(next, []byte(node.ErrLeftover.Error())) {
				t.Errorf("the next: %v\n%s", err, next)
			}
			clean(t, n, leases)
		})
	}
}

// interruptSweep interrupts a bench while a DEL of the sweep hangs, whose plugin has
// started something that holds its streams.
func interruptSweep(t *testing.T, conflist, dir string) {
	t.Helper()
	writePlugin(t, dir, "exit 1", "cd $(dirname $0); sleep 1000 & echo $! > new; mv new child; wait")
	cmd := program(hereArgs(conflist, "--cni-path="+dir)...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var child int
	eventually(t, "DEL is under way", func() error {
		text, err := os.ReadFile(filepath.Join(dir, "child"))
		if err == nil {
			_, err = fmt.Sscan(string(text), &child)
		}
		return err
	})
	_ = cmd.Process.Signal(unix.SIGINT)
	select {
	case <-ended:
		kill(t, child)
	case <-time.After(time.Minute):
		kill(t, child)
		t.Errorf("an interrupted sweep did not end in a minute (%v)", <-ended)
	}
	if code := cmd.ProcessState.ExitCode(); code != ExitNotProven || !strings.Contains(said.String(), "interrupted") {
		t.Errorf("exit code %d\n%s", code, said.String())
	}
}

// addPlugin puts a plugin between the two of a conflist. The directory that it returns has
// all of them.
func addPlugin(t *testing.T, conflist, add, del string) (dir string) {
	t.Helper()
	dir = pluginDir(t, add, del, chainPlugins...)
	raw, err := os.ReadFile(conflist)
	if err != nil {
		t.Fatal(err)
	}
	var list map[string]any
	if err = json.Unmarshal(raw, &list); err == nil {
		plugins := list["plugins"].([]any)
		list["plugins"] = slices.Insert(plugins, 1, any(map[string]any{"type": "odd"}))
		raw, err = json.Marshal(list)
	}
	if err == nil {
		err = os.WriteFile(conflist, raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// pluginDir makes a directory with the plugin odd, skipstack and others.
func pluginDir(t *testing.T, add, del string, others ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range append([]string{plugin.Type}, others...) {
		if err := os.Symlink(filepath.Join(node.ProgramDir(), name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	writePlugin(t, dir, add, del)
	return dir
}

func writePlugin(t *testing.T, dir, add, del string) {
	t.Helper()
	script := "#!/bin/sh\ncase $CNI_COMMAND in\nADD) " + add + ";;\nDEL) " + del + ";;\nVERSION) echo '{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}';;\nesac\n"
	if err := os.WriteFile(filepath.Join(dir, "odd"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
}

// TestHereClosedPipe: nobody reads on what the bench says, as with head(1).
func TestHereClosedPipe(t *testing.T) {
	conflist, n, leases := machine(t, "auto")
	closedPipe(t, program(hereArgs(conflist)...))
	clean(t, n, leases)
}

func TestPrivateClosedPipe(t *testing.T) {
	node.Need(t)
	closedPipe(t, program("--quick", "--cni-path="+node.ProgramDir()))
	nothingLeft(t)
}

// closedPipe runs the bench and closes the pipe that takes all it says after two lines.
func closedPipe(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	for lines, i := bufio.NewScanner(r), 0; i < 2 && lines.Scan(); i++ {
	}
	r.Close()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != ExitNotProven {
		t.Errorf("%v, want exit code %d", cmd.ProcessState, ExitNotProven)
	}
}

// disturbedHere runs the bench, and disturb after a line on standard error.
func disturbedHere(t *testing.T, conflist, after string, disturb func(pid int), more ...string) (said string, code int) {
	t.Helper()
	cmd := program(hereArgs(conflist, more...)...)
	var out, errs bytes.Buffer
	cmd.Stdout = &out
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	done := false
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		fmt.Fprintln(&errs, lines.Text())
		if !done && strings.Contains(lines.Text(), after) {
			disturb(cmd.Process.Pid)
			done = true
		}
	}
	_ = cmd.Wait()
	return out.String() + errs.String(), cmd.ProcessState.ExitCode()
}

func TestProvePods(t *testing.T) {
	plain := Evidence{Payload: 1000, TCP: 1000, Connection: 5}
	accelerated := func(redirected, passed, tcp, ends uint64) Evidence {
		return Evidence{Payload: 100000, TCP: tcp, Connection: 100, Counters: counted(
			map[string]uint64{redirectedLabel: redirected, passedLabel: passed}, map[string]uint64{enrolledLabel: ends})}
	}
	for _, c := range []struct {
		name   string
		test   Test
		plain  Evidence
		with   Evidence
		want   Proof
		reason string
	}{
		{"all redirected", RequestResponse, plain, accelerated(100000, 0, 0, 200), Proven, ""},
		{"a full receiver", Stream, plain, accelerated(80000, 20000, 20000, 200), Overflow, ""},
		{"passed without need", RequestResponse, plain, accelerated(80000, 20000, 20000, 200), Failed, "20000 passed"},
		{"mostly passed", Stream, plain, accelerated(40000, 60000, 60000, 200), Failed, "60000 passed"},
		{"unexplained", Stream, plain, accelerated(80000, 10000, 20000, 200), Failed, "20000 went by TCP"},
		{"counted, but went by TCP", Stream, plain, accelerated(100000, 0, 50000, 200), Failed, "50000 went by TCP"},
		{"not enrolled", RequestResponse, plain, accelerated(100000, 0, 0, 190), Failed, "190 were enrolled"},
		{"nothing sent", Stream, plain, Evidence{}, Failed, "nothing was sent"},
		{"plain was enrolled", Stream, Evidence{Payload: 1, TCP: 1, Counters: counted(nil, map[string]uint64{enrolledLabel: 2})}, accelerated(100000, 0, 0, 200), Failed, "plain runs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, reason := provePods(Point{Test: c.test}, &c.plain, &c.with)
			if got != c.want || !strings.Contains(reason, c.reason) || (reason != "") != (got == Failed) {
				t.Errorf("%s (%s), want %s (%s)", got, reason, c.want, c.reason)
			}
		})
	}
}

// TestKilledPrivate: what a killed bench with a private node leaves, the next removes.
func TestKilledPrivate(t *testing.T) {
	node.Need(t)
	args := []string{"--quick", "--tests=rr", "--paths=pod", "--max-pairs=5", "--cni-path=" + node.ProgramDir()}
	cmd := program(args...)
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if strings.Contains(lines.Text(), "data verified") {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait()
	if out, err := program(args...).CombinedOutput(); err != nil {
		t.Errorf("the next: %v\n%s", err, out)
	}
	nothingLeft(t)
}

// TestWithoutPlugins: netlink makes what bridge and host-local would. The results go to
// standard output by its other name, which takes the table elsewhere.
func TestWithoutPlugins(t *testing.T) {
	node.Need(t)
	cmd := program("--quick", "--paths=ipv6", "--cni-path="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != ExitUsage {
		t.Errorf("a selection without points: %v\n%s", err, out)
	}
	cmd = program("--tests=rr", "--paths=ipv6,service", "--placements=same-cpu", "--max-pairs=5", "--cni-path="+t.TempDir(), "--json=/dev/stdout")
	var said bytes.Buffer
	cmd.Stderr = &said
	if out, err = cmd.Output(); err != nil || !strings.Contains(said.String(), "making veth and bridge by netlink") || !strings.Contains(said.String(), "proven for every point") {
		t.Fatalf("%v\n%s%s", err, &said, out)
	}
	nothingLeft(t)
	var r Report
	err = json.Unmarshal(out, &r)
	if err != nil || !r.Proven() || !strings.Contains(r.Header.Network, "netlink") || len(r.Header.LeftOut) > 0 {
		t.Errorf("%v, %+v\n%s", err, r.Header, out)
	}
}

// What libcni parses afterwards is a list in which skipstack's entry asks for what the
// bench passes.
func FuzzWithCapabilities(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"skipstack","capabilities":{"bandwidth":true}}]}`))
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"skipstack","capabilities":3}]}`))
	f.Add([]byte(`{"plugins":[null,1,"x",{}]}`))
	f.Add([]byte(`{"plugins":{}}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		edited, err := withCapabilities(raw)
		if (err == nil) != (edited != nil) {
			t.Fatalf("%q and %v", edited, err)
		}
		if err != nil {
			return
		}
		var list struct {
			Plugins []any
		}
		if err := json.Unmarshal(edited, &list); err != nil {
			t.Fatal(err)
		}
		for _, p := range list.Plugins {
			entry, _ := p.(map[string]any)
			if entry["type"] != "skipstack" {
				continue
			}
			capabilities, _ := entry["capabilities"].(map[string]any)
			if capabilities["cgroupPath"] != true || capabilities["io.kubernetes.cri.pod-annotations"] != true {
				t.Errorf("%s", edited)
			}
		}
	})
}
