package cni_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containernetworking/cni/libcni"
	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// agent is a running agent.
type agent struct {
	s    *site
	cmd  *exec.Cmd
	addr string
	log  lockedBuffer
	end  chan error
}

// agent starts an agent on the node, and has it end with the test.
func (s *site) agent(args ...string) *agent {
	s.t.Helper()
	return s.agentBy(nil, args...)
}

// agentBy has another program start it.
func (s *site) agentBy(starter []string, args ...string) *agent {
	s.t.Helper()
	a := &agent{s: s, end: make(chan error, 1)}
	must.Do(s.t, s.Do(func() error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		a.addr = l.Addr().String()
		return l.Close()
	}))
	command := append(append(starter, program()), append([]string{
		"agent", "--listen", a.addr, "--cni-conf-dir", s.ConfDir, "--cni-bin-dir", s.BinDir, "--cni-cache-dir", s.CacheDir,
		"--bpffs", s.BPFFS, "--run-dir", s.RunDir, "--cgroup-root", s.CgroupRoot, "--pod-metrics", "10",
	}, args...)...)
	a.cmd = exec.Command(command[0], command[1:]...)
	a.cmd.Stderr = &a.log
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	must.Do(s.t, s.Do(a.cmd.Start))
	go func() { a.end <- a.cmd.Wait() }()
	s.t.Cleanup(func() { a.stop(unix.SIGKILL) })
	return a
}

// stop sends the signal and waits for the end.
func (a *agent) stop(signal os.Signal) error {
	if a.cmd == nil {
		return nil
	}
	_ = a.cmd.Process.Signal(signal)
	defer func() { a.cmd = nil }()
	select {
	case err := <-a.end:
		return err
	case <-time.After(patience):
		_ = a.cmd.Process.Kill()
		return fmt.Errorf("it does not end; its log: %s", a.log.take())
	}
}

func (a *agent) get(path string) (code int, body string) {
	err := a.s.Do(func() error {
		conn, err := net.Dial("tcp", a.addr)
		if err != nil {
			return err
		}
		client := http.Client{Timeout: patience, Transport: &http.Transport{
			DisableKeepAlives: true,
			Dial:              func(string, string) (net.Conn, error) { return conn, nil },
		}}
		r, err := client.Get("http://agent" + path)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		raw, err := io.ReadAll(r.Body)
		code, body = r.StatusCode, string(raw)
		return err
	})
	if err != nil {
		return 0, err.Error()
	}
	return code, body
}

func (a *agent) waitReady() {
	a.s.t.Helper()
	wait(a.s.t, "the agent is ready", func() (string, bool) {
		code, body := a.get("/readyz")
		return body, code == 200
	})
}

// metric is the value of one series.
func (a *agent) metric(series string) float64 {
	a.s.t.Helper()
	_, body := a.get("/metrics")
	for line := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return must.Get(strconv.ParseFloat(strings.TrimSpace(value), 64))(a.s.t)
		}
	}
	a.s.t.Fatalf("no metric %s in %s", series, body)
	return 0
}

// The agent makes a node out of one that has a primary plugin only; what it exports
// agrees with status and with the bytes that were sent; killing it, in the middle of
// traffic, changes nothing for pods old and new.
func TestAgent(t *testing.T) {
	node.Need(t)
	s := newSite(t, options{})
	primary := must.Get(node.WithoutSkipstack(s.network(node.Network{})))(t)
	file := filepath.Join(s.ConfDir, "10-primary.conflist")
	must.Do(t, os.WriteFile(file, primary.Bytes, 0o644))
	a := s.agent("--accept-risks", "splice,fionread,epoll,uncharged")
	a.waitReady()
	list := must.Get(libcni.NetworkConfFromFile(file))(t)
	if len(list.Plugins) != len(primary.Plugins)+1 {
		t.Fatalf("the conflist after install: %s", must.Get(os.ReadFile(file))(t))
	}
	must.Get(os.Stat(filepath.Join(s.BinDir, plugin.Type)))(t)

	client, server := s.twoPods(list, node.PodOptions{})
	one, two := s.connect(direct(client, server))
	send(t, one, two, 50_000)
	send(t, two, one, 20_000)
	r := s.status()
	for series, want := range map[string]uint64{
		"skipstack_redirected_bytes_total":    r.Totals.Redirected().Bytes,
		"skipstack_redirected_messages_total": r.Totals.Redirected().Messages,
		"skipstack_connections":               1,
		"skipstack_conflist_present":          1,
		"skipstack_datapath_current":          1,
		`skipstack_pods{state="attached"}`:    2,
		fmt.Sprintf("skipstack_pod_redirected_bytes_total{namespace=%q,pod=%q}", client.Namespace, client.Name): podOf(t, r, title(client)).Redirected.Bytes,
		fmt.Sprintf("skipstack_pod_passed_bytes_total{namespace=%q,pod=%q}", client.Namespace, client.Name):     podOf(t, r, title(client)).Passed.Bytes,
	} {
		wait(t, fmt.Sprintf("%s is %d", series, want), func() (string, bool) { // it looks once a second at most
			got := a.metric(series)
			return fmt.Sprint(got), got == float64(want)
		})
	}
	if got := podOf(t, r, title(client)); got.Redirected.Bytes+got.Passed.Bytes != 50_000 {
		t.Errorf("%+v", got)
	}

	unlimited(t, one, two)
	load := traffic.StartLoad([][2]*traffic.Conn{{one, two}}, traffic.Plan{MaxWrite: 4096})
	moving := func() {
		t.Helper()
		before := load.Received()[0]
		wait(t, "bytes arrive", func() (string, bool) {
			now := load.Received()[0]
			return fmt.Sprint(before, now, load.Err()), now > before+1<<20
		})
	}
	moving()
	if err := a.stop(unix.SIGKILL); err == nil {
		t.Error("it was not killed")
	}
	moving()
	s.wantAccelerated("new connections without an agent", direct(client, server))
	another := s.pod("another", list, node.PodOptions{})
	s.wantAccelerated("a new pod without an agent", direct(another, server))
	a = s.agent("--accept-risks", "splice,fionread,epoll,uncharged")
	a.waitReady()
	moving()
	if err := a.stop(unix.SIGTERM); err != nil {
		t.Errorf("told to end: %v; %s", err, a.log.take())
	}
	moving()
	extend(t, one, two)
	must.Do(t, load.Stop())
	if raw := must.Get(os.ReadFile(file))(t); !strings.Contains(string(raw), plugin.Type) {
		t.Errorf("the entry went with the agent: %s", raw)
	}
}

// The capabilities that the manifest lists are enough, on a node that has not been
// probed and where nothing is loaded.
func TestAgentCapabilities(t *testing.T) {
	node.Need(t)
	raw := must.Get(os.ReadFile("../../conf/kubernetes/skipstack.yaml"))(t)
	var d appsv1.DaemonSet
	must.Do(t, yaml.UnmarshalStrict(raw, &d))
	set := "-all"
	for _, c := range d.Spec.Template.Spec.Containers[0].SecurityContext.Capabilities.Add {
		set += ",+" + strings.ToLower(string(c))
	}
	setpriv, err := exec.LookPath("setpriv") // util-linux
	must.Do(t, err)
	v := theVerdict(t)
	s := newSite(t, options{unprobed: true})
	must.Do(t, os.WriteFile(filepath.Join(s.ConfDir, "10-primary.conflist"), must.Get(node.WithoutSkipstack(s.network(node.Network{})))(t).Bytes, 0o644))
	a := s.agentBy([]string{setpriv, "--bounding-set", set, "--inh-caps", set, "--"})
	a.waitReady()
	wait(t, "the gate is open", func() (string, bool) { // it looks once a second at most
		got := a.metric("skipstack_datapath_open")
		return fmt.Sprint(got, s.unclear()), got == 1
	})
	for _, risk := range []string{"splice", "fionread", "epoll", "uncharged"} {
		if got := a.metric(fmt.Sprintf("skipstack_kernel_risk{risk=%q}", risk)); (got == 1) != slices.Contains(v.Risks, risk) {
			t.Errorf("risk %s is %v; with all capabilities the risks are %v", risk, got, v.Risks)
		}
	}
	if err := a.stop(unix.SIGTERM); err != nil {
		t.Error(err)
	}
}
