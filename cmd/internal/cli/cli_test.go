package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
)

// fake stands for the kernel. What a command does is tested in package plugin;
// here it matters what is passed in and what is said.
type fake struct {
	plugin.Datapath // nil: what is not overridden is not called
	plugin.Set

	loaded  bool
	build   bool // another build's is loaded
	node    datapath.NodeSettings
	pods    map[uint64]datapath.PodSettings
	fail    error
	force   bool
	max     uint32
	bpffs   string
	probed  int
	noBPFFS bool
	sockets uint64 // that Unload leaves
	closing int    // after so many readings all connections have closed, unless 0
	verdict plugin.Verdict
}

func (f *fake) Open(bpffs string) (plugin.Set, error) {
	f.bpffs = bpffs
	if !f.loaded {
		return nil, datapath.ErrNotLoaded
	}
	return f, f.fail
}
func (f *fake) EnsureBPFFS(_ context.Context, path string) error { f.bpffs = path; return f.fail }
func (f *fake) Upgrade(_ context.Context, _ string, o datapath.LoadOptions) (plugin.Set, bool, error) {
	if !f.loaded {
		f.loaded, f.max = true, o.MaxConnections
	}
	return f, f.build, nil
}
func (f *fake) Published(path string) (bool, error) {
	if f.noBPFFS {
		return false, fmt.Errorf("%s: %w", path, datapath.ErrNoBPFFS)
	}
	return f.loaded, nil
}
func (f *fake) Sweep(string, int) error              { return f.fail }
func (f *fake) HasLink(string, uint64) (bool, error) { return f.loaded, nil }
func (f *fake) Unload(_ context.Context, _ string, force bool) (datapath.Remaining, error) {
	left := datapath.Remaining{Sockets: f.sockets}
	f.force, f.loaded = force, false
	if f.closing == 1 {
		left.Sockets = 0
	}
	f.closing = max(0, f.closing-1)
	return left, f.fail
}
func (f *fake) LiveInKernel() (uint64, error) { return f.sockets, nil }

func (f *fake) SwitchNode(_ string, off bool) (int, error) {
	if !f.loaded {
		return 0, nil
	}
	f.node.SwitchedOff = off
	return 1, f.fail
}
func (f *fake) Close() error                         { return nil }
func (f *fake) Node() (datapath.NodeSettings, error) { return f.node, nil }
func (f *fake) SetNode(n datapath.NodeSettings) error {
	n.SwitchedOff = f.node.SwitchedOff
	f.node = n
	return nil
}
func (f *fake) MaxConnections() (uint32, error) { return f.max, nil }
func (f *fake) Build() ([16]byte, error)        { return datapath.Build(), nil }
func (f *fake) Pod(id uint64) (datapath.PodSettings, bool, error) {
	p, ok := f.pods[id]
	return p, ok, nil
}
func (f *fake) SetPod(id uint64, p datapath.PodSettings) error { f.pods[id] = p; return nil }
func (f *fake) PodCounters() (map[uint64]datapath.PodCounters, error) {
	if f.closing == 1 {
		return nil, nil
	}
	f.closing = max(0, f.closing-1)
	return map[uint64]datapath.PodCounters{7: {Live: 1}, 8: {Live: 3}}, nil
}
func (f *fake) BPFFSIdentity(string) (uint64, uint64, error) { return 1, 1, nil }
func (f *fake) Observe() (datapath.Observation, error) {
	count := datapath.Count{Messages: 2, Bytes: 1500}
	end := func(pod uint64, from, to string, unread uint64) *datapath.Socket {
		return &datapath.Socket{Pod: pod, Mode: datapath.ModeRedirect, Local: netip.MustParseAddrPort(from), Remote: netip.MustParseAddrPort(to),
			Age: 90 * time.Second, Redirected: count, PassedBy: map[string]uint64{}, Unread: unread, Next: "redirected"}
	}
	return datapath.Observation{
		Node: f.node, MaxConnections: f.max,
		Settings: f.pods,
		Pods:     map[uint64]datapath.PodCounters{7: {Accelerated: 1, Redirected: count, Passed: datapath.Count{Messages: 1, Bytes: 500}}},
		Counters: datapath.Counters{
			Messages:    map[string]datapath.Count{"redirected": count, "not_read": {Messages: 1, Bytes: 500}, "plain": {}},
			Connections: map[string]uint64{"enrolled": 1},
			Events:      map[string]uint64{datapath.EventSpliceRefused: 3, datapath.EventULPRefused: 1},
		},
		Connections: []datapath.Connection{
			{Client: end(7, "10.0.0.2:40000", "10.96.0.1:80", 0), Server: end(9, "10.0.0.3:8080", "10.0.0.2:40000", 12)},
			{Server: end(9, "10.0.0.3:8080", "10.0.0.2:40001", 0)},
		},
		Sockets: datapath.Usage{Entries: 2, Max: 8},
	}, f.fail
}
func (f *fake) Cached(string) (plugin.Verdict, error) {
	return plugin.Verdict{}, fmt.Errorf("%w: no file", plugin.ErrNoVerdict)
}
func (f *fake) Probe(context.Context, plugin.Config) (plugin.Verdict, error) {
	f.probed++
	return f.verdict, nil
}

func (f *fake) GuardFailed(_ plugin.Config, v plugin.Verdict, _ error) (plugin.Verdict, error) {
	return v, nil
}

// cgroups knows no root but the one of the machine.
type cgroups struct{ plugin.Cgroups }

func (cgroups) Root(configured string) (string, error) {
	if configured != "" {
		return "", podcgroup.ErrNoCgroup2
	}
	return "/sys/fs/cgroup", nil
}

// Set and Datapath have methods of the same name.
type verdicts struct{ *fake }

func newFake(t *testing.T) (*fake, string) {
	f := &fake{
		sockets: 2,
		pods:    map[uint64]datapath.PodSettings{7: {Enabled: true}},
		verdict: plugin.Verdict{
			Supported: true, Node: datapath.NodeSettings{Open: true, Risks: datapath.RiskSplice}, Summary: "risky: splice",
			Document: map[string]any{"verdict": "risky", "risks": []string{"splice"}},
		},
	}
	runDir := filepath.Join(t.TempDir(), "run")
	return f, runDir
}

func record(t *testing.T, runDir string) {
	t.Helper()
	err := attachment.NewStore(runDir).Put(attachment.Record{
		Key:          attachment.Key{Network: "n", ContainerID: "c", IfName: "eth0"},
		PodNamespace: "ns", PodName: "web", Status: attachment.Attached, CgroupID: 7,
	})
	if err != nil {
		t.Fatal(err)
	}
}

// exec runs a command line, which does not see the machine's own CNI cache.
func exec(f *fake, args ...string) (code int, stdout, stderr string) {
	cache := func(arg string) bool { return strings.HasPrefix(arg, "--cni-cache-dir") }
	if len(args) > 0 && (args[0] == "uninstall" || args[0] == "status") && !slices.ContainsFunc(args, cache) {
		args = append(slices.Clone(args), "--cni-cache-dir", "/no/such/cache")
	}
	var out, errs bytes.Buffer
	deps := plugin.Deps{Datapath: f, Cgroups: cgroups{}, Verdicts: verdicts{f}, Log: func(plugin.Config) (*slog.Logger, io.Closer) {
		return slog.New(slog.NewTextHandler(&errs, nil)), io.NopCloser(nil)
	}}
	custom := &cobra.Command{Use: "custom", RunE: func(*cobra.Command, []string) error { return exitError("custom") }}
	silent := &cobra.Command{Use: "silent", RunE: func(*cobra.Command, []string) error { return exitError("") }}
	code = Run(context.Background(), args, Streams{In: strings.NewReader(""), Out: &out, Err: &errs}, deps, custom, silent)
	return code, out.String(), errs.String()
}

type exitError string

func (e exitError) Error() string { return string(e) }
func (e exitError) ExitCode() int { return 42 }

func TestCommands(t *testing.T) {
	loaded := func(f *fake) { f.loaded, f.max = true, plugin.DefaultMaxConnections }
	for _, tc := range []struct {
		name    string
		args    string // RUN is the run directory
		prepare func(*fake)
		pod     bool // one is attached
		code    int
		out     []string // substrings; none: nothing is printed
		err     string
	}{
		{name: "no command", code: 0, out: []string{"Usage:", "Exit codes:", "load", "unload", "version"}},
		{name: "help", args: "unload --help", code: 0, out: []string{"--force", "--config CONFLIST", "--json"}},
		{name: "unknown command", args: "lode", code: 2, err: `unknown command "lode"`},
		{name: "unknown flag", args: "load --fast", code: 2, err: "unknown flag: --fast"},
		{name: "argument", args: "load x", code: 2, err: `unknown command "x"`},
		{name: "load", args: "load --run-dir RUN", out: []string{"The datapath is loaded (up to 262144 connections).", "Kernel: risky: splice.",
			"Pods of the default configuration (--config names another) stay plain: the kernel has risks that are not accepted: splice (key acceptRisks"}},
		{name: "load, safe", args: "load --run-dir RUN", prepare: func(f *fake) { f.verdict.Node.Risks = 0 }, out: []string{"Pods of the default configuration (--config names another) are accelerated unless they opt out"}},
		{name: "load, bad cgroup root", args: "load --run-dir RUN --cgroup-root /mnt", prepare: func(f *fake) { f.fail = errors.New("went on") }, code: 1, err: "cgroup"},
		{name: "load again", args: "load --run-dir RUN", prepare: loaded, out: []string{"was loaded already"}},
		{name: "load another build", args: "load --run-dir RUN", prepare: func(f *fake) { loaded(f); f.build = true }, out: []string{"replaced another build's"}},
		{name: "load, other size", args: "load --run-dir RUN", prepare: func(f *fake) { loaded(f); f.max = 99 }, out: []string{"up to 99 connections", "maxConnections 262144 takes effect"}},
		{name: "load, switched off", args: "load --run-dir RUN", prepare: func(f *fake) { loaded(f); f.node.SwitchedOff = true }, out: []string{"skipstack on"}},
		{name: "load, unsupported", args: "load --run-dir RUN", prepare: func(f *fake) { f.verdict = plugin.Verdict{Summary: "unsupported: order"} }, code: 3, out: []string{"Kernel: unsupported: order."}, err: "pods stay plain"},
		{name: "load fails", args: "load --run-dir RUN", prepare: func(f *fake) { f.fail = datapath.ErrNoBPFFS }, code: 1, err: "not a BPF file system"},
		{name: "unload", args: "unload --run-dir RUN", prepare: loaded, out: []string{"Enrolled sockets left: 2."}},
		{name: "unload, all closed", args: "unload --run-dir RUN", prepare: func(f *fake) { loaded(f); f.sockets = 0 }, out: []string{"The datapath is unloaded."}},
		{name: "unload, nothing loaded", args: "unload --run-dir RUN --bpffs /mnt/bpf", prepare: func(f *fake) { f.sockets = 0 }, out: []string{"Nothing was loaded at /mnt/bpf."}},
		{name: "unload, no bpffs", args: "unload --run-dir RUN --bpffs /mnt/bpf", prepare: func(f *fake) { f.noBPFFS = true }, code: 1, err: "nothing was loaded at /mnt/bpf: /mnt/bpf: not a BPF file system"},
		{name: "unload in use", args: "unload --run-dir RUN", prepare: loaded, pod: true, code: 3, err: "--force"},
		{name: "unload by force", args: "unload --run-dir RUN --force", prepare: loaded, pod: true, out: []string{"1 pod detached."}},
		{name: "off", args: "off --run-dir RUN", prepare: loaded, out: []string{"switched off for this node", "Enrolled sockets left: 4."}},
		{name: "off, not loaded", args: "off --run-dir RUN", code: 1, err: "not loaded"},
		{name: "on", args: "on --run-dir RUN", prepare: loaded, out: []string{"switched on for this node"}},
		{name: "off pod", args: "off --run-dir RUN --pod ns/web", prepare: loaded, pod: true, out: []string{"switched off for pod ns/web", "Enrolled sockets left: 1."}},
		{name: "off unknown pod", args: "off --run-dir RUN --pod ns/db", prepare: loaded, pod: true, code: 1, err: "no attachment of this pod is recorded on this node: ns/db"},
		{name: "off malformed pod", args: "off --run-dir RUN --pod web", prepare: loaded, code: 2, err: `--pod "web" is not NAMESPACE/NAME`},
		{name: "off half done", args: "off --run-dir RUN", prepare: func(f *fake) { loaded(f); f.fail = errors.New("EIO") }, code: 1, err: "EIO"},
		{name: "off help", args: "off --help", out: []string{"every set of skipstack's programs in the kernel", "mount namespaces", "kind", "pins are gone", "below --bpffs"}},
		{name: "on help", args: "on --help", out: []string{"published below --bpffs", "kind"}},
		{name: "doctor help", args: "doctor --help", out: []string{"0 safe; 4 risky; 3 unsupported", "--cni-conf-dir", "--no-cache", "--config CONFLIST"}},
		{name: "doctor, argument", args: "doctor x", code: 2, err: "x"},
		{name: "doctor, no such config", args: "doctor --config /no/such/file", code: 2, err: "no such file"},
		{name: "status, nothing loaded", args: "status --run-dir RUN", out: []string{"not to be seen: the datapath is not loaded", "unknown: the kernel has not been probed yet\n", "No pods are known."}},
		{name: "status", args: "status --run-dir RUN", prepare: loaded, pod: true, out: []string{"socks 2 of 8", "Node:       closed:",
			"2 connections accelerated now; 1.5 kB redirected in 2 messages, 500 B passed in 1 message (75.0 % bypassed)", "Passed:     not_read 1\n", "Handshakes: enrolled 1\n",
			"POD     STATE     CONNECTIONS  REDIRECTED  PASSED  BYPASSED  PLAIN BECAUSE\nns/web  attached  1            1.5 kB      500 B   75.0 %    the kernel has not been probed"}},
		{name: "status, guarded", args: "status --run-dir RUN", prepare: func(f *fake) { loaded(f); f.node.Guard = datapath.GuardLSM }, out: []string{"Splices:    3 refused\n", "kTLS:       1 attempt refused\n"}},
		{name: "status, empty cache directory", args: "status --cni-cache-dir=", code: 2, err: "--cni-cache-dir has no value"},
		{name: "connections", args: "connections --run-dir RUN", prepare: loaded, pod: true, out: []string{
			"1m30s  client  ns/web    10.0.0.2:40000  10.96.0.1:80    1.5 kB      0 B     0 B     redirected\n" +
				"       server  cgroup 9  10.0.0.3:8080   10.0.0.2:40000  1.5 kB      0 B     12 B    redirected\n" +
				"1m30s  client  closed, or not recognised\n"}},
		{name: "connections of a port", args: "connections --run-dir RUN --port 81", prepare: loaded, out: []string{"No connections."}},
		{name: "connections, not loaded", args: "connections --run-dir RUN", out: []string{"No connections: the datapath is not loaded.\n"}},
		{name: "connections, not loaded, JSON", args: "connections --run-dir RUN --json", out: []string{"[]\n"}},
		{name: "connections, bad port", args: "connections --port 0", code: 2, err: "--port 0"},
		{name: "connections, large port", args: "connections --port 65536", code: 2, err: "65536"},
		{name: "connections, bad pod", args: "connections --pod web", code: 2, err: "NAMESPACE/NAME"},
		{name: "connections, bad interval", args: "connections --watch --interval 1ms", code: 2, err: "shorter than"},
		{name: "agent, bad log level", args: "agent --log-level loud", code: 2, err: "--log-level"},
		{name: "agent, bad log format", args: "agent --log-format xml", code: 2, err: "neither json nor text"},
		{name: "agent, bad mode", args: "agent --mode fast", code: 2, err: "mode"},
		{name: "agent, bad address", args: "agent --no-install --listen nowhere", code: 2, err: "--listen"},
		{name: "agent, another host's address", args: "agent --no-install --listen 192.0.2.1:9497", code: 1, err: "serve metrics"},
		{name: "agent, mount only", args: "agent --mount-only --bpffs /mnt/bpf", err: "a BPF file system is mounted"},
		{name: "agent, mount fails", args: "agent --mount-only", prepare: func(f *fake) { f.fail = datapath.ErrNoBPFFS }, code: 1, err: "not a BPF file system"},
		{name: "version", args: "version", out: []string{"skipstack ", "CNI specification 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"}},
		{name: "version flag", args: "--version", out: []string{"skipstack version "}},
		{name: "version, argument", args: "version x", code: 2, err: "x"},
		{name: "probe", args: `probe --entry {"runDir":"RUN"}`, prepare: loaded, err: `verdict="risky: splice"`},
		{name: "probe, bad entry", args: `probe --entry {"x":1}`, code: 2, err: `unknown key "x"`},
		{name: "probe, bad descriptor", args: `probe --lock-fd 999`, code: 2, err: "--lock-fd 999"},
		{name: "config missing", args: "load --config /no/such/file", code: 2, err: "no such file"},
		{name: "other command", args: "custom", code: 42, err: "custom"},
		{name: "silent command", args: "silent", code: 42},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, runDir := newFake(t)
			if tc.prepare != nil {
				tc.prepare(f)
			}
			if tc.pod {
				record(t, runDir)
			}
			code, out, errs := exec(f, strings.Fields(strings.ReplaceAll(tc.args, "RUN", runDir))...)
			if code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			for _, want := range tc.out {
				if !strings.Contains(out, want) {
					t.Errorf("stdout does not say %q:\n%s", want, out)
				}
			}
			if len(tc.out) == 0 && out != "" {
				t.Errorf("stdout: %s", out)
			}
			if tc.err == "" && errs != "" || !strings.Contains(errs, tc.err) {
				t.Errorf("stderr: %s", errs)
			}
			if strings.Contains(errs, "Usage:") {
				t.Errorf("stderr repeats the usage: %s", errs)
			}
		})
	}
}

// An empty value is not the default: a script's variable was not set.
func TestEmptyFlags(t *testing.T) {
	for _, args := range [][]string{
		{"off", "--pod", ""}, {"off", "--pod="}, {"on", "--pod="}, {"off", "--pod", "/"}, {"off", "--pod", "ns/"}, {"off", "--pod", "/web"},
		{"off", "--pod", "ns/web/x"}, {"off", "--bpffs="}, {"on", "--bpffs="}, {"load", "--bpffs="}, {"unload", "--bpffs="},
		{"doctor", "--config="}, {"doctor", "--cni-conf-dir="}, {"doctor", "--cni-bin-dir="}, {"doctor", "--bpffs="},
		{"load", "--config="}, {"load", "--run-dir="}, {"load", "--cgroup-root="}, {"load", "--bpffs=/"}, {"load", "--run-dir=/."}, {"load", "--cgroup-root=//"},
	} {
		f, runDir := newFake(t)
		f.loaded = true
		record(t, runDir)
		if !strings.HasPrefix(args[1], "--run-dir") {
			args = append(args, "--run-dir", runDir)
		}
		code, out, errs := exec(f, args...)
		if flag, _, _ := strings.Cut(args[1], "="); code != 2 || out != "" || !strings.Contains(errs, flag) || !strings.Contains(errs, "nothing was changed") {
			t.Errorf("%q: code %d, %s%s", args, code, out, errs)
		}
		if !f.loaded || f.node.SwitchedOff || f.pods[7].SwitchedOff || f.probed != 0 || f.bpffs != "" {
			t.Errorf("%q: changed something: %+v", args, f)
		}
	}
}

// What is not a regular file of sensible size is refused at once.
func TestConfigFile(t *testing.T) {
	dir := t.TempDir()
	fifo, large := filepath.Join(dir, "fifo"), filepath.Join(dir, "large")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(large, bytes.Repeat([]byte(" "), plugin.MaxConflist+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, why := range map[string]string{fifo: "not a regular file", dir: "not a regular file", "/dev/zero": "not a regular file", large: "larger than 2097152 bytes"} {
		f, runDir := newFake(t)
		if code, out, errs := exec(f, "load", "--run-dir", runDir, "--config", path); code != 2 || out != "" || !strings.Contains(errs, why) || f.loaded {
			t.Errorf("%s: code %d, %s%s", path, code, out, errs)
		}
	}
}

func TestJSON(t *testing.T) {
	for args, want := range map[string]string{
		"load --run-dir RUN --json":             `{"was":"nothing","maxConnections":262144,"open":true,"switchedOff":false,"accelerates":false,"plain":"the kernel has risks that are not accepted: splice (key acceptRisks, or annotation skipstack/mode)","verdict":{"risks":["splice"],"verdict":"risky"}}`,
		"unload --run-dir RUN --force --json":   `{"wasLoaded":true,"detached":0,"sockets":2}`,
		"off --run-dir RUN --json":              `{"switchedOff":true,"sockets":4}`,
		"on --run-dir RUN --json":               `{"switchedOff":false,"sockets":4}`,
		"off --run-dir RUN --pod ns/web --json": `{"switchedOff":true,"sockets":1}`,
	} {
		f, runDir := newFake(t)
		if !strings.HasPrefix(args, "load") {
			f.loaded = true
		}
		if strings.Contains(args, "--pod") {
			record(t, runDir)
		}
		code, out, errs := exec(f, strings.Fields(strings.ReplaceAll(args, "RUN", runDir))...)
		var compact bytes.Buffer
		if err := json.Compact(&compact, []byte(out)); err != nil || code != 0 || errs != "" {
			t.Errorf("%s: code %d, %v, stderr %s", args, code, err, errs)
		}
		if got := strings.TrimSpace(compact.String()); got != want {
			t.Errorf("%s:\ngot  %s\nwant %s", args, got, want)
		}
	}

	code, out, _ := exec(&fake{}, "version", "--json")
	var v struct {
		Version string   `json:"version"`
		CNI     []string `json:"cniVersions"`
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil || code != 0 || v.Version == "" || len(v.CNI) != 5 {
		t.Errorf("code %d, error %v: %s", code, err, out)
	}
}

// The conflist says where skipstack is; flags win over it.
func TestConfigFlag(t *testing.T) {
	f, runDir := newFake(t)
	file := filepath.Join(t.TempDir(), "10.conflist")
	write := func(entry string) {
		t.Helper()
		if err := os.WriteFile(file, fmt.Appendf(nil, `{"name":"n","plugins":[{"type":"ptp"},%s]}`, entry), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(fmt.Sprintf(`{"type":"skipstack","bpffs":"/mnt/bpf","runDir":%q,"maxConnections":99}`, runDir))
	if code, _, errs := exec(f, "load", "--config", file); code != 0 || f.bpffs != "/mnt/bpf" || f.max != 99 {
		t.Errorf("code %d, bpffs %s, size %d: %s", code, f.bpffs, f.max, errs)
	}
	for members, want := range map[string]string{
		`"mode":"off"`:             "Pods of this configuration stay plain: mode is off.\n",
		`"mode":"on"`:              "Pods of this configuration are accelerated unless they opt out.\n",
		`"acceptRisks":["splice"]`: "Pods of this configuration are accelerated unless they opt out or have a bandwidth limit.\n",
		`"acceptRisks":["epoll"]`:  "Pods of this configuration stay plain: the kernel has risks that are not accepted: splice (",
	} {
		write(fmt.Sprintf(`{"type":"skipstack","runDir":%q,%s}`, runDir, members))
		if code, out, errs := exec(f, "load", "--config", file); code != 0 || !strings.Contains(out, want) {
			t.Errorf("%s: code %d, %s%s", members, code, out, errs)
		}
	}
	write(fmt.Sprintf(`{"type":"skipstack","runDir":%q}`, runDir))
	if code, _, errs := exec(f, "load", "--config", file, "--bpffs", "/mnt/other"); code != 0 || f.bpffs != "/mnt/other" {
		t.Errorf("code %d, bpffs %s: %s", code, f.bpffs, errs)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if code, _, errs := exec(f, "load", "--config", file, "--bpffs", "x/../y"); code != 0 || f.bpffs != filepath.Join(here, "y") {
		t.Errorf("code %d, bpffs %s: %s", code, f.bpffs, errs)
	}
	// The one that is found is taken as strictly as one that is named.
	write(`{"type":"skipstack","x":1}`)
	if code, out, errs := exec(f, "doctor", "--cni-conf-dir", filepath.Dir(file)); code != 2 || out != "" || !strings.Contains(errs, `unknown key "x"`) || !strings.Contains(errs, file) {
		t.Errorf("doctor: code %d, %s%s", code, out, errs)
	}
	for _, entry := range []string{`{"type":"skipstack","x":1}`, `{"type":"bridge"}`, `{`} {
		write(entry)
		f.probed = 0
		if code, out, errs := exec(f, "load", "--config", file); code != 2 || out != "" || !strings.Contains(errs, file) || f.probed != 0 {
			t.Errorf("%s: code %d, %s%s", entry, code, out, errs)
		}
	}
}

// Two command lines at once share nothing.
func TestNoSharedState(t *testing.T) {
	one, two := &fake{loaded: true}, &fake{loaded: true}
	exec(one, "off", "--bpffs", "/a", "--json")
	exec(two, "off")
	if one.bpffs != "/a" || two.bpffs != plugin.DefaultBPFFS {
		t.Errorf("bpffs %s and %s", one.bpffs, two.bpffs)
	}
}

func TestExplain(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("x: %w", attachment.ErrBusy), "try again"},
		{fmt.Errorf("x: %w", datapath.ErrBusy), "try again"},
		{fmt.Errorf("x: %w", datapath.ErrInUse), "--force"},
		{fmt.Errorf("x: %w", datapath.ErrNotLoaded), "skipstack load"},
		{fmt.Errorf("x: %w", datapath.ErrUnsupported), "skipstack doctor"},
	} {
		if got := explain(tc.err); !errors.Is(got, tc.err) || !strings.Contains(got.Error(), tc.want) {
			t.Errorf("%v: %v", tc.err, got)
		}
	}
	if got := explain(os.ErrPermission); (os.Geteuid() != 0) != strings.Contains(got.Error(), "as root") {
		t.Errorf("permission: %v", got)
	}
}

// --watch goes on until it is interrupted, which is its proper end. As JSON, each
// look is a line.
func TestWatch(t *testing.T) {
	f, runDir := newFake(t)
	f.loaded = true
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	done := make(chan int, 1)
	go func() {
		deps := plugin.Deps{Datapath: f, Cgroups: cgroups{}, Verdicts: verdicts{f}}
		args := []string{"connections", "--watch", "--json", "--interval", "200ms", "--run-dir", runDir}
		done <- Run(ctx, args, Streams{Out: w, Err: w}, deps)
		w.Close()
	}()
	lines := bufio.NewScanner(r)
	for range 3 {
		var list []plugin.ConnectionReport
		if !lines.Scan() || json.Unmarshal(lines.Bytes(), &list) != nil || len(list) != 2 {
			t.Fatalf("a look: %q", lines.Text())
		}
	}
	cancel()
	for lines.Scan() {
	}
	if code := <-done; code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 999: "999 B", 1000: "1 kB", 1500: "1.5 kB", 999_400: "999 kB", 999_600: "1 MB", 12_345_678: "12.3 MB", 1 << 63: "9.22 EB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

// The gate in one line: who gets through, and what guards them.
func TestGate(t *testing.T) {
	for want, l := range map[string]plugin.LoadedReport{
		"closed: the kernel has not been probed, or is not supported":                                                             {SameBuild: true},
		"closed: the kernel has not been probed, or is not supported, or this build's programs could not replace the loaded ones": {},
		"switched off (`skipstack on` switches it on)":                                                                            {Open: true, SwitchedOff: true},
		"open": {Open: true},
		"open, to pods that accept splice, epoll": {Open: true, Risks: []string{"splice", "epoll"}},
		"open, splice(2) guarded by lsm":          {Open: true, Guard: datapath.GuardLSM},
		"open, to pods that accept fionread, splice(2) guarded by fmod_ret": {
			Open: true, Risks: []string{"fionread"}, Guard: datapath.GuardFmodRet,
		},
	} {
		if got := gate(&l); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
