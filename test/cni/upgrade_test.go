package cni_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// anotherBuild makes a skipstack whose BPF objects are another build's: a byte of
// their ELF headers that has no meaning is another.
func anotherBuild(t *testing.T, path string) {
	t.Helper()
	const (
		padding = 15  // the last byte of e_ident
		machine = 18  // e_machine
		bpf     = 247 // EM_BPF
	)
	program := must.Get(os.ReadFile(program()))(t)
	magic := []byte("\x7fELF\x02\x01\x01")
	objects := 0
	for at := 1; ; {
		i := bytes.Index(program[at:], magic)
		if i < 0 || at+i+machine+2 > len(program) {
			break
		}
		at += i
		if binary.LittleEndian.Uint16(program[at+machine:]) == bpf {
			program[at+padding] = 1
			objects++
		}
		at += len(magic)
	}
	if objects == 0 {
		t.Fatal("no BPF object in the program")
	}
	must.Do(t, os.WriteFile(path, program, 0o755))
}

// place puts a build where the runtime looks for the plugin, as install does.
func (s *site) place(build string) {
	s.t.Helper()
	tmp := filepath.Join(s.BinDir, ".new")
	must.Do(s.t, os.WriteFile(tmp, must.Get(os.ReadFile(build))(s.t), 0o755))
	must.Do(s.t, os.Rename(tmp, filepath.Join(s.BinDir, plugin.Type)))
}

// with runs a command of that build.
func (s *site) with(build string, args ...string) outcome {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	cmd := exec.CommandContext(ctx, build, append(args, "--bpffs", s.BPFFS, "--run-dir", s.RunDir, "--cgroup-root", s.CgroupRoot)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	return s.exec(cmd)
}

// redirected is how many messages the pod's connections have redirected, by the
// client's address.
func (s *site) redirected(pod string) map[string]uint64 {
	s.t.Helper()
	by := map[string]uint64{}
	for _, c := range s.connections("--pod", pod) {
		if c.Client != nil && c.Server != nil {
			by[c.Client.Local] = c.Client.Redirected.Messages + c.Server.Redirected.Messages
		}
	}
	return by
}

// Two builds take turns, upgrade and downgrade, on a node whose connections carry
// traffic and whose pods come and go. No connection breaks or loses a byte, every ADD
// attaches its pod, and whatever is new is accelerated.
func TestUpgradeUnderTraffic(t *testing.T) {
	node.Need(t)
	s := newSite(t, options{})
	builds := [2]string{program(), filepath.Join(t.TempDir(), "another")}
	anotherBuild(t, builds[1])
	list := s.network(node.Network{})
	// An ADD that could not attach its pod fails.
	strict := s.network(node.Network{Skipstack: withAccepting("onError", "fail")})
	s.place(builds[0])
	client, server := s.twoPods(list, node.PodOptions{})
	var pairs [][2]*traffic.Conn
	for range 3 {
		one, two := s.connect(direct(client, server))
		unlimited(t, one, two)
		pairs = append(pairs, [2]*traffic.Conn{one, two})
	}
	// Small messages, so that the machine is left some time for the rest.
	load := traffic.StartLoad(pairs, traffic.Plan{MaxWrite: 2048})
	moving := func() {
		t.Helper()
		before := load.Received()
		wait(t, "bytes arrive on every connection", func() (string, bool) {
			now := load.Received()
			for i := range now {
				if now[i] < before[i]+64<<10 {
					return fmt.Sprint(before, now, load.Err()), false
				}
			}
			return "", true
		})
	}

	// Pods come and go all the time.
	stop, ended := make(chan struct{}), make(chan error, 1)
	var churned atomic.Int32
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
			p, err := s.AddPod(context.Background(), fmt.Sprintf("churn-%d", i), strict, node.PodOptions{})
			if err == nil {
				err = p.Close(context.Background())
			}
			var coded *types.Error
			if errors.As(err, &coded) && late(coded.Details) {
				continue // the machine is busy with other things
			}
			if err != nil {
				ended <- fmt.Errorf("pod %d: %w", i, err)
				return
			}
			churned.Add(1)
		}
	}()

	for turn := 1; turn <= 3; turn++ {
		build := builds[turn%2]
		s.place(build)
		between := s.pod(fmt.Sprintf("between-%d", turn), list, node.PodOptions{})
		s.wantAccelerated("a pod of the new binary on the old programs", direct(between, server))
		before := s.redirected(title(client))
		got := s.with(build, "load", "--json")
		s.wantJSON(map[string]any{"was": "another build", "open": true}, got)
		moving()
		wait(t, "every connection redirects messages since the change", func() (string, bool) {
			after := s.redirected(title(client))
			ok := len(after) >= len(pairs)
			for addr, n := range after {
				old, known := before[addr]
				ok = ok && (!known || n > old)
			}
			return fmt.Sprintf("turn %d: %v, before %v", turn, after, before), ok
		})
		s.wantAccelerated("new connections of old pods", direct(client, server))
		late := s.pod(fmt.Sprintf("late-%d", turn), list, node.PodOptions{})
		s.wantAccelerated("a new pod", direct(late, server))
		s.wantAccelerated("a pod from before the change", direct(between, late))
		s.close(between)
		s.close(late)
		got = s.with(build, "load", "--json")
		s.wantJSON(map[string]any{"was": "this build"}, got)
	}
	wait(t, "a pod has come and gone", func() (string, bool) { return "", churned.Load() > 0 || len(ended) > 0 })
	close(stop)
	must.Do(t, <-ended)
	moving()
	for _, pair := range pairs {
		extend(t, pair[0], pair[1])
	}
	must.Do(t, load.Stop())
	for _, pair := range pairs {
		must.Do(t, errors.Join(pair[0].Close(), pair[1].Close()))
	}
}
