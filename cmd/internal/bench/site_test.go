package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/bpf"
	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/node"
)

func TestMain(m *testing.M) {
	os.Exit(node.Main(m, node.MainOptions{
		Workers: map[string]node.Worker{
			"bench":  func([]string) int { return runWorker(os.Stdin, os.Stdout, os.Stderr) },
			"wrong":  wrongWorker,
			"client": podClient,
		},
		Build: []string{"github.com/skipstack/skipstack/cmd/skipstack"},
		Tools: chainPlugins,
	}))
}

// wrongWorker is a server that answers the verification pass with zeroes.
func wrongWorker([]string) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	out := json.NewEncoder(os.Stdout)
	_ = out.Encode(reply{Port: uint16(l.Addr().(*net.TCPAddr).Port)})
	c, err := l.Accept()
	if err != nil {
		return 1
	}
	for _, n := range verifySizes() {
		if _, err := io.CopyN(io.Discard, c, int64(n)); err != nil {
			return 1
		}
		if _, err := c.Write(make([]byte, n)); err != nil {
			return 1
		}
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// loopbackSite has plain workers only, on the loopback of the test: no pods, no root.
type loopbackSite struct {
	t       *testing.T
	server  string // worker of the server's side
	addr    netip.Addr
	workers map[role]*remote
	started []*exec.Cmd
	dir     string
	order   []bool // accelerated or not, run by run
}

func newLoopbackSite(t *testing.T) *loopbackSite {
	return &loopbackSite{t: t, dir: t.TempDir(), server: "bench", addr: netip.MustParseAddr("127.0.0.1"), workers: map[role]*remote{}}
}

func (s *loopbackSite) worker(r role) (*remote, error) {
	if r.side == clientSide {
		s.order = append(s.order, r.accelerated)
	}
	if w := s.workers[r]; w != nil {
		return w, nil
	}
	name := "bench"
	if r.side == serverSide {
		name = s.server
	}
	cmd := node.WorkerCommand(name)
	cmd.Env = workerEnv(cmd.Env)
	w, err := newRemote(r, cmd, func(cmd *exec.Cmd) (func() error, error) { return cmd.Wait, cmd.Start() })
	if err != nil {
		return nil, err
	}
	s.workers[r], s.started = w, append(s.started, cmd)
	s.t.Cleanup(func() {
		_ = w.close()
		_ = cmd.Process.Kill()
		_ = w.wait()
	})
	return w, nil
}

func (s *loopbackSite) target(Path) (netip.Addr, error)      { return s.addr, nil }
func (s *loopbackSite) counters() (datapath.Counters, error) { return datapath.Counters{}, nil }
func (s *loopbackSite) facts() Facts                         { return Facts{} }
func (s *loopbackSite) socketPath() string                   { return filepath.Join(s.dir, "socket") }

func testRunner(t *testing.T, s site) *runner {
	t.Helper()
	cpus, err := allowedCPUs()
	if err != nil {
		t.Fatal(err)
	}
	return &runner{site: s, cpus: cpus, log: io.Discard, parameters: Parameters{Repeats: 5, MaxPairs: 5, WarmUp: time.Millisecond, Length: 50 * time.Millisecond}}
}

// measure measures a point with the least pairs.
func (r *runner) measure(ctx context.Context, p Point) (Result, error) {
	s, err := r.series(ctx, p)
	if err != nil {
		return Result{}, err
	}
	return r.conclude(s), nil
}

func point(test Test, request, response int) Point {
	return Point{Test: test, Path: PodIP, Placement: SameCPU, RequestBytes: request, ResponseBytes: response, NoDelay: true, Connections: 1}
}

func TestGenerators(t *testing.T) {
	for _, nonBlocking := range []bool{false, true} {
		for _, p := range []Point{
			point(RequestResponse, 64, 64), point(RequestResponse, 1, 300000), point(Stream, 1, 0), point(Stream, 1<<20, 0), point(ConnectRequestResponse, 64, 1000),
			connections(16, point(RequestResponse, 64, 64)), connections(256, point(Stream, 4<<10, 0)),
		} {
			t.Run(fmt.Sprintf("%s nonblocking %v", p, nonBlocking), func(t *testing.T) {
				r := testRunner(t, newLoopbackSite(t))
				r.parameters.NonBlocking = nonBlocking
				start := time.Now()
				m, _, err := r.run(t.Context(), p, false, false)
				if err != nil {
					t.Fatal(err)
				}
				if m.client.Sent != m.server.Received || m.server.Sent != m.client.Received || m.payload() == 0 {
					t.Errorf("bytes do not match: client %+v, server %+v", m.client, m.server)
				}
				if m.client.Conns != m.server.Conns || (int(m.client.Conns) == p.Connections) == (p.Test == ConnectRequestResponse) {
					t.Errorf("connections: client %d, server %d", m.client.Conns, m.server.Conns)
				}
				if part := float64(m.byTCP()) / float64(m.payload()); part < 0.999 || part > 1.001 {
					t.Errorf("%d of %d bytes went by TCP, though nothing else could carry them", m.byTCP(), m.payload())
				}
				if m.rate(p.Test) <= 0 || m.cpu(p.Placement) <= 0 {
					t.Errorf("rate %v, CPU %v", m.rate(p.Test), m.cpu(p.Placement))
				}
				if n := m.client.Transactions; p.Test != Stream {
					if want := uint64(p.RequestBytes) * n; n == 0 || m.client.Sent < want {
						t.Errorf("%d transactions, %d bytes sent", n, m.client.Sent)
					}
					if q := time.Duration(m.client.Latency.quantile(0.5)); q <= 0 || q > r.parameters.Length+time.Since(start) { // a machine that stalls may do one in a run
						t.Errorf("median latency %v", q)
					}
				} else if m.server.Read == 0 || m.server.Read > m.server.Received {
					t.Errorf("%d bytes counted, %d received", m.server.Read, m.server.Received)
				}
			})
		}
	}
}

// TestReference runs the AF_UNIX reference, whose bytes no TCP carries.
func TestReference(t *testing.T) {
	s := newLoopbackSite(t)
	r := testRunner(t, s)
	r.parameters.Unix = true
	r.reference = r.parameters.reference([]Point{point(RequestResponse, 64, 64)})
	for _, p := range []Point{
		point(RequestResponse, 64, 64), point(Stream, 64<<10, 0), point(ConnectRequestResponse, 64, 64), connections(16, point(RequestResponse, 64, 64)),
	} {
		m, _, err := r.runAs(t.Context(), p, runKind{unix: true})
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		if m.rate(p.Test) <= 0 || m.byTCP() != 0 || m.client.Sent != m.server.Received {
			t.Errorf("%s: %+v", p, m)
		}
		if _, err := os.Stat(s.socketPath()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the socket is left: %v", p, err)
		}
	}
	result, err := r.measure(t.Context(), point(RequestResponse, 64, 64))
	if err != nil || result.Unix == nil || result.Unix.TransactionsPerSecond <= 0 || result.Unix.P50 <= 0 {
		t.Errorf("%+v, %v", result.Unix, err)
	}
}

func TestRunsAlternate(t *testing.T) {
	s := newLoopbackSite(t)
	result, err := testRunner(t, s).measure(t.Context(), point(RequestResponse, 64, 64))
	if err != nil {
		t.Fatal(err)
	}
	// Plain, accelerated, accelerated, plain, and so on; a run may have been repeated.
	if got, want := slices.Compact(s.order), []bool{false, true, false, true, false, true}; !slices.Equal(got, want) {
		t.Errorf("order of runs %v", s.order)
	}
	if result.Repeats != 5 || len(result.Speedups) != 5 || result.Speedup <= 0 {
		t.Errorf("%+v", result)
	}
	if result.Proof != Failed || !strings.Contains(result.Reason, "0 were redirected") {
		t.Errorf("without a datapath, the proof is %s: %s", result.Proof, result.Reason)
	}
}

func TestVerificationFindsWrongBytes(t *testing.T) {
	good := testRunner(t, newLoopbackSite(t))
	if m, _, err := good.run(t.Context(), point(RequestResponse, 0, 0), false, true); err != nil || m.payload() < 1<<20 {
		t.Errorf("right bytes: %v, %d bytes", err, m.payload())
	}
	s := newLoopbackSite(t)
	s.server = "wrong"
	_, _, err := testRunner(t, s).run(t.Context(), point(RequestResponse, 0, 0), false, true)
	if err == nil || !strings.Contains(err.Error(), "byte 0 is 0x0, not") {
		t.Errorf("wrong bytes: %v", err)
	}
}

func TestKilledWorkerEndsTheRun(t *testing.T) {
	for _, victim := range []int{0, 1} {
		s := newLoopbackSite(t)
		r := testRunner(t, s)
		if _, _, err := r.run(t.Context(), point(RequestResponse, 64, 64), false, false); err != nil {
			t.Fatal(err)
		}
		r.parameters.Length = time.Minute
		time.AfterFunc(20*time.Millisecond, func() { _ = s.started[victim].Process.Kill() })
		start := time.Now()
		_, _, err := r.run(t.Context(), point(RequestResponse, 64, 64), false, false)
		side := []side{clientSide, serverSide}[victim]
		if err == nil || !strings.Contains(err.Error(), "worker "+string(side)+" in pod "+string(side)+" (plain) ended: signal: killed") || time.Since(start) > r.parameters.Length/2 {
			t.Errorf("worker %d killed: %v after %v", victim, err, time.Since(start))
		}
	}
}

// An ADD that a busy machine gave no time is repeated, however far it came.
func TestOutOfTime(t *testing.T) {
	for _, c := range []struct {
		status attachment.Status
		reason string
		err    error
		want   string
	}{
		{attachment.Attached, "", nil, ""},
		{attachment.Skipped, "busy: somebody", errNotAllowed, "busy: somebody"},
		{attachment.Skipped, "mode off", errNotAllowed, ""},
		{attachment.Attaching, "", errNotAllowed, "busy: it is half attached"},
		{"", "", fmt.Errorf("read: %w", attachment.ErrNotFound), "busy: nothing is recorded"},
		{"", "", attachment.ErrCorrupt, ""},
	} {
		if got := outOfTime(attachment.Record{Status: c.status, Reason: c.reason}, c.err); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

// privateSiteFor makes a private site for a test.
func privateSiteFor(t *testing.T, mode string) (*nodeSite, error) {
	t.Helper()
	node.Need(t)
	s, err := newPrivateSite(t.Context(), privateOptions{
		cniPath: node.ProgramDir(), program: filepath.Join(node.ProgramDir(), "skipstack"), stderr: os.Stderr, mode: mode,
		worker: func() *exec.Cmd { return node.WorkerCommand("bench") },
	})
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	return s, err
}

func TestPrivateSite(t *testing.T) {
	s, err := privateSiteFor(t, "on")
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	p := Parameters{Set: quickSet, Repeats: minRepeats, MaxPairs: minRepeats, WarmUp: 10 * time.Millisecond, Length: minLength, Unix: true}
	report, err := measureAll(t.Context(), s, p, []Point{point(Stream, 64<<10, 0)}, &log)
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	if !report.Proven() || report.Header.Verified == 0 || len(report.Points) != 1 {
		t.Errorf("not proven:\n%s", log.String())
	}
	result := report.Points[0]
	if result.Unix == nil || result.Unix.BytesPerSecond <= 0 || result.Plain.CPUPerGB <= 0 || result.Accelerated.CPUPerGB <= 0 {
		t.Errorf("reference or cost missing: %+v", result)
	}
	if !slices.ContainsFunc(result.Programs, func(c ProgramCost) bool {
		return c.Name == bpf.DatapathProgRedirect && c.Runs > 100 && c.NsPerRun > 0
	}) {
		t.Errorf("the sk_msg program was not timed: %+v", result.Programs)
	}
	r := testRunner(t, s)
	for _, p := range []Point{
		point(RequestResponse, 64, 64), point(ConnectRequestResponse, 64, 64),
		connections(16, point(RequestResponse, 64, 64)), connections(16, point(Stream, 64<<10, 0)),
		{Test: RequestResponse, Path: ServiceIP, Placement: CrossCPU, RequestBytes: 64, ResponseBytes: 64, Connections: 1},
		{Test: RequestResponse, Path: IPv6, Placement: SameCPU, RequestBytes: 64, ResponseBytes: 64, Connections: 1},
		{Test: RequestResponse, Path: Loopback, Placement: SameCPU, RequestBytes: 64, ResponseBytes: 64, Connections: 1},
	} {
		if p.Placement == CrossCPU && len(r.cpus) == 1 {
			p.Placement = SameCPU
		}
		if result, err := r.measure(t.Context(), p); err != nil || result.Proof == Failed || p.Test != Stream && result.Proof != Proven {
			t.Errorf("%s: proof %s (%s), error %v", p, result.Proof, result.Reason, err)
		}
	}
}

// closeGate ends acceleration on a node, without reaching others as the switch does.
func closeGate(t *testing.T, bpffs string) {
	t.Helper()
	set, err := datapath.Open(bpffs)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	gate, err := set.Node()
	gate.Open = false
	if err == nil {
		err = set.SetNode(gate)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestSecretlyOff closes the node's gate behind the bench's back.
func TestSecretlyOff(t *testing.T) {
	s, err := privateSiteFor(t, "on")
	if err != nil {
		t.Fatal(err)
	}
	closeGate(t, s.node.BPFFS)
	r := testRunner(t, s)
	result, err := r.measure(t.Context(), point(RequestResponse, 64, 64))
	if err != nil {
		t.Fatal(err)
	}
	if result.Proof != Failed || (&Report{Points: []Result{result}}).Proven() || !strings.Contains(result.Reason, "; the node's gate was closed meanwhile") {
		t.Errorf("proof %s (%s), though acceleration is off", result.Proof, result.Reason)
	}
	_, err = r.verify(t.Context(), PodIP)
	if err == nil || !strings.Contains(err.Error(), "path pod: ") || !strings.Contains(err.Error(), "; the node's gate was closed meanwhile") || strings.Contains(err.Error(), "nothing was redirected") {
		t.Errorf("the verification pass, with acceleration off: %v", err)
	}
}

// swapped runs plain workers where accelerated ones are asked for, and the reverse.
type swapped struct{ site }

func (s swapped) worker(r role) (*remote, error) {
	r.accelerated = !r.accelerated
	return s.site.worker(r)
}

func TestPlainMustBePlain(t *testing.T) {
	s, err := privateSiteFor(t, "on")
	if err != nil {
		t.Fatal(err)
	}
	result, err := testRunner(t, swapped{s}).measure(t.Context(), point(RequestResponse, 64, 64))
	if err != nil {
		t.Fatal(err)
	}
	if result.Proof != Failed || !strings.HasPrefix(result.Reason, "plain runs: ") {
		t.Errorf("proof %s (%s), though the plain runs were accelerated", result.Proof, result.Reason)
	}
}

func TestNotAllowed(t *testing.T) {
	if _, err := privateSiteFor(t, "off"); !errors.Is(err, errNotAllowed) {
		t.Errorf("pods with mode off: %v", err)
	}
}

// TestWithoutEpoll: points that need epoll are left out, and named, where the kernel
// does not wake it for redirected bytes.
func TestWithoutEpoll(t *testing.T) {
	s := &nodeSite{noEpoll: true}
	r, report := &runner{site: s, log: io.Discard}, &Report{}
	many := connections(16, point(Stream, 64, 0))
	if !r.leaveOut(many, report) || !r.leaveOut(many, report) || r.leaveOut(point(Stream, 64, 0), report) {
		t.Error("the wrong points are left out")
	}
	if len(report.Header.LeftOut) != 1 || !strings.Contains(report.Header.LeftOut[0], "epoll") {
		t.Errorf("left out: %q", report.Header.LeftOut)
	}
	if s.noEpoll = false; r.leaveOut(many, report) {
		t.Error("left out, though epoll works")
	}
}
