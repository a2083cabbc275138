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
	"strings"
	"testing"
	"time"

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
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
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
		for _, c := range []*traffic.Conn{one, two} {
			must.Do(t, c.SetDeadline(time.Now().Add(10*time.Minute)))
		}
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
	churned := 0
	go func() {
		for ; ; churned++ {
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
			p, err := s.AddPod(context.Background(), fmt.Sprintf("churn-%d", churned), strict, node.PodOptions{})
			if err == nil {
				err = p.Close(context.Background())
			}
			var coded *types.Error
			if errors.As(err, &coded) && strings.Contains(coded.Details, "not done in time") {
				continue // the machine is busy with other things
			}
			if err != nil {
				ended <- fmt.Errorf("pod %d: %w", churned, err)
				return
			}
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
		after := s.redirected(title(client))
		if len(after) < len(pairs) {
			t.Errorf("turn %d: %d connections, want %d", turn, len(after), len(pairs))
		}
		for addr, n := range after {
			if old, ok := before[addr]; ok && n <= old {
				t.Errorf("turn %d: the connection of %s has redirected no message since the change", turn, addr)
			}
		}
		s.wantAccelerated("new connections of old pods", direct(client, server))
		late := s.pod(fmt.Sprintf("late-%d", turn), list, node.PodOptions{})
		s.wantAccelerated("a new pod", direct(late, server))
		s.wantAccelerated("a pod from before the change", direct(between, late))
		s.close(between)
		s.close(late)
		got = s.with(build, "load", "--json")
		s.wantJSON(map[string]any{"was": "this build"}, got)
	}
	close(stop)
	must.Do(t, <-ended)
	if churned == 0 {
		t.Error("no pod has come and gone")
	}
	moving()
	must.Do(t, load.Stop())
	for _, pair := range pairs {
		must.Do(t, errors.Join(pair[0].Close(), pair[1].Close()))
	}
}
