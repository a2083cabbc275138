package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skipstack/skipstack/cmd/internal/conflist"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// fake is a node that fails as often as it is told.
type fake struct {
	mu        sync.Mutex
	failLoad  bool
	failSweep int
	failed    int // loads
	loads     int
	sweeps    int
	report    plugin.Report
	unloaded  bool // by somebody else
	probes    int
	failProbe bool
}

func (f *fake) Probe(_ context.Context, _ plugin.Config, load bool, held *os.File) (plugin.Verdict, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.probes++
	if f.failProbe || load || held != nil {
		return plugin.Verdict{}, errors.New("ENOSPC")
	}
	f.report.Due = false
	return plugin.Verdict{Supported: true, Summary: "safe by now"}, nil
}

func (f *fake) Load(context.Context, plugin.Config) (plugin.Loaded, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.loads++
	if f.failLoad {
		f.failed++
		return plugin.Loaded{}, errors.New("EPERM")
	}
	return plugin.Loaded{Was: "nothing", Verdict: plugin.Verdict{Supported: true, Summary: "safe"}}, nil
}

func (f *fake) Sweep(context.Context, plugin.Config) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sweeps++
	if f.failSweep > 0 {
		f.failSweep--
		return errors.New("EIO")
	}
	return nil
}

func (f *fake) Status(plugin.Config, string) plugin.Report {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.report
}

func (f *fake) Loaded(plugin.Config) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.unloaded {
		return datapath.ErrNotLoaded
	}
	return nil
}

func (f *fake) setFailLoad(fail bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failLoad = fail
}

func (f *fake) setUnloaded(unloaded bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unloaded = unloaded
}

type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// started runs an agent until the test ends, and returns where it listens.
func started(t *testing.T, f *fake, o Options) (url string, logs *syncBuffer) {
	t.Helper()
	o.Listen = "127.0.0.1:0"
	logs = &syncBuffer{}
	o.Node, o.Log = f, slog.New(slog.NewTextHandler(logs, nil))
	o.Interval = 5 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, o) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Second):
			t.Error("the agent does not end")
		}
	})
	var address []string
	await(t, "it listens", func() (string, bool) {
		address = regexp.MustCompile(`msg=serving address=(\S+)`).FindStringSubmatch(logs.String())
		return logs.String(), address != nil
	})
	return "http://" + address[1], logs
}

func get(url string) (code int, body string) {
	r, err := (&http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get(url)
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	raw, _ := io.ReadAll(r.Body)
	return r.StatusCode, string(raw)
}

func await(t *testing.T, what string, condition func() (state string, ok bool)) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		state, ok := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s: %s", what, state)
		}
	}
}

// What fails is tried again and shown meanwhile; the agent itself is healthy.
func TestTriesAgain(t *testing.T) {
	f := &fake{failLoad: true, failSweep: 2, report: plugin.Report{Elsewhere: []string{"another mount namespace"}}}
	url, logs := started(t, f, Options{Version: "v1"})
	await(t, "it says that it is not ready", func() (string, bool) {
		code, body := get(url + "/readyz")
		return body, code == 503 && strings.Contains(body, "EPERM")
	})
	if code, body := get(url + "/healthz"); code != 200 {
		t.Errorf("healthz: %d %s", code, body)
	}
	f.setFailLoad(false)
	await(t, "it is ready", func() (string, bool) {
		code, body := get(url + "/readyz")
		var all []condition
		return body, code == 200 && json.Unmarshal([]byte(body), &all) == nil && len(all) == 2 && all[0].Detail == "safe"
	})
	code, body := get(url + "/metrics")
	for _, want := range []string{`skipstack_build_info{build="",version="v1"} 1`, "skipstack_datapath_loaded 0", "go_goroutines", "process_open_fds"} {
		if code != 200 || !strings.Contains(body, want) {
			t.Errorf("metrics: %d, no %q in %s", code, want, body)
		}
	}
	if code, _ := get(url + "/other"); code != 404 {
		t.Errorf("another path: %d", code)
	}
	await(t, "it has swept some more", func() (string, bool) {
		f.mu.Lock()
		defer f.mu.Unlock()
		return fmt.Sprint(f.sweeps), f.sweeps > 10
	})
	if n := strings.Count(logs.String(), "another mount namespace"); n != 1 {
		t.Errorf("the same problem was logged %d times:\n%s", n, logs)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed < 1 || f.loads != f.failed+1 {
		t.Errorf("loaded %d times, %d of them in vain, want one success", f.loads, f.failed)
	}
}

// An agent whose datapath somebody has unloaded is not ready until it is loaded again,
// which it leaves to the next pod.
func TestUnloaded(t *testing.T) {
	f := &fake{}
	url, _ := started(t, f, Options{})
	is := func(want int, detail string) func() (string, bool) {
		return func() (string, bool) {
			code, body := get(url + "/readyz")
			return body, code == want && strings.Contains(body, detail)
		}
	}
	await(t, "it is ready", is(200, "safe"))
	f.setUnloaded(true)
	await(t, "it says that the datapath is gone", is(503, datapath.ErrNotLoaded.Error()))
	f.setUnloaded(false)
	await(t, "it is ready again", is(200, "safe"))
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.loads != 1 {
		t.Errorf("loaded %d times", f.loads)
	}
}

// The entry comes into the conflist, comes back when somebody takes it out, and
// stays when the agent ends.
func TestKeepsTheEntry(t *testing.T) {
	dir := t.TempDir()
	confDir, binDir := filepath.Join(dir, "net.d"), filepath.Join(dir, "bin")
	for _, d := range []string{confDir, binDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(confDir, "10.conflist")
	primary := []byte(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}]}`)
	write := func() {
		t.Helper()
		if err := os.WriteFile(file, primary, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	present := func() (string, bool) {
		raw, err := os.ReadFile(file)
		return fmt.Sprint(string(raw), err), conflist.Has(raw)
	}
	binary := filepath.Join(dir, "skipstack")
	if err := os.WriteFile(binary, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Run("agent", func(t *testing.T) {
		url, _ := started(t, &fake{}, Options{Keep: &conflist.Options{ConfDir: confDir, BinDir: binDir, CacheDir: dir, Binary: binary}})
		await(t, "it says that there is no network", func() (string, bool) {
			code, body := get(url + "/readyz")
			return body, code == 503 && strings.Contains(body, "no network configuration")
		})
		for range 3 {
			write()
			await(t, "the entry is there", present)
		}
		await(t, "it is ready", func() (string, bool) {
			code, body := get(url + "/readyz")
			return body, code == 200
		})
		await(t, "the metrics show it", func() (string, bool) {
			_, body := get(url + "/metrics")
			return body, strings.Contains(body, "skipstack_conflist_present 1")
		})
	})
	if state, ok := present(); !ok {
		t.Error("the entry went with the agent:", state)
	}
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = Run(t.Context(), Options{Node: &fake{}, Listen: l.Addr().String(), Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("%v", err)
	}
}

func TestStuck(t *testing.T) {
	a := &agent{Options: Options{Interval: time.Second}}
	a.beat()
	if a.stuck() != 0 {
		t.Error("stuck at once")
	}
	a.beaten = time.Now().Add(-time.Hour)
	if a.stuck() < time.Hour {
		t.Error("not stuck after an hour")
	}
}

func TestHiddenMounts(t *testing.T) {
	file := filepath.Join(t.TempDir(), "mountinfo")
	for _, tc := range []struct{ name, mounts, want string }{
		{"host, shared", "1 0 0:1 / / rw shared:1 - ext4 /dev/sda rw\n2 1 0:2 / /sys rw shared:2 - sysfs sysfs rw\n", ""},
		{"host, mounted already", "1 0 0:1 / / rw shared:1 - ext4 x rw\n2 1 0:3 / /sys/fs/bpf rw - bpf bpf rw\n", ""},
		{"container, private", "1 0 0:1 / / rw - overlay overlay rw\n2 1 0:2 / /sys ro,nosuid - sysfs sysfs ro\n", "/sys is private"},
		{"container, bidirectional", "1 0 0:1 / / rw - overlay overlay rw\n2 1 0:2 / /sys/fs/bpf rw shared:7 master:2 - sysfs sysfs rw\n", ""},
		{"container, host to container", "1 0 0:1 / / rw - overlay overlay rw\n2 1 0:2 / /sys/fs/bpf rw master:2 - sysfs sysfs rw\n", "is private"},
		{"rubbish", "x\n\n1 2 3\n", ""},
	} {
		if err := os.WriteFile(file, []byte(tc.mounts), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := hiddenMounts(file, "/sys/fs/bpf"); tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
	if got := hiddenMounts("/no/such/file", "/sys/fs/bpf"); got != "" {
		t.Errorf("%q", got)
	}
}

// What a probe could not tell is asked again without a pod's ADD, but nothing is
// loaded, and nothing done to another build's programs.
func TestLooksAgain(t *testing.T) {
	loaded := &plugin.LoadedReport{SameBuild: true}
	f := &fake{report: plugin.Report{Due: true, Loaded: loaded}, failProbe: true}
	url, logs := started(t, f, Options{})
	wait := func(what string) {
		t.Helper()
		await(t, what, func() (string, bool) { return logs.String(), strings.Contains(logs.String(), what) })
	}
	wait("probe again: ENOSPC")
	f.mu.Lock()
	f.failProbe = false
	f.mu.Unlock()
	wait("the kernel was probed again")
	if _, body := get(url + "/readyz"); !strings.Contains(body, "safe by now") {
		t.Errorf("not ready by the new verdict: %s", body)
	}
	for _, r := range []plugin.Report{{Loaded: loaded}, {Due: true}, {Due: true, Loaded: &plugin.LoadedReport{}}} {
		f.mu.Lock()
		f.report = r
		probes, sweeps := f.probes, f.sweeps
		f.mu.Unlock()
		await(t, "two more looks", func() (string, bool) {
			f.mu.Lock()
			defer f.mu.Unlock()
			return fmt.Sprint(f.sweeps), f.sweeps > sweeps+2
		})
		f.mu.Lock()
		if f.probes != probes {
			t.Errorf("probed again: %+v", r)
		}
		f.mu.Unlock()
	}
}
