package cni_test

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

func (s *site) status(args ...string) plugin.Report {
	s.t.Helper()
	got := s.cli(append([]string{"status", "--json", "--cni-cache-dir", s.CacheDir}, args...)...)
	var r plugin.Report
	if err := json.Unmarshal([]byte(got.stdout), &r); err != nil || got.code != 0 || got.stderr != "" {
		s.t.Fatalf("status: %v: %+v", err, got)
	}
	return r
}

func (s *site) connections(args ...string) []plugin.ConnectionReport {
	s.t.Helper()
	got := s.cli(append([]string{"connections", "--json"}, args...)...)
	var list []plugin.ConnectionReport
	if err := json.Unmarshal([]byte(got.stdout), &list); err != nil || got.code != 0 || got.stderr != "" {
		s.t.Fatalf("connections: %v: %+v", err, got)
	}
	return list
}

func podOf(t *testing.T, r plugin.Report, title string) plugin.PodReport {
	t.Helper()
	for _, p := range r.Pods {
		if p.Title() == title {
			return p
		}
	}
	t.Fatalf("no pod %s in %+v", title, r.Pods)
	return plugin.PodReport{}
}

// send sends bytes in messages of 4000 and reads them.
func send(t *testing.T, from, to *traffic.Conn, size int) {
	t.Helper()
	extend(t, from, to)
	for size > 0 {
		n := min(size, 4000)
		must.Get(from.Write(make([]byte, n)))(t)
		must.Get(io.ReadFull(to, make([]byte, n)))(t)
		size -= n
	}
}

// What status and connections say agrees with each other, with the counters, and
// with the bytes that were sent.
func TestStatusAndConnections(t *testing.T) {
	node.Need(t)
	s := newSite(t, options{})
	if got := s.cli("connections"); got.code != 0 || !strings.Contains(got.stdout, "not loaded") {
		t.Errorf("before anything is loaded: %+v", got)
	}
	list := s.network(node.Network{})
	plain := must.Get(node.WithoutSkipstack(list))(t)
	early := s.pod("early", plain, node.PodOptions{})
	if r := s.status(); r.Loaded != nil || r.NotLoaded == "" || podOf(t, r, title(early)).State != plugin.NotAttached {
		t.Errorf("before anything is loaded: %+v", r)
	}

	client, server := s.twoPods(list, node.PodOptions{})
	one, two := s.connect(direct(client, server))
	send(t, one, two, 100_000)
	send(t, two, one, 30_000)
	must.Get(one.Write(make([]byte, 777)))(t)

	r := s.status()
	if r.Loaded == nil || !r.Loaded.SameBuild || !r.Loaded.Open || r.Totals.Connections != 1 || len(r.Elsewhere)+len(r.Problems) > 0 {
		t.Errorf("%+v", r)
	}
	sent := uint64(0)
	for _, want := range []struct {
		pod   *pod
		bytes uint64
	}{{client, 100_777}, {server, 30_000}} {
		p := podOf(t, r, title(want.pod))
		if got := p.Redirected.Bytes + p.Passed.Bytes; got != want.bytes || p.Connections != 1 || p.State != "attached" || p.Reason != "" {
			t.Errorf("%s sent %d bytes on 1 connection; status says %+v", p.Title(), want.bytes, p)
		}
		sent += want.bytes
	}
	if got := r.Totals.Redirected().Bytes + r.Totals.Passed().Bytes; got != sent {
		t.Errorf("the node's total is %d bytes, want %d", got, sent)
	}
	if p := podOf(t, r, title(early)); p.State != plugin.NotAttached || p.Reason != "started before install" {
		t.Errorf("%+v", p)
	}

	all := s.connections()
	if len(all) != 1 || all[0].Client == nil || all[0].Server == nil {
		t.Fatalf("connections: %+v", all)
	}
	c := all[0]
	if c.Client.Pod != title(client) || c.Client.Local != one.Local().String() || c.Client.Remote != one.Remote().String() ||
		c.Client.Redirected.Bytes+c.Client.Passed.Bytes != 100_777 || c.Mode != "redirect" {
		t.Errorf("client's end: %+v", c.Client)
	}
	if c.Server.Pod != title(server) || c.Server.Local != two.Local().String() || c.Server.Redirected.Bytes+c.Server.Passed.Bytes != 30_000 ||
		c.Server.Unread != 777 {
		t.Errorf("server's end: %+v", c.Server)
	}
	port := fmt.Sprint(two.Local().Port())
	for args, want := range map[string]int{
		"--pod " + title(client): 1, "--pod " + title(server) + " --port " + port: 1, "--pod no/body": 0, "--port 1": 0,
	} {
		if got := s.connections(strings.Fields(args)...); len(got) != want {
			t.Errorf("%s: %d connections, want %d", args, len(got), want)
		}
	}
	if got := s.cli("connections"); got.code != 0 || !strings.Contains(got.stdout, title(client)) || !strings.Contains(got.stdout, one.Local().String()) {
		t.Errorf("%+v", got)
	}
	if got := s.cli("status", "--cni-cache-dir", s.CacheDir); got.code != 0 || !strings.Contains(got.stdout, title(server)) ||
		!strings.Contains(got.stdout, "1 connection accelerated now") {
		t.Errorf("%+v", got)
	}

	// Closing moves the numbers from the connection to its pods, and loses none.
	must.Do(t, one.Close())
	must.Do(t, two.Close())
	wait(t, "the connection is gone", func() (string, bool) {
		got := s.connections()
		return fmt.Sprint(got), len(got) == 0
	})
	wait(t, "the pod has the connection's bytes", func() (string, bool) {
		got := podOf(t, s.status(), title(client))
		return fmt.Sprintf("%+v", got), got.Redirected.Bytes+got.Passed.Bytes == 100_777 && got.Connections == 0
	})
}

// title is the pod's name as status prints it.
func title(p *pod) string { return p.Namespace + "/" + p.Name }
