// Package inside_test is run in the virtual machine of test/kubelet, where the node
// is there for nothing else: it starts and stops services, and leaves nothing to
// clean up.
package inside_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/runtimes/cri"
)

const (
	files     = "/opt/test"            // what test/kubelet has put there
	calls     = "/run/skipstack-calls" // what the runtime gave the plugin
	manifests = "/etc/kubernetes/manifests"
	socket    = "/run/containerd/containerd.sock"
	nodeIP    = "192.0.2.2"
	installed = "/opt/cni/bin/skipstack.real"
)

// patience is for what comes about by itself, on a slow machine.
const patience = 15 * time.Minute

func TestMain(m *testing.M) {
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	os.Exit(m.Run())
}

// prepare does what an administrator has done before the first pod.
func prepare() error {
	if _, err := os.Stat(filepath.Join(files, "image.tar")); err != nil {
		return fmt.Errorf("this is no place for these tests: run `make test-kubelet`: %w", err)
	}
	for _, dir := range []string{calls, manifests} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for _, verb := range []string{"install", "load"} {
		if _, err := command(filepath.Join(files, "skipstack"), verb); err != nil {
			return err
		}
	}
	// The installed plugin keeps its name, and what it is given is recorded.
	const name = "/opt/cni/bin/skipstack"
	if err := os.Rename(name, installed); err != nil {
		return err
	}
	script := fmt.Sprintf("#!/bin/bash\ntee %s/$CNI_COMMAND-$CNI_CONTAINERID | exec %s\n", calls, installed)
	if err := os.WriteFile(name, []byte(script), 0o755); err != nil {
		return err
	}
	if _, err := command("systemctl", "start", "containerd"); err != nil {
		return err
	}
	_, err := command("ctr", "--namespace", "k8s.io", "images", "import", filepath.Join(files, "image.tar"))
	return err
}

func command(args ...string) (string, error) {
	cmd := exec.Command(args[0], args[1:]...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s%s", strings.Join(args, " "), err, errs.String(), out)
	}
	return string(out), nil
}

// wait waits until f finds nothing to complain about, and logs what it waits for.
func wait(t testing.TB, f func() error) {
	t.Helper()
	last := ""
	must.Wait(t, patience, time.Second, func() error {
		err := f()
		if err != nil && err.Error() != last {
			last = err.Error()
			t.Log("waiting: ", last)
		}
		return err
	})
}

// A node is the machine.
type node struct {
	t      *testing.T
	client *cri.Client
}

// newNode says for docs/support.md what the node is made of, and what services wrote
// if the test fails.
func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t}
	t.Attr(report.AttrRuntime, must.Get(versions())(t))
	t.Attr(report.AttrCgroups, "v2, systemd driver")
	t.Cleanup(func() {
		if t.Failed() {
			for _, args := range [][]string{
				{"journalctl", "--no-pager", "-o", "cat", "-n", "200", "-u", "kubelet"},
				{"journalctl", "--no-pager", "-o", "short-monotonic", "-n", "150"},
				{"bash", "-c", "head -c 2000 /var/log/pods/*/*/*.log"},
				{installed, "status"},
			} {
				out, err := command(args...)
				t.Logf("%s: %v\n%s", strings.Join(args, " "), err, out)
			}
		}
	})
	n.client = must.Get(cri.Dial(socket, "/var/log/pods"))(t)
	t.Cleanup(func() { must.Do(t, n.client.Close()) })
	wait(t, func() error { return n.client.NetworkReady(t.Context()) })
	return n
}

// versions are those of what runs pods.
func versions() (string, error) {
	var all []string
	for _, name := range []string{"kubelet", "containerd", "runc"} {
		said, err := command(name, "--version")
		if err != nil {
			return "", err
		}
		all = append(all, name+" "+number.FindString(said))
	}
	said, err := command("systemctl", "--version") // starts with "systemd 257 ("
	return strings.Join(append(all, strings.Join(strings.Fields(said)[:2], " ")), ", "), err
}

// number is a version in what a program says of itself, after its name.
var number = regexp.MustCompile(`\bv?\d+\.\d+[^ \n]*`)

// works says for docs/support.md what the test has seen so far.
func (n *node) works(what string) {
	if !n.t.Failed() {
		n.t.Attr(report.AttrWorks, what)
	}
}

// service starts a service, and stops it at the end of the test.
func (n *node) service(name string) {
	n.t.Helper()
	must.Get(command("systemctl", "start", name))(n.t)
	n.t.Cleanup(func() { must.Get(command("systemctl", "stop", name))(n.t) })
}

// A pod is one that the kubelet has made.
type pod struct {
	n         *node
	name      string
	container *cri.Container
	ip        string
}

// pod waits for a pod of the namespace default to run.
func (n *node) pod(name string) *pod {
	n.t.Helper()
	p := &pod{n: n, name: name}
	wait(n.t, func() (err error) {
		if p.container, err = n.client.Find(n.t.Context(), "default", name, "peer"); err != nil {
			return err
		}
		addrs, err := p.container.Pod.Addresses(n.t.Context())
		if err == nil && (len(addrs) == 0 || addrs[0] == "") {
			err = errors.New("no address")
		}
		if err == nil {
			p.ip = addrs[0]
		}
		return err
	})
	return p
}

// run runs the image's program in the pod.
func (p *pod) run(result any, args ...string) error {
	ctx, cancel := context.WithTimeout(p.n.t.Context(), patience)
	defer cancel()
	return p.container.Run(ctx, result, append([]string{"/peer"}, args...)...)
}
