package datapath_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
)

// A memoryCgroup holds the process that makes a pod's sockets, and so the
// sockets. With cgroup v1 its limit is one for TCP alone.
type memoryCgroup struct {
	dir          string
	limit, usage string // files
	events       string // file that counts killed processes
}

// memoryV1 is where cgroup v1 has its memory controller.
const memoryV1 = "/sys/fs/cgroup/memory"

// memory gives the pod a memory cgroup, or finds the one that it has.
func (p *pod) memory(t *testing.T) memoryCgroup {
	t.Helper()
	root := filepath.Dir(p.lab.node.CgroupRoot)
	controllers := must.Get(os.ReadFile(filepath.Join(root, "cgroup.controllers")))(t)
	if bytes.Contains(controllers, []byte("memory")) {
		rel := must.Get(filepath.Rel(root, p.Cgroup))(t)
		for dir := root; ; {
			must.Do(t, os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+memory"), 0))
			first, rest, more := strings.Cut(rel, "/")
			if dir, rel = filepath.Join(dir, first), rest; !more {
				return memoryCgroup{dir, "memory.max", "memory.current", "memory.events"}
			}
		}
	}
	dir, err := os.MkdirTemp(memoryV1, "skipstack-test-")
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("needs a memory controller of cgroup v1 or v2")
	}
	must.Do(t, err)
	enter := func(dir string) {
		must.Do(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(p.host.Pid())), 0))
	}
	t.Cleanup(func() {
		enter(memoryV1)
		must.Do(t, unix.Rmdir(dir))
	})
	m := memoryCgroup{dir, "memory.kmem.tcp.limit_in_bytes", "memory.kmem.tcp.usage_in_bytes", "memory.oom_control"}
	m.setLimit(t, 1<<40) // accounting begins with the first limit
	enter(dir)
	return m
}

func (m memoryCgroup) setLimit(t *testing.T, bytes int) {
	t.Helper()
	must.Do(t, os.WriteFile(filepath.Join(m.dir, m.limit), []byte(strconv.Itoa(bytes)), 0))
}

func (m memoryCgroup) used(t *testing.T) int {
	t.Helper()
	text := must.Get(os.ReadFile(filepath.Join(m.dir, m.usage)))(t)
	return must.Get(strconv.Atoi(strings.TrimSpace(string(text))))(t)
}

// kills is how many processes the kernel has killed for the cgroup's sake.
func (m memoryCgroup) kills(t *testing.T) string {
	t.Helper()
	for line := range strings.Lines(string(must.Get(os.ReadFile(filepath.Join(m.dir, m.events)))(t))) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			return n
		}
	}
	t.Fatalf("%s does not tell killed processes", m.events)
	return ""
}

// TestMemoryLimit writes to receivers whose memory cgroup may have 32 MiB, or is at
// its limit: the writers wait, as with TCP. No write fails, and no process is killed.
func TestMemoryLimit(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		for _, c := range []struct {
			size int
			full bool
		}{{4 << 10, false}, {64 << 10, false}, {100, true}, {4 << 10, true}} {
			t.Run(fmt.Sprintf("%d bytes, full %v", c.size, c.full), func(t *testing.T) { memoryLimit(t, s, c.size, c.full) })
		}
	})
}

func memoryLimit(t *testing.T, s datapath.NodeSettings, size int, full bool) {
	const connections, limit = 40, 32 << 20
	l := newLab(t, s, datapath.LoadOptions{})
	// A client's sockets belong to who made them, a server's to who accepts them.
	client, server := l.pod("client", enabled), l.pod("server", enabled)
	cgroup := client.memory(t)
	tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
	fillers, receivers := make([]traffic.Filler, connections), make([]*traffic.Conn, connections)
	for i := range fillers {
		fillers[i].Stream = traffic.NewStream(uint64(i))
		receivers[i], fillers[i].Conn = client.pair(t, tl, traffic.SocketOptions{})
	}
	if c := l.counters().Connections; c["enrolled"] < connections/2 {
		t.Fatalf("%d connections enrolled of %d: %v", c["enrolled"], connections, c)
	}
	had := cgroup.used(t)
	if full {
		cgroup.setLimit(t, had+64<<10)
	} else {
		cgroup.setLimit(t, limit)
	}

	// Some window probes find room in a full cgroup: fewer and fewer, for half a minute.
	fillUntil(t, fillers, size, 2<<20/size, 200*time.Millisecond)
	m := l.counters().Messages
	t.Logf("%s: %d bytes used before, %d after: %v", cgroup.limit, had, cgroup.used(t), m)
	if m["memory"].Messages == 0 {
		t.Errorf("no message was counted as memory: %v", m)
	}
	// The rest is for the application and for what comes by TCP.
	if most := uint64(limit*3/4 + runtime.NumCPU()*size); m["redirected"].Bytes > most || full && m["redirected"].Bytes > 0 {
		t.Errorf("%d bytes redirected: %v", m["redirected"].Bytes, m)
	}
	if n := cgroup.kills(t); n != "0" {
		t.Errorf("%s processes killed for want of memory", n)
	}
	if used := cgroup.used(t); !full && used > limit {
		t.Errorf("%d bytes used, %d more than the limit", used, used-limit)
	}
	// What TCP alone has brought is over the limit of a full one already.
	cgroup.setLimit(t, 1<<40)
	errs, deadline := make(chan error, connections), time.Now().Add(lifetime)
	for i, r := range receivers {
		must.Do(t, errors.Join(r.SetDeadline(deadline), fillers[i].Conn.SetDeadline(deadline)))
		go func() { errs <- r.Receive(traffic.Plan{Seed: uint64(i), Bytes: fillers[i].Total, Open: true}) }()
	}
	for range receivers {
		must.Do(t, <-errs)
	}
	// With the memory free again, so is the way; of other processes' TCP, too.
	l.wait("messages are redirected again", func() (string, bool) {
		before := l.counters()
		for i, f := range fillers {
			echo(t, f.Conn, receivers[i])
		}
		d := l.counters().Since(before)
		return fmt.Sprint(nonZero(d)), d.Messages["redirected"].Messages > 0
	})
}
