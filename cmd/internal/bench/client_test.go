package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/node"
)

// nobody is who the programs run as that need no privileges.
const nobody = 65534

// A podPair is two pods of a node, as the manifest makes them.
type podPair struct {
	node           *node.Node
	server, client *node.Pod
}

// newPodPair makes pods whose annotations exclude a port.
func newPodPair(t *testing.T, annotations map[string]string) *podPair {
	t.Helper()
	n := node.ForTest(t, node.Options{Plugins: map[string]string{node.PluginType: filepath.Join(node.ProgramDir(), "skipstack")}})
	list, err := n.Network(node.Network{Skipstack: map[string]any{}})
	if err != nil {
		t.Fatal(err)
	}
	p := &podPair{node: n}
	for name, pod := range map[string]**node.Pod{"server": &p.server, "client": &p.client} {
		if *pod, err = n.AddPod(t.Context(), name, list, node.PodOptions{Annotations: annotations}); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// waitOpen waits until the kernel's verdict has opened the node's gate, and the pods that
// an ADD had no time for are attached, too.
func (p *podPair) waitOpen(t *testing.T) {
	t.Helper()
	eventually(t, "the node's gate opens", func() error {
		set, err := datapath.Open(p.node.BPFFS)
		if err != nil {
			return err
		}
		defer set.Close()
		settings, err := set.Node()
		if err == nil && !settings.Open {
			err = errors.New("it is closed")
		}
		return err
	})
	eventually(t, "the pods are attached", func() error {
		records, err := attachment.NewStore(p.node.RunDir).List()
		if err != nil || len(records) != 2 {
			return fmt.Errorf("records %+v, %v", records, err)
		}
		for _, r := range records {
			if r.Status != attachment.Attached {
				return fmt.Errorf("%s: %s (%s)", r.PodName, r.Status, r.Reason)
			}
		}
		return nil
	})
}

// eventually waits for f to succeed.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for err := f(); err != nil; err = f() {
		if time.Now().After(deadline) {
			t.Fatalf("not in a minute: %s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// inPod starts `skipstack bench` in a pod, as a user without privileges.
func inPod(t *testing.T, pod *node.Pod, args ...string) (p *node.Process, out, errs *lockedBuffer) {
	t.Helper()
	// The pod's processes are started by the fixture, which sets SysProcAttr:
	// setpriv becomes the user.
	cmd := exec.Command("setpriv", append([]string{
		fmt.Sprintf("--reuid=%d", nobody), fmt.Sprintf("--regid=%d", nobody), "--clear-groups", "--bounding-set=-all", "--no-new-privs",
		filepath.Join(node.ProgramDir(), "skipstack"), "bench"}, args...)...)
	out, errs = &lockedBuffer{}, &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = out, errs
	p, err := pod.Start(cmd, node.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p, out, errs
}

func (p *podPair) serve(t *testing.T, args ...string) (*node.Process, *lockedBuffer) {
	t.Helper()
	server, _, said := inPod(t, p.server, append([]string{"serve"}, args...)...)
	return server, said
}

// exitCode waits for a process.
func exitCode(p *node.Process) int {
	err := p.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

var on = map[string]string{"skipstack/mode": "on", "skipstack/exclude-ports": fmt.Sprint(DefaultPlainPort)}

// manifestJobs are the two Jobs of the sample, the server's and the client's.
func manifestJobs(t *testing.T) (jobs [2]corev1.PodTemplateSpec) {
	t.Helper()
	file, err := os.ReadFile("../../../conf/bench-jobs.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for i, document := range bytes.Split(file, []byte("\n---\n"))[1:] {
		var job batchv1.Job
		if err := yaml.UnmarshalStrict(document, &job); err != nil {
			t.Fatal(err)
		}
		jobs[i] = job.Spec.Template
	}
	return jobs
}

// TestTwoPods runs what the manifest says, but for the name of the server.
func TestTwoPods(t *testing.T) {
	node.Need(t)
	jobs := manifestJobs(t)
	p := newPodPair(t, jobs[0].Annotations)
	p.waitOpen(t)
	args := func(i int) []string {
		args := jobs[i].Spec.Containers[0].Args
		if args[0] != "bench" {
			t.Fatalf("arguments %v", args)
		}
		return args[1:]
	}
	server, _, served := inPod(t, p.server, args(0)...)
	addr, _ := p.server.Addr(false)
	client, out, said := inPod(t, p.client, append(args(1), "--target="+addr.String(), "--json=-", "--max-pairs=5")...)
	if code := exitCode(client); code != ExitProven {
		t.Fatalf("the client ends with %d:\n%s\nthe server said:\n%s", code, said, served)
	}
	if code := exitCode(server); code != 0 {
		t.Errorf("the server ends with %d: %s", code, served)
	}
	t.Log(said)
	var got Report
	if err := json.Unmarshal([]byte(out.String()), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Points) < 7 || got.Header.Verified == 0 {
		t.Errorf("%d points, %d bytes verified", len(got.Points), got.Header.Verified)
	}
	for _, r := range got.Points {
		if r.Path != PodIP || r.Proof == Failed || r.PayloadBytes == 0 || r.RedirectedBytes+r.TCPBytes < r.PayloadBytes {
			t.Errorf("%+v", r)
		}
	}
}

// podClient is a client of few points, as a worker in a pod; its arguments are the
// target and how long a run takes.
func podClient(args []string) int {
	o := clientOf(ports{DefaultPort, DefaultPlainPort})
	o.target = args[0]
	ctx := context.Background()
	s, err := newPodSite(ctx, o, node.WorkerCommand("bench"), os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer s.close()
	p := Parameters{Repeats: minRepeats, MaxPairs: minRepeats, WarmUp: time.Millisecond, Length: minLength, NonBlocking: true}
	report, err := s.measure(ctx, p, func(path Path, _ int) []Point {
		all := podPoints(path, 1)
		return []Point{all[0], all[len(all)-1]}
	}, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		return 1
	}
	return 0
}

// measure runs podClient in the client's pod; meanwhile is called when it runs.
func (p *podPair) measure(t *testing.T, target string, said io.Writer, meanwhile func()) (Report, int) {
	t.Helper()
	cmd := node.WorkerCommand("client", target)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, said
	proc, err := p.client.Start(cmd, node.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	meanwhile()
	code := exitCode(proc)
	var report Report
	if code == 0 {
		if err := json.Unmarshal(out.Bytes(), &report); err != nil {
			t.Fatal(err)
		}
	}
	return report, code
}

func TestTwoPodsPaths(t *testing.T) {
	node.Need(t)
	p := newPodPair(t, on)
	p.waitOpen(t)
	p.serve(t)
	ipv4, _ := p.server.Addr(false)
	ipv6, _ := p.server.Addr(true)
	service := netip.MustParseAddr(serviceAddr)
	if _, err := p.node.AddService(node.ServiceOptions{IP: service, Backend: ipv4, Masquerade: !p.node.HasBridgeNetfilter()}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		target netip.Addr
		want   Path
	}{{ipv4, PodIP}, {ipv6, IPv6}, {service, ServiceIP}} {
		var said lockedBuffer
		report, code := p.measure(t, c.target.String(), &said, func() {})
		if code != 0 || !report.Proven() {
			t.Errorf("%s: exit code %d, not proven: %s", c.target, code, said.String())
			continue
		}
		if report.Points[0].Path != c.want {
			t.Errorf("%s: path %s, want %s", c.target, report.Points[0].Path, c.want)
		}
	}
}

// TestTwoPodsWrong has pods for which there is nothing to prove.
func TestTwoPodsWrong(t *testing.T) {
	node.Need(t)
	for _, c := range []struct {
		name        string
		annotations map[string]string
		off         bool
		want        string
	}{
		{"secretly off", on, true, "the bypass is not proven"},
		{"pods with mode off", map[string]string{"skipstack/mode": "off"}, false, "the bypass is not proven"},
		{"no port is excluded", map[string]string{"skipstack/mode": "on"}, false, `skipstack/exclude-ports: "7412"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPodPair(t, c.annotations)
			if c.annotations["skipstack/mode"] == "on" {
				p.waitOpen(t)
			}
			if c.off {
				closeGate(t, p.node.BPFFS)
			}
			p.serve(t)
			addr, _ := p.server.Addr(false)
			client, out, said := inPod(t, p.client, "client", "--target", addr.String())
			if code := exitCode(client); code != ExitNotProven {
				t.Errorf("exit code %d", code)
			}
			if all := said.String() + out.String(); !strings.Contains(all, c.want) || strings.Contains(all, "proven for every point") {
				t.Errorf("it says %s", all)
			}
		})
	}
}

func TestTwoPodsSwitchedOffMeanwhile(t *testing.T) {
	node.Need(t)
	p := newPodPair(t, on)
	p.waitOpen(t)
	p.serve(t)
	addr, _ := p.server.Addr(false)
	var said lockedBuffer
	report, code := p.measure(t, addr.String(), &said, func() {
		eventually(t, "the data is verified", func() error {
			if !strings.Contains(said.String(), "data verified") {
				return errors.New(said.String())
			}
			return nil
		})
		closeGate(t, p.node.BPFFS)
	})
	if code != 0 || report.Proven() {
		t.Fatalf("exit code %d, proven %v: %s", code, report.Proven(), said.String())
	}
	var text bytes.Buffer
	if err := report.writePodText(&text, ports{DefaultPort, DefaultPlainPort}); err != nil || !strings.Contains(text.String(), "NOT PROVEN: ") || strings.Contains(text.String(), "proven for every") {
		t.Errorf("%v, it says %s", err, text.String())
	}
}

func TestClientAndServerUsage(t *testing.T) {
	node.Need(t)
	for _, c := range []struct{ args, want string }{
		{"client", "--target"},
		{"client --target=", "--target"},
		{"client --target=host:80", "without a port"},
		{"client --target=[::1]:80", "without a port"},
		{"client --target=fe80::1%eth0", "link-local"},
		{"client --target=h --port=0", "1 to 65535"},
		{"client --target=h --port=65536", "invalid argument"},
		{"client --target=h --port=5 --plain-port=5", "both 5"},
		{"client --target=h --repeats=4", "5 to 50"},
		{"client --target=h --repeats=51", "5 to 50"},
		{"client --target=h --max-pairs=4", "--max-pairs 4: it is --repeats, here 5, to 50"},
		{"client --target=h --max-pairs=51", "to 50"},
		{"client --target=h --wait=-1s", "negative"},
		{"client --target=h --json=", "--json is empty"},
		{"client --target=h --json=/nonexistent/x", "not writable"},
		{"client host", "host"},
		{"serve --wait=-1s", "negative"},
		{"serve --port=7412", "both 7412"},
		{"serve x", "x"},
	} {
		cmd := program(strings.Fields(c.args)...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != ExitUsage || !strings.Contains(string(out), c.want) {
			t.Errorf("%s: %v, %s", c.args, err, out)
		}
	}
}
