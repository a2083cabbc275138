package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/skipstack/skipstack/test/node"
)

// An experiment is one that the bench has, too.
type experiment struct {
	tool, name, unit string
	messageBytes     int      // of a stream
	bench            []string // arguments of skipstack bench for the same
	port             int
	server           []string
	client           func(server netip.Addr) []string
	parse            func(output []byte) (rate, messages float64, err error)
}

const (
	iperfPort    = 5201
	sockperfPort = 11111
)

var experiments = []experiment{iperf(64 << 10), iperf(4 << 10), sockperf}

// iperf streams messages of a size one way; the result is what the server received.
func iperf(bytes int) experiment {
	return experiment{
		tool: "iperf3", name: fmt.Sprintf("stream %d KiB", bytes>>10), unit: "bytes/s", messageBytes: bytes, port: iperfPort,
		bench:  []string{"--tests=stream", "--sizes=" + strconv.Itoa(bytes)},
		server: []string{"-4", "-s", "-1"},
		client: func(server netip.Addr) []string {
			return []string{"-c", server.String(), "-t", "1", "-l", strconv.Itoa(bytes), "-J"}
		},
		parse: func(output []byte) (rate, messages float64, err error) {
			var report struct {
				End struct {
					Received struct {
						Bits  float64 `json:"bits_per_second"`
						Bytes float64 `json:"bytes"`
					} `json:"sum_received"`
				}
				Error string
			}
			if err := json.Unmarshal(output, &report); err != nil {
				return 0, 0, err
			}
			if report.Error != "" || report.End.Received.Bits == 0 {
				return 0, 0, fmt.Errorf("iperf3 says %q, %v bit/s", report.Error, report.End.Received.Bits)
			}
			return report.End.Received.Bits / 8, report.End.Received.Bytes / float64(bytes), nil
		},
	}
}

// sockperf exchanges 64 bytes each way at a time. It says half the mean round trip.
var sockperf = experiment{
	tool: "sockperf", name: "rr 64/64 B", unit: "transactions/s", port: sockperfPort,
	bench:  []string{"--tests=rr", "--sizes=64"},
	server: []string{"server", "--tcp", "-i", "0.0.0.0", "-p", strconv.Itoa(sockperfPort)},
	client: func(server netip.Addr) []string {
		return []string{"ping-pong", "--tcp", "-i", server.String(), "-p", strconv.Itoa(sockperfPort), "-m", "64", "-t", "1"}
	},
	parse: func(output []byte) (rate, messages float64, err error) {
		m, sent := half.FindSubmatch(output), sentMessages.FindSubmatch(output)
		if m == nil || sent == nil {
			return 0, 0, fmt.Errorf("sockperf names no latency, or no messages: %s", output)
		}
		usec, err := strconv.ParseFloat(string(m[1]), 64)
		if err != nil || usec <= 0 {
			return 0, 0, fmt.Errorf("a latency of %s: %w", m[1], err)
		}
		messages, err = strconv.ParseFloat(string(sent[1]), 64)
		return 1e6 / (2 * usec), messages, err
	},
}

var half = regexp.MustCompile(`Latency is (?:\x1b\[[0-9;]*m)*([0-9.]+) usec`)

// sentMessages are all; a line before it has those of the time that counts.
var sentMessages = regexp.MustCompile(`\[Total Run\].*SentMessages=([0-9]+)`)

// A pair is two pods of a private node, both accelerated for processes in their cgroups.
type pair struct {
	node           *node.Node
	client, server *node.Pod
	root           string
	env            []string
}

func newPair(ctx context.Context, root, congestion string) (p *pair, err error) {
	p = &pair{root: root, env: environment(root)}
	if p.node, err = node.New(node.Options{Name: "loadtools", Log: os.Stderr}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.node.Close())
		}
	}()
	// The tools block, and do not splice.
	list, err := p.node.Network(node.Network{Skipstack: map[string]any{"mode": "on", "acceptRisks": []string{"splice", "blocking"}}})
	if err != nil {
		return nil, err
	}
	if p.server, err = p.node.AddPod(ctx, "server", list, node.PodOptions{}); err != nil {
		return nil, err
	}
	if p.client, err = p.node.AddPod(ctx, "client", list, node.PodOptions{}); err != nil {
		return nil, err
	}
	for _, pod := range []*node.Pod{p.server, p.client} {
		if congestion == "" {
			break
		}
		err = pod.Do(func() error {
			return os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte(congestion), 0)
		})
		if err != nil {
			return nil, fmt.Errorf("set the congestion control %s: %w", congestion, err)
		}
	}
	return p, p.waitForGate(ctx)
}

// command is a tool's with arguments.
func (p *pair) command(tool string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(p.root, "usr/bin", tool), args...)
	if _, err := os.Stat(cmd.Path); err != nil { // installed on the machine
		cmd = exec.Command(tool, args...)
	}
	cmd.Env = p.env
	return cmd
}

func (p *pair) version(ctx context.Context, tool string) (string, error) {
	out, err := p.command(tool, "--version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w: %s", tool, err, out)
	}
	m := regexp.MustCompile(`\d+\.\d+[\d.]*`).Find(out)
	return tool + " " + string(m), nil
}

// A sample is what one run of a tool gave.
type sample struct {
	rate float64
	cpu  float64 // seconds of CPU time for each message, both sides
	user float64 // the part of it in user mode
}

// run runs a tool's server and client on the last CPU.
func (p *pair) run(ctx context.Context, e experiment, accelerated bool) (s sample, err error) {
	serving, server, err := p.start(p.server, e, accelerated, nil, e.server)
	if err != nil {
		return s, err
	}
	client, rate, messages, err := p.drive(ctx, e, accelerated)
	if err := errors.Join(err, server.Kill()); err != nil {
		return s, err
	}
	user := client.ProcessState.UserTime() + serving.ProcessState.UserTime()
	system := client.ProcessState.SystemTime() + serving.ProcessState.SystemTime()
	total := (user + system).Seconds()
	return sample{rate, total / messages, user.Seconds() / total}, nil
}

// drive runs a tool's client against the server that has been started.
func (p *pair) drive(ctx context.Context, e experiment, accelerated bool) (client *exec.Cmd, rate, messages float64, err error) {
	if err := p.listens(ctx, e.port); err != nil {
		return nil, 0, 0, err
	}
	before, err := p.redirected()
	if err != nil {
		return nil, 0, 0, err
	}
	addr, _ := p.server.Addr(false)
	var out bytes.Buffer
	client, process, err := p.start(p.client, e, accelerated, &out, e.client(addr))
	if err != nil {
		return nil, 0, 0, err
	}
	if err := process.Wait(); err != nil {
		return nil, 0, 0, fmt.Errorf("%w: %s", err, out.Bytes())
	}
	after, err := p.redirected()
	if err == nil && accelerated != (after > before) {
		err = fmt.Errorf("accelerated %v, though %d bytes were redirected", accelerated, after-before)
	}
	if err != nil {
		return nil, 0, 0, err
	}
	rate, messages, err = e.parse(out.Bytes())
	return client, rate, messages, err
}

// bench lets skipstack bench measure an experiment, and returns what it says.
func bench(ctx context.Context, e experiment, sockets, congestion string) (plain, accelerated sample, err error) {
	args := append([]string{"bench", "--quick", "--max-pairs=5", "--json=-", "--sockets=" + sockets, "--congestion-control=" + congestion, "--cni-path=" + node.ProgramDir()}, e.bench...)
	var out, said bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(node.ProgramDir(), "skipstack"), args...)
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return plain, accelerated, fmt.Errorf("skipstack bench: %w: %s", err, said.Bytes())
	}
	type figures struct {
		Bytes        float64 `json:"throughput_bytes_per_s"`
		Transactions float64 `json:"transactions_per_s"`
		PerGB        float64 `json:"cpu_s_per_gb"`
		Per100k      float64 `json:"cpu_s_per_100k_transactions"`
	}
	var report struct {
		Points []struct{ Plain, Accelerated figures }
	}
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		return plain, accelerated, fmt.Errorf("skipstack bench: %w", err)
	}
	if len(report.Points) != 1 {
		return plain, accelerated, fmt.Errorf("skipstack bench measured %d points, not 1", len(report.Points))
	}
	of := func(f figures) sample {
		if e.messageBytes > 0 {
			return sample{rate: f.Bytes, cpu: f.PerGB * float64(e.messageBytes) / 1e9}
		}
		return sample{rate: f.Transactions, cpu: f.Per100k / 1e5}
	}
	return of(report.Points[0].Plain), of(report.Points[0].Accelerated), nil
}

func (p *pair) start(pod *node.Pod, e experiment, accelerated bool, out *bytes.Buffer, args []string) (*exec.Cmd, *node.Process, error) {
	cmd := p.command(e.tool, args...)
	if out != nil {
		cmd.Stdout, cmd.Stderr = out, out
	}
	cpu, err := lastCPU()
	if err != nil {
		return nil, nil, err
	}
	where := node.StartOptions{CPU: cpu + 1}
	if !accelerated {
		// As deep as the pod's own, outside it.
		if where.Cgroup, err = p.node.Cgroup(filepath.Join("plain/burstable", "pod"+pod.UID, pod.ID)); err != nil {
			return nil, nil, err
		}
	}
	process, err := pod.Start(cmd, where)
	return cmd, process, err
}

// listens waits until the server's pod listens on a TCP port.
func (p *pair) listens(ctx context.Context, port int) error {
	want := fmt.Sprintf(":%04X ", port)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		found := false
		err := p.server.Do(func() error {
			table, err := os.ReadFile("/proc/thread-self/net/tcp")
			for line := range strings.Lines(string(table)) {
				// sl, local address, remote address, state; 0A is LISTEN
				f := strings.Fields(line)
				found = found || len(f) > 3 && strings.HasSuffix(f[1]+" ", want) && f[3] == "0A"
			}
			return err
		})
		switch {
		case err != nil || found:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(deadline):
			return fmt.Errorf("the server does not listen on port %d", port)
		}
	}
}
