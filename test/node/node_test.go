package node_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/node"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	os.Exit(node.Main(m, node.MainOptions{
		Workers: map[string]node.Worker{
			"echo": echoWorker, "ask": askWorker, "describe": describeWorker, "wait": waitWorker,
			"isolate": isolateWorker, "private": privateWorker, "rto": rtoWorker,
		},
		Tools: []string{"bridge", "ptp", "host-local"},
	}))
}

// echoWorker listens on an address, prints it, and answers every connection with the
// peer's address and what the peer sent.
func echoWorker(args []string) int {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(l.Addr())
	for {
		c, err := l.Accept()
		if err != nil {
			return 1
		}
		go func() {
			defer c.Close()
			line, _ := bufio.NewReader(c).ReadString('\n')
			fmt.Fprintf(c, "%s %s", c.RemoteAddr().(*net.TCPAddr).IP, line)
		}()
	}
}

const (
	patience = time.Minute     // for an answer
	watch    = 3 * time.Second // where none is expected
)

// askWorker sends a word to an echoWorker and prints the answer.
func askWorker(args []string) int {
	wait, err := time.ParseDuration(args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	c, err := net.DialTimeout("tcp", args[0], wait)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(wait))
	fmt.Fprintln(c, args[1])
	if _, err := io.Copy(os.Stdout, c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// rtoWorker asks an echoWorker and prints after how many microseconds TCP would send
// again what is lost.
func rtoWorker(args []string) int {
	c, err := net.DialTimeout("tcp", args[0], patience)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintln(c, "hello")
	_, err = bufio.NewReader(c).ReadString('\n')
	raw, rawErr := c.(*net.TCPConn).SyscallConn()
	if err = errors.Join(err, rawErr); err == nil {
		err = raw.Control(func(fd uintptr) {
			info, infoErr := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			if err = infoErr; err == nil {
				fmt.Println(info.Rto)
			}
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

type description struct{ Cgroup, NetNS, CPUs string }

func describeWorker([]string) int {
	cgroup, _ := os.ReadFile("/proc/self/cgroup")
	ns, _ := os.Readlink("/proc/self/ns/net")
	status, _ := os.ReadFile("/proc/self/status")
	_, cpus, _ := strings.Cut(string(status), "Cpus_allowed_list:\t")
	cpus, _, _ = strings.Cut(cpus, "\n")
	_, v2, _ := strings.Cut(string(cgroup), "0::")
	_ = json.NewEncoder(os.Stdout).Encode(description{strings.TrimSpace(v2), ns, cpus})
	return 0
}

func waitWorker([]string) int {
	fmt.Println("ready")
	select {}
}

// start starts a worker in a pod and returns its first line of output.
func start(t *testing.T, p *node.Pod, o node.StartOptions, name string, args ...string) (string, *node.Process) {
	t.Helper()
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := node.WorkerCommand(name, args...)
	cmd.Stdout = w
	proc, err := p.Start(cmd, o)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("worker %s: %v, %v", name, err, proc.Wait())
	}
	return strings.TrimSpace(line), proc
}

// ask sends a word from a pod and returns who the server saw and what it sent back.
func ask(t *testing.T, from *node.Pod, to string) string {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := node.WorkerCommand("ask", to, "hello", patience.String())
	cmd.Stdout, cmd.Stderr = &out, &errs
	proc, err := from.Start(cmd, node.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := proc.Wait(); err != nil {
		t.Fatalf("ask %s: %v: %s", to, err, errs.String())
	}
	return strings.TrimSpace(out.String())
}

func twoPods(t *testing.T, n *node.Node, w node.Network) (a, b *node.Pod) {
	t.Helper()
	list, err := n.Network(w)
	if err != nil {
		t.Fatal(err)
	}
	var pods [2]*node.Pod
	for i := range pods {
		if pods[i], err = n.AddPod(t.Context(), fmt.Sprintf("pod-%d", i), list, node.PodOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return pods[0], pods[1]
}

func addr(t *testing.T, p *node.Pod, ipv6 bool) netip.Addr {
	t.Helper()
	a, ok := p.Addr(ipv6)
	if !ok {
		t.Fatalf("pod %s has no address, IPv6 %v", p.Name, ipv6)
	}
	return a
}

func TestPodsTalk(t *testing.T) {
	for _, plugin := range []string{"bridge", "ptp"} {
		t.Run(plugin, func(t *testing.T) {
			n := node.ForTest(t, node.Options{})
			client, server := twoPods(t, n, node.Network{Plugin: plugin})
			start(t, server, node.StartOptions{}, "echo", ":8080")
			for _, ipv6 := range []bool{false, true} {
				want := addr(t, client, ipv6).String() + " hello"
				if got := ask(t, client, netip.AddrPortFrom(addr(t, server, ipv6), 8080).String()); got != want {
					t.Errorf("IPv6 %v: got %q, want %q", ipv6, got, want)
				}
			}
		})
	}
}

func TestExtraAddress(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	client, server := twoPods(t, n, node.Network{Subnets: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}})
	for p, a := range map[*node.Pod]string{client: "fd00:1::1/64", server: "fd00:1::2/64"} {
		if err := p.AddAddr(node.IfName, netip.MustParsePrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	start(t, server, node.StartOptions{}, "echo", ":8080")
	if got, want := ask(t, client, "[fd00:1::2]:8080"), "fd00:1::1 hello"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TCP sends again after the time that was set, between pods and over loopback, and
// after 200 ms before.
func TestMinRTO(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	client, server := twoPods(t, n, node.Network{})
	start(t, server, node.StartOptions{}, "echo", ":8080")
	start(t, client, node.StartOptions{}, "echo", ":8080")
	far, loopback := netip.AddrPortFrom(addr(t, server, false), 8080).String(), "127.0.0.1:8080"
	rto := func(to string) time.Duration {
		line, proc := start(t, client, node.StartOptions{}, "rto", to)
		var us int
		if _, err := fmt.Sscan(line, &us); err != nil || proc.Wait() != nil {
			t.Fatalf("%q: %v", line, err)
		}
		return time.Duration(us) * time.Microsecond
	}
	for _, to := range []string{far, loopback} {
		if got := rto(to); got < 200*time.Millisecond {
			t.Errorf("to %s: %s before anything was set", to, got)
		}
	}
	if err := client.SetMinRTO(5 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{far, loopback} {
		// On a busy machine the round trip itself may take long.
		for deadline := time.Now().Add(time.Minute); ; {
			got := rto(to)
			if got < 100*time.Millisecond {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("to %s: %s, want little more than 5 ms", to, got)
				break
			}
		}
	}
}

func TestService(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	client, server := twoPods(t, n, node.Network{})
	start(t, server, node.StartOptions{}, "echo", ":8080")
	for _, c := range []struct {
		name, ip    string
		port, back  uint16
		masquerade  bool
		seenAsPodIP bool
	}{
		{"dnat", "10.96.0.1", 80, 8080, false, true},
		{"dnat ipv6", "fd00:96::1", 80, 8080, false, true},
		{"masquerade", "10.96.0.2", 80, 8080, true, false},
		{"masquerade ipv6", "fd00:96::2", 80, 8080, true, false},
		{"all ports", "10.96.0.3", 0, 0, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !c.masquerade && !n.HasBridgeNetfilter() {
				t.Skip("needs br_netfilter: DNAT between pods of one bridge")
			}
			ip := netip.MustParseAddr(c.ip)
			s, err := n.AddService(node.ServiceOptions{IP: ip, Port: c.port, Backend: addr(t, server, ip.Is6()), BackendPort: c.back, Masquerade: c.masquerade})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}()
			port := c.port
			if port == 0 {
				port = 8080
			}
			seen, word, _ := strings.Cut(ask(t, client, netip.AddrPortFrom(ip, port).String()), " ")
			if word != "hello" {
				t.Errorf("answer %q", word)
			}
			if (seen == addr(t, client, ip.Is6()).String()) != c.seenAsPodIP {
				t.Errorf("the server saw %s", seen)
			}
		})
	}
}

func TestRedirect(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	client, server := twoPods(t, n, node.Network{})
	start(t, server, node.StartOptions{}, "echo", ":15001")
	start(t, client, node.StartOptions{}, "echo", ":15001")
	for _, ipv6 := range []bool{false, true} {
		if _, err := server.Redirect(ipv6, false, 80, 15001); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Redirect(ipv6, true, 81, 15001); err != nil {
			t.Fatal(err)
		}
		own, other := addr(t, client, ipv6), addr(t, server, ipv6)
		if got, want := ask(t, client, netip.AddrPortFrom(other, 80).String()), own.String()+" hello"; got != want {
			t.Errorf("inbound, IPv6 %v: got %q, want %q", ipv6, got, want)
		}
		// Nobody listens on port 81 of the other pod: the answer is the sidecar's.
		if got := ask(t, client, netip.AddrPortFrom(other, 81).String()); !strings.HasSuffix(got, " hello") {
			t.Errorf("outbound, IPv6 %v: got %q", ipv6, got)
		}
	}
}

func TestProcessIsBornInPod(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	p, err := n.NewPod("p", node.PodOptions{UID: "0e1f", Cgroup: "kubepods.slice/kubepods-pod0e1f.slice"})
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(n.CgroupRoot, "kubepods.slice/kubepods-pod0e1f.slice"); p.Cgroup != want {
		t.Errorf("pod cgroup %s, want %s", p.Cgroup, want)
	}
	var ns string
	if err := p.Do(func() (err error) { ns, err = os.Readlink("/proc/thread-self/ns/net"); return err }); err != nil {
		t.Fatal(err)
	}
	plain, err := n.Cgroup("plain/a")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		o      node.StartOptions
		cgroup string
	}{
		{node.StartOptions{CPU: 1}, p.ContainerCgroup},
		{node.StartOptions{Cgroup: plain}, plain},
	} {
		line, proc := start(t, p, c.o, "describe")
		if err := proc.Wait(); err != nil {
			t.Fatal(err)
		}
		var got description
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(c.cgroup, got.Cgroup) || len(got.Cgroup) < 2 {
			t.Errorf("cgroup %s, want %s", got.Cgroup, c.cgroup)
		}
		if got.NetNS != ns {
			t.Errorf("network namespace %s, want %s", got.NetNS, ns)
		}
		if c.o.CPU == 1 && got.CPUs != "0" {
			t.Errorf("CPUs %s, want 0", got.CPUs)
		}
		if home, _ := os.Readlink("/proc/self/ns/net"); home == ns {
			t.Error("the pod has the network namespace of the test")
		}
	}
}

func TestNodesAreApart(t *testing.T) {
	subnets := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("10.2.0.0/24")}
	subnets6 := []netip.Prefix{netip.MustParsePrefix("fd00:1::/64"), netip.MustParsePrefix("fd00:2::/64")}
	var nodes []*node.Node
	var pods []*node.Pod
	for i := range subnets {
		n := node.ForTest(t, node.Options{})
		list, err := n.Network(node.Network{Subnets: []netip.Prefix{subnets[i], subnets6[i]}})
		if err != nil {
			t.Fatal(err)
		}
		p, err := n.AddPod(t.Context(), "p", list, node.PodOptions{})
		if err != nil {
			t.Fatal(err)
		}
		nodes, pods = append(nodes, n), append(pods, p)
	}
	start(t, pods[1], node.StartOptions{}, "echo", ":8080")
	target := netip.AddrPortFrom(addr(t, pods[1], false), 8080).String()
	cmd := node.WorkerCommand("ask", target, "hello", watch.String())
	cmd.Stderr = nil
	proc, err := pods[0].Start(cmd, node.StartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if proc.Wait() == nil {
		t.Error("pods of nodes that are not connected talk")
	}
	err = node.Connect(nodes[0], nodes[1], []netip.Prefix{subnets[0], subnets6[0]}, []netip.Prefix{subnets[1], subnets6[1]})
	if err != nil {
		t.Fatal(err)
	}
	for _, ipv6 := range []bool{false, true} {
		want := addr(t, pods[0], ipv6).String() + " hello"
		if got := ask(t, pods[0], netip.AddrPortFrom(addr(t, pods[1], ipv6), 8080).String()); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestVerbs(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	list, err := n.Network(node.Network{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := n.NewPod("p", node.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if err := p.Check(ctx, list, node.IfName); err == nil {
		t.Error("CHECK before ADD succeeds")
	}
	if _, err := p.Add(ctx, list, node.IfName); err != nil {
		t.Fatal(err)
	}
	if err := p.Check(ctx, list, node.IfName); err != nil {
		t.Error(err)
	}
	if left, err := n.Leftovers(); err != nil || !slices.ContainsFunc(left, func(s string) bool { return strings.HasPrefix(s, "link: veth") }) {
		t.Errorf("with a pod attached, Leftovers says %q, %v", left, err)
	}
	for range 3 {
		if err := p.Del(ctx, list, node.IfName); err != nil {
			t.Error(err)
		}
	}
	missing, err := n.Network(node.Network{Plugin: "missing"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Add(ctx, missing, node.IfName); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("ADD with a missing plugin: %v", err)
	}
}

// TestAddIsInterrupted: an interrupted ADD does not wait for what the plugin has started.
func TestAddIsInterrupted(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\n[ $CNI_COMMAND = ADD ] || exit 0\nsleep 1000 &\necho $! > " + dir + "/new && mv " + dir + "/new " + dir + "/child\nwait\n"
	if err := os.WriteFile(filepath.Join(dir, "slow"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	n := node.ForTest(t, node.Options{PluginDirs: []string{dir}})
	list, err := n.Conflist([]byte(`{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "slow"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	p, err := n.NewPod("pod", node.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	added := make(chan error, 1)
	go func() {
		_, err := p.Add(ctx, list, node.IfName)
		added <- err
	}()
	var child int
	for deadline := time.Now().Add(time.Minute); child == 0; time.Sleep(5 * time.Millisecond) {
		if text, err := os.ReadFile(filepath.Join(dir, "child")); err == nil {
			if _, err := fmt.Sscan(string(text), &child); err != nil {
				t.Fatal(err)
			}
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	cancel()
	kill := func() error { return unix.Kill(child, unix.SIGKILL) }
	select {
	case err := <-added:
		if err == nil {
			t.Error("an interrupted ADD succeeds")
		}
		if err := kill(); err != nil {
			t.Error(err)
		}
	case <-time.After(2 * time.Minute):
		t.Errorf("ADD still waits (%v)", kill())
		<-added
	}
}

func TestConflist(t *testing.T) {
	const file = `{"cniVersion": "1.0.0", "name": "x", "plugins": [
		{"type": "bridge", "ipam": {"type": "host-local", "subnet": "10.1.0.0/24"}},
		{"type": "skipstack", "runDir": "/elsewhere", "mode": "auto"}]}`
	n := node.ForTest(t, node.Options{})
	list, err := n.Conflist([]byte(file))
	if err != nil {
		t.Fatal(err)
	}
	var own struct{ RunDir, BPFFS, CgroupRoot, Mode string }
	if err := json.Unmarshal(list.Plugins[1].Bytes, &own); err != nil {
		t.Fatal(err)
	}
	if own.RunDir != "/elsewhere" || own.BPFFS != n.BPFFS || own.CgroupRoot != n.CgroupRoot || own.Mode != "auto" {
		t.Errorf("skipstack's entry is %+v", own)
	}
	plain, err := node.WithoutSkipstack(list)
	if err != nil {
		t.Fatal(err)
	}
	if len(plain.Plugins) != 1 || !bytes.Contains(plain.Plugins[0].Bytes, []byte(n.IPAMDir)) {
		t.Errorf("without skipstack: %s", plain.Bytes)
	}

	d := node.ForTest(t, node.Options{DefaultPaths: true})
	if list, err = d.Conflist([]byte(file)); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(list.Plugins[1].Bytes, []byte("bpffs")) {
		t.Errorf("skipstack's entry was changed on a node with default paths: %s", list.Plugins[1].Bytes)
	}
	if second, err := node.New(node.Options{DefaultPaths: true}); err == nil {
		t.Error("two nodes have the default paths", second.Close())
	}
}

// TestLeftoversAreSeen plants one thing of each kind that Machine.Leftovers looks for.
func TestLeftoversAreSeen(t *testing.T) {
	node.Need(t)
	out, err := isolated(t, "plant").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"process", "mount", "link", "cgroup", "pin", "file", "network namespace"} {
		if !strings.Contains(string(out), kind+": ") {
			t.Errorf("a %s was left and not seen; seen:\n%s", kind, out)
		}
	}
}

// TestIsolateCleansUp ends the isolated program, or the one that started it, in several
// ways while a pod with a process exists. Nothing may be left after it,
// or, if the owner was killed, after the next Isolate.
func TestIsolateCleansUp(t *testing.T) {
	node.Need(t)
	for _, c := range []struct {
		name        string
		signal      syscall.Signal
		toChild     bool
		mode        string
		wantExit    int
		leftoversOK bool
	}{
		{name: "SIGTERM", signal: unix.SIGTERM, mode: "graceful", wantExit: 7},
		{name: "SIGINT", signal: unix.SIGINT, mode: "graceful", wantExit: 7},
		{name: "careless program", signal: unix.SIGTERM, mode: "careless", wantExit: 2},
		{name: "program killed", signal: unix.SIGKILL, toChild: true, mode: "graceful", wantExit: 128 + 9},
		{name: "owner killed", signal: unix.SIGKILL, mode: "graceful", wantExit: -1, leftoversOK: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := isolated(t, c.mode)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
				t.Fatalf("isolated program said %q, %v", line, err)
			}
			target := cmd.Process.Pid
			if c.toChild {
				target = childOf(t, target)
			}
			if err := unix.Kill(target, c.signal); err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, out) // until every holder of the pipe is gone
			_ = cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != c.wantExit {
				t.Errorf("exit code %d, want %d", got, c.wantExit)
			}
			if c.leftoversOK {
				if len(privateCgroups(t)) == 0 {
					t.Error("nothing was left by a killed owner: this test does not test the sweep")
				}
				if err := isolated(t, "nothing").Run(); err != nil {
					t.Fatal(err)
				}
			}
			if left := privateCgroups(t); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// TestSweepSparesTheLiving runs a second isolated program beside a first.
func TestSweepSparesTheLiving(t *testing.T) {
	node.Need(t)
	first := isolated(t, "graceful")
	out, err := first.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	before := privateCgroups(t)
	if err := isolated(t, "nothing").Run(); err != nil {
		t.Error(err)
	}
	if after := privateCgroups(t); !slices.Equal(before, after) || len(after) != 1 {
		t.Errorf("cgroups of the first: %v before, %v after the second", before, after)
	}
	_ = first.Process.Signal(unix.SIGTERM)
	_, _ = io.Copy(io.Discard, out)
	_ = first.Wait()
}

func isolated(t *testing.T, mode string) *exec.Cmd {
	cmd := node.WorkerCommand("isolate", mode)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// isolateWorker calls Isolate on privateWorker.
func isolateWorker(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	env := append(node.WorkerCommand("private").Env, "GOTRACEBACK=none")
	exit, err := node.Isolate(ctx, node.Command{Args: args, Env: env, Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 99
	}
	return exit
}

func privateWorker(args []string) int {
	machine, err := node.Prepare()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 98
	}
	if args[0] == "nothing" {
		return 0
	}
	ctx := context.Background()
	if args[0] != "careless" {
		var stop func()
		ctx, stop = signal.NotifyContext(ctx, unix.SIGTERM)
		defer stop()
	}
	n, err := node.New(node.Options{})
	if err == nil {
		err = populate(n)
	}
	if err == nil && args[0] == "plant" {
		err = plant()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 97
	}
	if args[0] == "plant" {
		machine.Patience = time.Second
		left, err := machine.Leftovers()
		fmt.Println(strings.Join(left, "\n"), err)
		return 0
	}
	fmt.Println("ready")
	<-ctx.Done()
	if err := n.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 96
	}
	if left, err := machine.Leftovers(); err != nil || len(left) > 0 {
		fmt.Fprintln(os.Stderr, left, err)
		return 95
	}
	return 7
}

// populate makes a pod with a process in it.
func populate(n *node.Node) error {
	list, err := n.Network(node.Network{})
	if err != nil {
		return err
	}
	p, err := n.AddPod(context.Background(), "p", list, node.PodOptions{})
	if err != nil {
		return err
	}
	_, err = p.Start(node.WorkerCommand("wait"), node.StartOptions{})
	return err
}

// plant leaves what populate does not.
func plant() error {
	if err := os.Mkdir("/sys/fs/bpf/pin", 0o700); err != nil {
		return err
	}
	return exec.Command("ip", "link", "add", "planted", "type", "veth").Run()
}

func childOf(t *testing.T, pid int) int {
	t.Helper()
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	var child int
	if _, err := fmt.Sscan(string(children), &child); err != nil {
		// The child was started by another thread than the main one.
		found, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if text, err := os.ReadFile(f); err == nil {
				if _, err := fmt.Sscan(string(text), &child); err == nil {
					return child
				}
			}
		}
		t.Fatalf("process %d has no child", pid)
	}
	return child
}

// privateCgroups lists the cgroups that Isolate made below the root.
func privateCgroups(t *testing.T) []string {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if found, err := filepath.Glob(root + "/skipstack-node-*"); err == nil && len(found) > 0 {
			return found
		}
	}
	return nil
}
