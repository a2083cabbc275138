package cni_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// A mistake in skipstack's own keys costs acceleration and no pod, and says what
// and where it is. With onError "fail" it is refused. DEL does not care.
func TestBadConfiguration(t *testing.T) {
	s := newSite(t, options{})
	for name, tc := range map[string]struct{ members, says string }{
		"typo":                     {`"acceptRisk":["splice"]`, "acceptRisk"},
		"case":                     {`"Mode":"auto"`, "mode"},
		"unknown":                  {`"nonsense":{"a":[1]}`, "nonsense"},
		"of a newer version":       {`"acceptRisks":["splice"],"zeroCopy":true`, "zeroCopy"},
		"value of a newer version": {`"acceptRisks":["splice","teleport"]`, "teleport"},
		"type of mode":             {`"mode":true`, "mode"},
		"type of risks":            {`"acceptRisks":"splice"`, "acceptRisks"},
		"type of ports":            {`"excludePorts":{"80":true}`, "excludePorts"},
		"number as string":         {`"unreadLimit":"65536"`, "unreadLimit"},
		"number too large":         {`"maxConnections":1e12`, "maxConnections"},
		"null":                     {`"mode":null`, "mode"},
		"given twice":              {`"mode":"auto","mode":"auto"`, "twice"},
		"given twice, nested":      {`"excludePorts":[1],"unreadLimit":65536,"excludePorts":[]`, "excludePorts"},
		"relative log file":        {`"logFile":"skipstack.log"`, "logFile"},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			p := s.light()
			got := s.wantLines(1, tc.says, s.want(0, s.run(p.call(tc.members).add())))
			for _, want := range []string{"level=WARN", p.id, "ns/pod-", "reason=", "config"} {
				if !strings.Contains(got.stderr, want) {
					t.Errorf("the log line lacks %q: %s", want, got.stderr)
				}
			}
			s.wantRecord(p.id, "skipped", "config: ")
			if r := s.record(p.id); !strings.Contains(r.Reason, tc.says) {
				t.Errorf("reason %q, want %q in it", r.Reason, tc.says)
			}
			s.wantLinks()
			s.want(0, s.run(p.call(tc.members).check()))
			s.wantLines(0, "", s.want(0, s.run(p.call(tc.members).del())))

			failing := tc.members + `,"onError":"fail"`
			refused := s.want(7, s.run(p.call(failing).add()))
			if !strings.Contains(refused.stdout, tc.says) {
				t.Errorf("the error does not name %q: %s", tc.says, refused.stdout)
			}
			s.wantLines(0, "", s.want(0, s.run(p.call(failing).del())))
			s.wantNothing()
		})
	}
}

// One configuration with a mistake meets many pods: they all start, and the log
// does not say so hundreds of times.
func TestBadConfigurationOfManyPods(t *testing.T) {
	s := newSite(t, options{})
	lines, start := 0, time.Now()
	for _, p := range s.lightPods(10) {
		lines += len(logLines(s.want(0, s.run(p.call(`"mod":"auto"`).add())).stderr))
		s.wantRecord(p.id, "skipped", "config: ")
		s.want(0, s.run(p.call(`"mod":"auto"`).del()))
	}
	if most := 1 + int(time.Since(start).Minutes()); lines < 1 || lines > most {
		t.Errorf("%d lines for 10 pods, want %d", lines, most)
	}
}

// With logFile, lines go there. A file that is not safe to write is not written.
func TestLogFile(t *testing.T) {
	s := newSite(t, options{})
	p := s.light()
	file, link := filepath.Join(s.Dir, "skipstack.log"), filepath.Join(s.Dir, "link")
	must.Do(t, os.Symlink(filepath.Join(s.Dir, "target"), link))
	s.attempt(func() error {
		got := s.want(0, s.once(p.call(`"logFile":"`+file+`"`, `"mod":1`).add()))
		if late(got.stderr) || s.unfinished(p.id) {
			return errors.Join(errors.New("ADD had no time: "+got.stderr), os.Remove(file))
		}
		s.wantLines(0, "", got)
		return nil
	})
	if raw := string(must.Get(os.ReadFile(file))(t)); len(logLines(raw)) != 1 || !strings.Contains(raw, "reason=") {
		t.Errorf("the file holds %q", raw)
	}
	if mode := must.Get(os.Stat(file))(t).Mode(); mode != 0o600 {
		t.Errorf("the file's mode is %v", mode)
	}
	got := s.want(0, s.run(p.call(`"logFile":"`+link+`"`, `"mud":2`).add()))
	if !strings.Contains(got.stderr, "reason=") || !strings.Contains(got.stderr, link) {
		t.Errorf("logged %q", got.stderr)
	}
	if _, err := os.Stat(filepath.Join(s.Dir, "target")); err == nil {
		t.Error("the log has followed a symbolic link")
	}
	s.want(0, s.run(p.call().del()))
}

// Through libcni: pods of a network with a mistake in its configuration talk.
func TestPodsWithBadConfiguration(t *testing.T) {
	s := newSite(t, options{})
	list := s.network(node.Network{Skipstack: withAccepting("excludePort", []int{80})})
	client, server := s.twoPods(list, node.PodOptions{})
	s.wantPlain("pods with a mistake in their configuration", direct(client, server))
	s.wantRecord(server.ID, "skipped", "config: ")
	s.wantLinks()
	if log := s.log.take(); len(logLines(log)) != 1 || !strings.Contains(log, "excludePort") {
		t.Errorf("log %q, want one line", log)
	}
	// A repaired configuration holds for new pods.
	list = s.network(node.Network{})
	a, b := s.pod("a", list, node.PodOptions{}), s.pod("b", list, node.PodOptions{})
	s.wantAcceleratedIf(accepted(t), "pods after the repair", direct(a, b))
}

// What is no network configuration at all.
func TestUndecodable(t *testing.T) {
	s := newSite(t, options{})
	p := s.light()
	for _, verb := range []string{"ADD", "DEL", "CHECK", "GC", "STATUS"} {
		for _, stdin := range []string{"{", "[]", "7", `{"cniVersion":"1.1.0","name":"net"}{}`, "\x00", " "} {
			s.want(6, s.run(call{verb: verb, pod: p, stdin: stdin}))
		}
	}
	// Without a previous result there is nothing to pass on.
	for _, members := range []string{"", `"onError":"fail"`, `"mode":"off"`, `"mod":1`} {
		c := p.call(members).add()
		c.prev = "-"
		s.want(7, s.run(c))
	}
	for _, prev := range []string{"null", "[]", `{"cniVersion":"1.1.0","ips":7}`, `{"cniVersion":"9.9.9"}`} {
		c := p.call().add()
		c.prev = prev
		s.want(7, s.run(c))
	}
	s.wantNothing()
}

// Where skipstack cannot work, pods start without it, one line says why, and
// onError "fail" fails them.
func TestWhereItCannotWork(t *testing.T) {
	node.Need(t)
	mount := func(t *testing.T, fsType, dir string) {
		must.Do(t, os.Mkdir(dir, 0o700))
		must.Do(t, unix.Mount(fsType, dir, fsType, unix.MS_RDONLY, "mode=0700"))
		t.Cleanup(func() { must.Do(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	}
	for name, tc := range map[string]struct {
		setUp func(t *testing.T, s *site, c *call)
		says  string
	}{
		"not root": {func(t *testing.T, s *site, c *call) { c.handicap = "root" }, "permi"},
		"not root, nothing loaded": {func(t *testing.T, s *site, c *call) {
			c.handicap = "root"
			s.ok(s.cli("unload"))
			must.Do(t, os.Chmod(s.BPFFS, 0o777))
			c.runDir = filepath.Join(s.Dir, "theirs")
		}, "permi"},
		"no capabilities, nothing loaded": {func(t *testing.T, s *site, c *call) {
			c.handicap = "capabilities"
			s.ok(s.cli("unload"))
		}, "permi"},
		"no cgroup2":                {func(t *testing.T, s *site, c *call) { c.handicap, c.cgroupRoot = "cgroup2", "-" }, "cgroup"},
		"cgroup root is no cgroup2": {func(t *testing.T, s *site, c *call) { c.cgroupRoot = s.Dir }, "cgroup"},
		"no such cgroup":            {func(t *testing.T, s *site, c *call) { c.cgroup = "/kubepods/pod0"; c.args = "-" }, "cgroup"},
		"two cgroups of one UID": {func(t *testing.T, s *site, c *call) {
			c.cgroup = "-"
			second := must.Get(s.Cgroup("kubepods/pod" + c.pod.uid))(t)
			t.Cleanup(func() { must.Do(t, os.Remove(second)) })
		}, "more than one"},
		"the host's netns":       {func(t *testing.T, s *site, c *call) { c.netns = "/proc/self/ns/net" }, "host's network namespace"},
		"all pods' cgroup":       {func(t *testing.T, s *site, c *call) { c.cgroup = "/kubepods/burstable" }, "cgroup"},
		"cgroup above the root":  {func(t *testing.T, s *site, c *call) { c.cgroup = "/../init" }, "cgroup"},
		"no bpffs, no directory": {func(t *testing.T, s *site, c *call) { c.bpffs = filepath.Join(s.Dir, "nothing") }, "nothing"},
		"no bpffs, a file": {func(t *testing.T, s *site, c *call) {
			c.bpffs = filepath.Join(s.Dir, "file")
			must.Do(t, os.WriteFile(c.bpffs, nil, 0o600))
		}, "file"},
		"no bpffs, no right to mount": {func(t *testing.T, s *site, c *call) {
			c.handicap, c.bpffs = "capabilities", filepath.Join(s.Dir, "empty")
			must.Do(t, os.Mkdir(c.bpffs, 0o700))
		}, "permi"},
		"read-only bpffs": {func(t *testing.T, s *site, c *call) {
			c.bpffs = filepath.Join(s.Dir, "ro")
			mount(t, "bpf", c.bpffs)
		}, "read-only"},
		"read-only run directory": {func(t *testing.T, s *site, c *call) {
			c.runDir = filepath.Join(s.Dir, "ro")
			mount(t, "tmpfs", c.runDir)
		}, "read-only"},
		"run directory of somebody else": {func(t *testing.T, s *site, c *call) {
			c.runDir = filepath.Join(s.Dir, "theirs")
			must.Do(t, os.Mkdir(c.runDir, 0o777))
			must.Do(t, os.Chmod(c.runDir, 0o777))
		}, "theirs"},
		"run directory is a file": {func(t *testing.T, s *site, c *call) {
			c.runDir = filepath.Join(s.Dir, "file")
			must.Do(t, os.WriteFile(c.runDir, nil, 0o600))
		}, "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, options{})
			p, other := s.light(), s.light()
			s.want(0, s.run(other.call().add()))
			s.want(0, s.run(other.call().del()))
			c := p.call()
			tc.setUp(t, s, &c)
			got := s.wantLines(1, "reason=", s.want(0, s.run(c.add())))
			if !strings.Contains(strings.ToLower(got.stderr), tc.says) {
				t.Errorf("the log line does not say %q: %s", tc.says, got.stderr)
			}
			s.wantLinks()
			s.want(0, s.run(c.check()))
			s.want(0, s.run(c.del()))
			failing := c.with(`"onError":"fail"`)
			s.want(11, s.run(failing.add()))
			s.want(0, s.run(failing.del()))
			s.waitProber()
			// Nothing is the worse for it.
			s.want(0, s.run(other.call().add()))
			s.wantRecord(other.id, "attached", "")
			s.want(0, s.run(other.call().del()))
		})
	}
}

// ok checks that a command has done what it was asked for.
func (s *site) ok(got outcome) {
	s.t.Helper()
	if got.code != 0 {
		s.t.Errorf("exit %d: %s%s", got.code, got.stdout, got.stderr)
	}
}

// A directory without a BPF file system gets one.
func TestBPFFSIsMounted(t *testing.T) {
	s := newSite(t, options{})
	p, q := s.light(), s.light()
	dir := filepath.Join(s.Dir, "empty")
	must.Do(t, os.Mkdir(dir, 0o700))
	t.Cleanup(func() {
		s.waitProber() // it might mount it again
		must.Do(t, unix.Unmount(dir, unix.MNT_DETACH))
	})
	first, second := p.call(), q.call()
	first.bpffs, second.bpffs = dir, dir
	s.wantLines(0, "", s.want(0, s.run(first.add())))
	s.wantLines(0, "", s.want(0, s.run(second.add())))
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || uint32(st.Type) != unix.BPF_FS_MAGIC {
		t.Fatalf("%s is of type %x, %v", dir, st.Type, err)
	}
	pins := must.Get(filepath.Glob(filepath.Join(dir, "skipstack/v2/links/*")))(t)
	if len(pins) != 2 {
		t.Errorf("links %v, want 2", pins)
	}
	// DEL finds it by the record, whatever the configuration says by now.
	for got := s.want(0, s.once(p.call().del())); late(got.stderr); got = s.want(0, s.once(p.call().del())) {
		s.want(0, s.run(first.add()))
	}
	s.want(0, s.run(second.del()))
	if pins := must.Get(filepath.Glob(filepath.Join(dir, "skipstack/v2/links/*")))(t); len(pins) != 0 {
		t.Errorf("links %v, want none", pins)
	}
}
