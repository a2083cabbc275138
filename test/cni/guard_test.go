package cni_test

import (
	"crypto/rand"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// proxied is a Go L4 proxy between two accelerated connections.
func (s *site) proxied(client, proxy, server *pod) (a, b *net.TCPConn) {
	s.t.Helper()
	a1, p1 := s.connect(direct(client, proxy))
	p2, b1 := s.connect(direct(proxy, server))
	var conns []*net.TCPConn
	for _, c := range []*traffic.Conn{a1, p1, p2, b1} {
		conn := must.Get(c.Go())(s.t)
		s.t.Cleanup(func() { conn.Close() })
		conns = append(conns, conn)
	}
	go traffic.Join(conns[1], conns[2])
	return conns[0], conns[3]
}

// relays checks that bytes pass both ways.
func (s *site) relays(a, b net.Conn) {
	s.t.Helper()
	extend(s.t, a, b)
	content := make([]byte, 256<<10)
	rand.Read(content)
	if err := errors.Join(traffic.Relayed(a, b, content), traffic.Relayed(b, a, content)); err != nil {
		s.t.Error(err)
	}
}

func (s *site) guardAttached() bool {
	_, err := os.Stat(filepath.Join(s.BPFFS, "skipstack/v2/guard/link"))
	return err == nil
}

// On a kernel that permits a splice guard, nothing has to be accepted for it: pods
// of the default configuration are accelerated, and a proxy that splices works.
func TestSpliceGuard(t *testing.T) {
	node.Need(t)
	v := theVerdict(t)
	if slices.Contains(v.Risks, "splice") {
		t.Skip("needs a kernel that permits a splice guard")
	}
	s := newSite(t, options{})
	entry := map[string]any{}
	if len(v.Risks) > 0 {
		entry["acceptRisks"] = v.Risks
	}
	list := s.network(node.Network{Skipstack: entry})
	s.wantCLI(0, "is loaded", "", s.cli("load"))
	if s.guardAttached() {
		t.Error("the guard is attached before the first pod")
	}
	var pods []*pod
	for _, name := range []string{"client", "proxy", "server"} {
		p := s.pod(name, list, node.PodOptions{})
		if log := s.log.take(); log != "" {
			t.Errorf("log %q", log)
		}
		if !s.guardAttached() {
			t.Errorf("the guard is not attached with pod %s", name)
		}
		pods = append(pods, p)
	}
	client, proxy, server := pods[0], pods[1], pods[2]
	a, b := s.proxied(client, proxy, server)
	s.relays(a, b)

	// The operator does not want it any more: what lives stays guarded, and what
	// comes is not accelerated, as nobody accepts the risk.
	without := map[string]any{"spliceGuard": "off"}
	for k, value := range entry {
		without[k] = value
	}
	late := s.pod("late", s.network(node.Network{Skipstack: without}), node.PodOptions{})
	if log := s.log.take(); !strings.Contains(log, "risks that are not accepted: splice") {
		t.Errorf("log %q", log)
	}
	s.wantPlain("spliceGuard off", direct(client, late))
	s.relays(a, b)
	if !s.guardAttached() {
		t.Error("the guard has left its sockets")
	}

	// It comes back when the operator says so.
	s.wantCLI(0, "was loaded already", "", s.cli("load"))
	s.wantAccelerated("spliceGuard auto", direct(client, server))
	s.relays(a, b)
	must.Do(t, errors.Join(a.Close(), b.Close()))
	for _, p := range append(pods, late) {
		s.close(p)
	}
	wait(t, "the guard is gone", func() (string, bool) {
		s.gcAll()
		return "it is pinned", !s.guardAttached()
	})
	s.wantCLI(0, "unloaded", "", s.cli("unload"))
}
