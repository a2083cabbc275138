package inside_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/report"
)

// status is what `skipstack status` says.
func (n *node) status() (r plugin.Report, err error) {
	out, err := command(installed, "status", "--json")
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal([]byte(out), &r)
}

// waitOpen waits until the kernel's verdict allows acceleration.
func (n *node) waitOpen() {
	n.t.Helper()
	var r plugin.Report
	wait(n.t, func() (err error) {
		if r, err = n.status(); err == nil && (r.Loaded == nil || !r.Loaded.Open) {
			err = fmt.Errorf("the gate is closed: %s %s", r.Verdict, r.NotLoaded)
		}
		return err
	})
	n.t.Logf("verdict: %s", r.Verdict)
	level := "safe"
	if len(r.Loaded.Risks) > 0 {
		level = "risky"
	}
	n.t.Attr(report.AttrVerdict, report.Verdict(level, r.Loaded.Risks))
}

// report is what status says of the pod.
func (p *pod) report() (plugin.PodReport, error) {
	r, err := p.n.status()
	if err != nil {
		return plugin.PodReport{}, err
	}
	for _, pod := range r.Pods {
		for _, id := range pod.Containers {
			if id == p.container.Pod.ID {
				return pod, nil
			}
		}
	}
	return plugin.PodReport{}, fmt.Errorf("status knows nothing of %s", p.name)
}

// redirected is how many bytes of what the pods sent were redirected.
func redirected(t *testing.T, pods ...*pod) (bytes uint64) {
	t.Helper()
	for _, p := range pods {
		bytes += must.Get(p.report())(t).Redirected.Bytes
	}
	return bytes
}

const attachments = "/run/skipstack/attachments"

// record is what the plugin wrote down of the pod.
func (p *pod) record() (r attachment.Record, err error) {
	names, err := filepath.Glob(attachments + "/*.json")
	if err != nil {
		return r, err
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return r, err
		}
		r = attachment.Record{}
		if err := json.Unmarshal(text, &r); err != nil {
			return r, fmt.Errorf("%s: %w", name, err)
		}
		if r.ContainerID == p.container.Pod.ID {
			return r, nil
		}
	}
	return r, fmt.Errorf("no record of %s among %d", p.name, len(names))
}

// passedCgroupPath is what the runtime gave the plugin at ADD.
func (p *pod) passedCgroupPath() (string, error) {
	text, err := os.ReadFile(filepath.Join(calls, "ADD-"+p.container.Pod.ID))
	if err != nil {
		return "", err
	}
	var input struct {
		RuntimeConfig struct {
			CgroupPath *string `json:"cgroupPath"`
		} `json:"runtimeConfig"`
	}
	if err := json.Unmarshal(text, &input); err != nil {
		return "", err
	}
	if input.RuntimeConfig.CgroupPath == nil {
		return "", fmt.Errorf("the runtime passes no cgroupPath: %s", text)
	}
	return *input.RuntimeConfig.CgroupPath, nil
}

// attached checks that the pod is attached at the cgroup that the kubelet made for it,
// with the systemd driver, in the slice of its class ("" for guaranteed).
func (p *pod) attached(t *testing.T, class string) {
	t.Helper()
	r := must.Get(p.record())(t)
	// Dashes would be levels to systemd.
	slice := "kubepods-pod" + strings.ReplaceAll(r.PodUID, "-", "_") + ".slice"
	want := "/kubepods.slice/" + slice
	if class != "" {
		slice = strings.Replace(slice, "kubepods-", "kubepods-"+class+"-", 1)
		want = "/kubepods.slice/kubepods-" + class + ".slice/" + slice
	}
	passed := must.Get(p.passedCgroupPath())(t)
	t.Logf("containerd passes cgroupPath %q for pod %s with UID %s", passed, p.name, r.PodUID)
	if passed != want {
		t.Errorf("cgroupPath %q, want %q", passed, want)
	}
	dir := filepath.Join("/sys/fs/cgroup", want)
	var st unix.Stat_t
	must.Do(t, unix.Stat(dir, &st))
	if r.Status != attachment.Attached || r.CgroupID != st.Ino || filepath.Clean("/"+r.CgroupPath) != want && r.CgroupPath != dir {
		t.Errorf("the record says %s %s, cgroup %q with id %d; %s has %d", r.Status, r.Reason, r.CgroupPath, r.CgroupID, dir, st.Ino)
	}
	// The sandbox and the container are below it, or the link would see nothing.
	if n := must.Get(processes(dir))(t); n < 2 {
		t.Errorf("%d processes in %s, want two", n, dir)
	}
	pr := must.Get(p.report())(t)
	if pr.State != "attached" || pr.CgroupID != st.Ino {
		t.Errorf("status says %+v", pr)
	}
}

// processes counts them in a cgroup and its descendants.
func processes(cgroup string) (n int, err error) {
	err = filepath.WalkDir(cgroup, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return err
		}
		text, err := os.ReadFile(path)
		n += len(strings.Fields(string(text)))
		return err
	})
	return n, err
}

// skipped checks that the pod is not attached, for that reason.
func (p *pod) skipped(t *testing.T, reason string) {
	t.Helper()
	if r := must.Get(p.record())(t); r.Status != attachment.Skipped || r.Reason != reason {
		t.Errorf("the record says %s %q, want %s %q", r.Status, r.Reason, attachment.Skipped, reason)
	}
	if r := must.Get(p.report())(t); r.State != "skipped" || r.Reason != reason || r.Redirected.Bytes > 0 {
		t.Errorf("status says %+v", r)
	}
}

// A conversation is what peer's talk prints.
type conversation struct {
	Bytes, SentByTCP, ReceivedByTCP uint64
	Failure                         string
}

const messages = 500

// talk lets a program in the pod talk to a server, which may be starting.
func (p *pod) talk(t *testing.T, addr string) (c conversation) {
	t.Helper()
	wait(t, func() error { return p.run(&c, "talk", addr, strconv.Itoa(messages)) })
	if c.Failure != "" {
		t.Fatalf("%s: %s", addr, c.Failure)
	}
	return c
}

// accelerated lets the client talk to addr, and checks that the bytes went past the
// stack, by what TCP saw of them and by what status counts.
func accelerated(t *testing.T, client *pod, addr string, servers ...*pod) {
	t.Helper()
	pods := append([]*pod{client}, servers...)
	before := redirected(t, pods...)
	c := client.talk(t, addr)
	if c.Bytes == 0 || c.SentByTCP > c.Bytes/50 || c.ReceivedByTCP > c.Bytes/50 {
		t.Errorf("%s: of %d bytes each way %d were sent and %d received by TCP", addr, c.Bytes, c.SentByTCP, c.ReceivedByTCP)
	}
	// A pod's counters have the connection when it has closed.
	var n uint64
	wait(t, func() error {
		if n = redirected(t, pods...) - before; n < 2*c.Bytes*98/100 {
			return fmt.Errorf("%s: status counts %d redirected bytes of 2 * %d", addr, n, c.Bytes)
		}
		return nil
	})
	t.Logf("%s: of %d bytes each way TCP sent %d and received %d; status counts %d redirected", addr, c.Bytes, c.SentByTCP, c.ReceivedByTCP, n)
}

// plain lets the client talk to addr, and checks that all bytes went by TCP.
func plain(t *testing.T, client *pod, addr string, servers ...*pod) {
	t.Helper()
	pods := append([]*pod{client}, servers...)
	before := redirected(t, pods...)
	c := client.talk(t, addr)
	n := redirected(t, pods...) - before
	if c.Bytes == 0 || c.SentByTCP != c.Bytes || c.ReceivedByTCP != c.Bytes || n > 0 {
		t.Errorf("%s: of %d bytes each way %d were sent and %d received by TCP; status counts %d redirected",
			addr, c.Bytes, c.SentByTCP, c.ReceivedByTCP, n)
	}
}

// nothingLeft waits until the kubelet has removed all pods' cgroups, and checks that
// nothing of them is left.
func (n *node) nothingLeft() {
	n.t.Helper()
	wait(n.t, func() error {
		for _, pattern := range []string{"kubepods-pod*", "kubepods-*.slice/kubepods-*-pod*"} {
			left, err := filepath.Glob("/sys/fs/cgroup/kubepods.slice/" + pattern)
			if err != nil || len(left) > 0 {
				return errors.Join(err, fmt.Errorf("cgroups are left: %s", left))
			}
		}
		for _, pattern := range []string{attachments + "/*.json", "/sys/fs/bpf/skipstack/links/*"} {
			left, err := filepath.Glob(pattern)
			if err != nil || len(left) > 0 {
				return errors.Join(err, fmt.Errorf("left: %s", left))
			}
		}
		r, err := n.status()
		if err == nil && len(r.Pods) > 0 {
			err = fmt.Errorf("status shows pods: %+v", r.Pods)
		}
		return err
	})
}
