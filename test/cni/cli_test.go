package cni_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// connect makes a connection that is enrolled.
func (s *site) connect(r route) (client, server *traffic.Conn) {
	s.t.Helper()
	l := must.Get(r.server.Listen(r.listen, r.listener))(s.t)
	s.t.Cleanup(func() { l.Close() })
	start := time.Now()
	for tries := 0; tries < handshakes || time.Since(start) < stall; tries++ {
		before := s.counters()
		client, server, err := r.client.Pair(l, l.Addr, r.socket)
		must.Do(s.t, err)
		if s.counters().Since(before).Connections["enrolled"] == 0 {
			must.Do(s.t, errors.Join(client.Close(), server.Close()))
			continue
		}
		s.t.Cleanup(func() { client.Close(); server.Close() })
		extend(s.t, client, server)
		return client, server
	}
	s.t.Fatal("no connection was enrolled")
	return nil, nil
}

// extend sets connections' deadlines anew, for what is about to be sent. One deadline
// for all of a test would be one for how fast the machine is.
func extend(t *testing.T, ends ...interface{ SetDeadline(time.Time) error }) {
	t.Helper()
	for _, end := range ends {
		must.Do(t, end.SetDeadline(time.Now().Add(patience)))
	}
}

// unlimited takes connections' deadlines away, for traffic that goes on until it is
// stopped; extend sets them before that.
func unlimited(t *testing.T, ends ...*traffic.Conn) {
	t.Helper()
	for _, end := range ends {
		must.Do(t, end.SetDeadline(time.Time{}))
	}
}

// say sends a message, checks that it arrives, and returns what was counted.
func (s *site) say(from, to *traffic.Conn) datapath.Counters {
	s.t.Helper()
	extend(s.t, from, to)
	before := s.counters()
	sent, got := make([]byte, 1000), make([]byte, 1000)
	for i := range sent {
		sent[i] = byte(rand.Uint32())
	}
	must.Get(from.Write(sent))(s.t)
	must.Get(io.ReadFull(to, got))(s.t)
	if !bytes.Equal(sent, got) {
		s.t.Fatal("a message has arrived wrong")
	}
	return s.counters().Since(before)
}

// wantRedirected checks that messages on a connection are redirected, once what
// went by TCP before is acknowledged.
func (s *site) wantRedirected(from, to *traffic.Conn) {
	s.t.Helper()
	wait(s.t, "messages are redirected", func() (string, bool) {
		d := s.say(from, to)
		return fmt.Sprint(d.Messages), d.Messages["redirected"].Messages == 1
	})
}

// wantSwitchedOff checks that messages on a connection go by TCP for that reason.
func (s *site) wantSwitchedOff(from, to *traffic.Conn) {
	s.t.Helper()
	for range 3 {
		if d := s.say(from, to); d.Messages["redirected"].Messages != 0 || d.Messages["switched_off"].Messages != 1 {
			s.t.Errorf("counted %v, want switched_off", d.Messages)
		}
	}
}

// wantCLI checks a command's exit code and what it says.
func (s *site) wantCLI(code int, stdout, stderr string, got outcome) outcome {
	s.t.Helper()
	if got.code != code || !strings.Contains(got.stdout, stdout) || !strings.Contains(got.stderr, stderr) ||
		stdout == "" && got.stdout != "" || stderr == "" && got.stderr != "" {
		s.t.Errorf("exit %d, stdout %q, stderr %q; want %d, %q, %q", got.code, got.stdout, got.stderr, code, stdout, stderr)
	}
	return got
}

// wantJSON checks that a command prints one JSON object, and some of its members.
func (s *site) wantJSON(want map[string]any, got outcome) {
	s.t.Helper()
	dec := json.NewDecoder(strings.NewReader(got.stdout))
	members := map[string]any{}
	if err := dec.Decode(&members); err != nil || got.code != 0 || got.stderr != "" || dec.More() {
		s.t.Errorf("exit %d, stdout %q (%v), stderr %q", got.code, got.stdout, err, got.stderr)
	}
	for k, v := range want {
		if fmt.Sprint(members[k]) != fmt.Sprint(v) {
			s.t.Errorf("%s is %v, want %v: %s", k, members[k], v, got.stdout)
		}
	}
}

// Unloading under traffic: refused while pods are attached; by force it loses no
// byte, and when the last connection has closed nothing is left.
func TestUnload(t *testing.T) {
	s := newSite(t, options{})
	list := s.network(node.Network{})
	client, server := s.twoPods(list, node.PodOptions{})
	a, b := s.connect(direct(client, server))

	refused := s.wantCLI(3, "", "default/client", s.cli("unload"))
	for _, want := range []string{"default/server", "--force", "2 "} {
		if !strings.Contains(refused.stderr, want) {
			t.Errorf("the refusal does not say %q: %s", want, refused.stderr)
		}
	}
	s.wantCLI(3, "", "default/client", s.cli("unload", "--json"))
	s.wantLinks(client.cgroupID(t), server.cgroupID(t))
	s.wantRedirected(a, b)
	s.wantAccelerated("a refused unload", direct(client, server))

	before := s.counters()
	unlimited(t, a, b)
	load := traffic.StartLoad([][2]*traffic.Conn{{a, b}}, traffic.Plan{MaxWrite: 64 << 10, Paced: time.Millisecond})
	wait(t, "bytes are redirected", func() (string, bool) {
		m := s.counters().Since(before).Messages["redirected"]
		return fmt.Sprint(m), m.Bytes > 256<<10
	})
	s.wantJSON(map[string]any{"detached": 2, "sockets": 2}, s.cli("unload", "--force", "--json"))
	at := s.counters()
	wait(t, "messages go by TCP", func() (string, bool) {
		d := s.counters().Since(at)
		return fmt.Sprint(d.Messages, load.Err()), d.Messages["switched_off"].Messages >= 10
	})
	extend(t, a, b)
	if err := load.Stop(); err != nil {
		t.Error("bytes were lost:", err)
	}
	if d := s.counters().Since(at); d.Messages["redirected"].Messages != 0 {
		t.Errorf("after the unload messages went %v, want by TCP", d.Messages)
	}
	for _, p := range []*pod{client, server} {
		s.wantRecord(p.ID, "skipped", "unloaded")
		must.Do(t, p.Check(t.Context(), list, node.IfName))
	}
	s.wantPlain("unloaded", direct(client, server))

	// The connection is closed, and now the rest can go.
	must.Do(t, errors.Join(a.Close(), b.Close()))
	wait(t, "the datapath is gone", func() (string, bool) {
		got := s.cli("unload")
		_, err := os.Stat(filepath.Join(s.BPFFS, "skipstack"))
		return got.stdout + got.stderr, got.code == 0 && errors.Is(err, fs.ErrNotExist)
	})
	s.wantCLI(0, "loaded", "", s.cli("unload"))
	s.wantPlain("with nothing loaded", direct(client, server))
	must.Do(t, client.Check(t.Context(), list, node.IfName))

	// New pods load it again; the old ones stay plain until they are restarted.
	x, y := s.pod("x", list, node.PodOptions{}), s.pod("y", list, node.PodOptions{})
	s.wantAccelerated("new pods", direct(x, y))
	s.wantPlain("old pods", direct(client, server))
	s.close(client)
	s.wantLinks(x.cgroupID(t), y.cgroupID(t))
}

// Pods that start while the datapath is unloaded, again and again: each is attached
// or it is not, and its record says which.
func TestUnloadAmongAdds(t *testing.T) {
	s := newSite(t, options{})
	pods := s.lightPods(40)
	var adds crowd
	var wg sync.WaitGroup
	for _, half := range [][]light{pods[:20], pods[20:]} {
		wg.Go(func() {
			for _, p := range half {
				s.want(0, adds.saw(s.once(p.call().add())))
			}
		})
	}
	for range 4 {
		s.wantCLI(0, "loaded", "", s.cli("unload", "--force"))
	}
	wg.Wait()
	adds.log(t)
	s.waitProber()
	for _, p := range pods {
		if adds.late[p.id] { // it may not even have a record
			s.want(0, s.run(p.call().add()))
		}
	}
	var attached []uint64
	for _, p := range pods {
		if r := s.record(p.id); r.Status == "attached" {
			attached = append(attached, p.cgroupID)
		} else if r.Status != "skipped" || r.Reason == "" {
			t.Errorf("record %+v", r)
		}
		s.want(0, s.run(p.call().check()))
	}
	s.wantLinks(attached...)
	for _, p := range pods {
		s.want(0, s.run(p.call().del()))
	}
	s.wantCLI(0, "loaded", "", s.cli("unload"))
	s.wantNothing()
}

// Load says what it finds and what the kernel is fit for, and takes its settings
// from a conflist.
func TestLoad(t *testing.T) {
	s := newSite(t, options{unprobed: true})
	got := s.cli("load")
	for range probeAttempts {
		if !s.unclear() {
			break
		}
		s.t.Log("again:", got.stdout)
		s = newSite(t, options{unprobed: true})
		got = s.cli("load")
	}
	s.wantCLI(0, "The datapath is loaded (up to 262144 connections).\nKernel: "+theVerdict(t).Verdict, "", got)
	s.wantCLI(0, "was loaded already", "", s.cli("load"))
	s.wantJSON(map[string]any{"was": "this build", "open": true, "switchedOff": false, "maxConnections": 262144}, s.cli("load", "--json"))
	p := s.light()
	t.Logf("the first ADD after load took %v", s.wantLines(0, "", s.want(0, s.run(p.call().add()))).took)
	s.want(0, s.run(p.call().del()))
	s.wantCLI(0, "The datapath is unloaded.\n", "", s.cli("unload"))

	// The conflist names the place and the size; flags win.
	list := filepath.Join(s.ConfDir, "10-pods.conflist")
	write := func(members string) {
		must.Do(t, os.WriteFile(list, []byte(fmt.Sprintf(`{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge"},
			{"type":"skipstack","bpffs":%q,"runDir":%q,"cgroupRoot":%q%s}]}`, s.BPFFS, s.RunDir, s.CgroupRoot, members)), 0o600))
	}
	write(`,"maxConnections":1000`)
	s.wantCLI(0, "is loaded (up to 1000 connections)", "", s.bare("load", "--config", list))
	s.wantCLI(0, "maxConnections 262144 takes effect when", "", s.cli("load"))
	s.wantCLI(0, "unloaded", "", s.bare("unload", "--config", list))
	write(`,"maxConnection":1000`)
	for _, args := range [][]string{{"load"}, {"unload", "--force"}, {"off"}, {"on"}} {
		s.wantCLI(2, "", "maxConnection", s.bare(append(args, "--config", list)...))
	}
	if _, err := os.Stat(filepath.Join(s.BPFFS, "skipstack")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a wrong configuration has changed something: %v", err)
	}
	s.wantCLI(1, "", "not loaded", s.cli("on"))
	s.wantCLI(1, "", "nothing", s.bare("load", "--bpffs", filepath.Join(s.Dir, "nothing"), "--run-dir", s.RunDir))
	s.wantCLI(2, "", "Run 'skipstack load --help'", s.bare("load", "--nonsense"))
	s.wantCLI(2, "", "Run 'skipstack", s.bare("nonsense"))
}

// Switching off and on, for the node and for a pod, acts on live connections at
// once, and loses nothing.
func TestSwitch(t *testing.T) {
	node.Need(t)
	restore := node.OtherSwitches(0) // `off` reaches those too
	t.Cleanup(func() { must.Do(t, restore()) })
	s := newSite(t, options{})
	list := s.network(node.Network{})
	client, server := s.twoPods(list, node.PodOptions{})
	third := s.pod("third", list, node.PodOptions{})
	a, b := s.connect(direct(client, server))
	s.wantRedirected(a, b)

	got := s.wantCLI(0, "Acceleration is switched off for this node.\n", "", s.cli("off"))
	if !strings.Contains(got.stdout, "Enrolled sockets left: 2.") {
		t.Errorf("off says %q", got.stdout)
	}
	s.wantSwitchedOff(a, b)
	s.wantSwitchedOff(b, a)
	s.wantPlain("switched off", direct(client, server))
	s.wantCLI(0, "Acceleration is switched off on this node", "", s.cli("load"))
	p := s.light()
	s.wantLines(1, "skipstack on", s.want(0, s.run(p.call().add())))
	s.want(0, s.run(p.call().del()))
	s.wantCLI(0, "Acceleration is switched on for this node.\n", "", s.cli("on"))
	s.wantRedirected(a, b)
	s.wantRedirected(b, a)
	s.wantAccelerated("switched on", direct(client, server))

	// It is the brake: it works where somebody is stuck with every lock there is.
	holders := []*stuck{newStuck(t, filepath.Join(s.RunDir, "lock")), newStuck(t, filepath.Join(s.BPFFS, "skipstack"))}
	s.wantCLI(0, "switched off for this node", "", s.cli("off"))
	s.wantSwitchedOff(a, b)
	s.wantCLI(0, "switched on for this node", "", s.cli("on"))
	for _, h := range holders {
		h.end()
	}
	s.wantRedirected(a, b)

	s.wantJSON(map[string]any{"switchedOff": true, "sockets": 1}, s.cli("off", "--pod", "default/server", "--json"))
	s.wantSwitchedOff(a, b)
	s.wantSwitchedOff(b, a)
	s.wantPlain("to a pod that is switched off", direct(client, server))
	s.wantPlain("from a pod that is switched off", direct(server, third))
	s.wantAccelerated("between other pods", direct(client, third))
	// It outlives another ADD of the pod, as a runtime's restart may bring one.
	s.attach(server.Pod, list, "net1")
	s.wantPlain("after another ADD", direct(client, server))
	s.detach(server.Pod, list, "net1")
	s.wantPlain("after another DEL", direct(client, server))
	s.wantJSON(map[string]any{"switchedOff": false}, s.cli("on", "--pod", "default/server", "--json"))
	s.wantRedirected(a, b)
	s.wantAccelerated("switched on", direct(client, server))

	s.wantCLI(1, "", "no attachment of this pod is recorded on this node: default/nobody", s.cli("off", "--pod", "default/nobody"))
	s.wantCLI(2, "", "NAMESPACE/NAME", s.cli("off", "--pod", "server"))
	s.wantRedirected(a, b)
}
