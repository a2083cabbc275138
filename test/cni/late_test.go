package cni_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// A call has two seconds, and a machine that stalls may take all of them. What had no
// time says so. Tests that want a call's work done ask again then, as a runtime may.

// late says whether somebody says that there was no time.
func late(text string) bool {
	return slices.ContainsFunc([]string{"not done in time", "busy: ", "another process holds the lock", "context deadline exceeded"},
		func(s string) bool { return strings.Contains(text, s) })
}

// run runs the plugin, again where it had no time.
func (s *site) run(c call) outcome {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		repeats := s.repeats()
		got := s.once(c)
		if !late(got.stdout+got.stderr) && (c.verb != "ADD" || !s.unfinished(c.pod.id)) || time.Now().After(deadline) {
			return got
		}
		s.waitProber() // which may be doing what the call left undone
		s.again(fmt.Sprintf("%s, exit %d", c.verb, got.code), got.stderr, repeats)
		if c.verb == "DEL" {
			s.undelete(c)
		}
	}
}

// unfinished says whether an ADD of the container had no time, which the log may not
// say, as it leaves out repeats.
func (s *site) unfinished(container string) bool {
	s.t.Helper()
	return slices.ContainsFunc(s.records(), func(r record) bool {
		return r.ContainerID == container && (r.Status == "attaching" || late(r.Reason))
	})
}

// again is called before something is done again.
func (s *site) again(what, says string, repeats []byte) {
	s.t.Helper()
	s.t.Logf("again: %s: %s", what, says)
	// As if it had not been said.
	path := filepath.Join(s.RunDir, logRepeats)
	if repeats == nil {
		_ = os.Remove(path)
	} else {
		_ = os.WriteFile(path, repeats, 0o600)
	}
}

// logRepeats is the file in the run directory that counts what the log leaves out.
const logRepeats = "log-repeats"

// repeats is that file's content, nil if there is none.
func (s *site) repeats() []byte {
	content, _ := os.ReadFile(filepath.Join(s.RunDir, logRepeats))
	return content
}

// undelete brings the attachment back whose DEL is late: with its record gone, the next
// DEL would do nothing, and its link would stay until the pod's cgroup goes.
func (s *site) undelete(c call) {
	s.t.Helper()
	if _, err := os.Stat(c.pod.dir); err == nil {
		s.want(0, s.run(call{verb: "ADD", pod: c.pod, network: c.network, ifname: c.ifname, bpffs: c.bpffs, runDir: c.runDir, cgroupRoot: c.cgroupRoot}))
	} else {
		s.waitLinkSwept(c.pod.cgroupID)
	}
}

// waitLinkSwept waits until the link of a cgroup that is gone is swept, which takes
// until the kernel has released the cgroup.
func (s *site) waitLinkSwept(cgroupID uint64) {
	s.t.Helper()
	wait(s.t, "the link is swept", func() (string, bool) {
		s.want(0, s.run(call{verb: "GC", network: "of-no-pod", members: `"cni.dev/valid-attachments":[]`}))
		return "", !slices.Contains(s.links(), cgroupID)
	})
}

// attach attaches the pod to a network, again where skipstack had no time.
func (s *site) attach(p *node.Pod, list *libcni.NetworkConfigList, ifName string) {
	s.t.Helper()
	s.onTime(p.ID, func() error {
		_, err := p.Add(s.t.Context(), list, ifName)
		return err
	}, func() { must.Do(s.t, p.Del(s.t.Context(), list, ifName)) })
}

// detach detaches the pod from a network, again where skipstack had no time.
func (s *site) detach(p *node.Pod, list *libcni.NetworkConfigList, ifName string) {
	s.t.Helper()
	s.onTime(p.ID, func() error { return p.Del(s.t.Context(), list, ifName) }, func() { s.attach(p, list, ifName) })
}

// onTime does something with a container by libcni; where skipstack had no time for it,
// it is undone and done again.
func (s *site) onTime(container string, do func() error, undo func()) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		repeats, mark := s.repeats(), s.log.len()
		err := do()
		said := s.log.since(mark)
		if err != nil {
			said += err.Error()
		}
		if !late(said) && !s.unfinished(container) || time.Now().After(deadline) {
			must.Do(s.t, err)
			return
		}
		s.waitProber()
		s.again("by libcni", said, repeats)
		undo()
		s.log.cut(mark)
	}
}

// attempt tries something until it finds nothing to complain about. It is for what is to
// happen in time, or to be seen in time; what is wrong in any case is no such complaint.
func (s *site) attempt(try func() error) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		repeats := s.repeats()
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) || s.t.Failed() {
			s.t.Fatal(err)
		}
		s.again("attempt", err.Error(), repeats)
	}
}
