package bench

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
	"os/exec"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// clientOptions are what the command line of `bench client` asks for.
type clientOptions struct {
	ports
	target            string
	wait              time.Duration
	repeats, maxPairs int
	files
}

func newClientCommand(c Config) *cobra.Command {
	var o clientOptions
	cmd := &cobra.Command{
		Use:   "client --target HOST",
		Short: "Measure two existing pods with and without skipstack",
		Long: `Measure TCP to a pod of the same node that runs 'skipstack bench serve'.

It needs no privileges. HOST is the name or address of the server's pod, or of
a Service with both ports. Connections to the server's two ports alternate; one
port is accelerated, one is not, as the pod's annotation skipstack/exclude-ports
names it. The proof are the byte counters of TCP_INFO, which stand still on a
connection that skips the stack, while its bytes arrive.

Exit codes: 0 the bypass is proven for every point, 1 it is not (or the bench
failed), 2 wrong usage.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("max-pairs") {
				o.maxPairs = max(o.maxPairs, o.repeats)
			}
			err := noneEmpty(cmd.Flags())
			if err == nil {
				err = o.check(c)
			}
			if err != nil {
				return &ExitError{ExitUsage, err}
			}
			ctx := cmd.Context()
			err = runClient(ctx, c, o)
			switch {
			case err != nil && ctx.Err() != nil:
				return &ExitError{ExitNotProven, errors.New("interrupted: nothing is proven")}
			case err != nil:
				return &ExitError{ExitNotProven, err}
			}
			return nil
		},
	}
	o.register(cmd)
	cmd.Flags().StringVar(&o.target, "target", "", "name or address of the server, a `HOST` without a port")
	cmd.Flags().DurationVar(&o.wait, "wait", 30*time.Second, "how long to wait for the server to be there, and free")
	cmd.Flags().IntVar(&o.repeats, "repeats", minRepeats, "the least `PAIRS` of runs of each point")
	cmd.Flags().IntVar(&o.maxPairs, "max-pairs", defaultMaxPairs, "the most `PAIRS` of a point whose ratio is uncertain")
	o.files.add(cmd.Flags())
	return cmd
}

// mostPairs is the most that fits into a session.
const mostPairs = 50

func (o *clientOptions) check(c Config) error {
	if err := o.ports.check(); err != nil {
		return err
	}
	_, _, hasPort := net.SplitHostPort(o.target)
	addr, notAddr := netip.ParseAddr(o.target)
	switch {
	case o.target == "":
		return errors.New("--target: which host runs `skipstack bench serve`?")
	case notAddr != nil && hasPort == nil:
		return fmt.Errorf("--target %s: it is a host without a port; --port and --plain-port name the ports", o.target)
	case notAddr == nil && addr.Zone() != "":
		return fmt.Errorf("--target %s: link-local addresses are not supported", o.target)
	case o.wait < 0:
		return fmt.Errorf("--wait %v is negative", o.wait)
	case o.repeats < minRepeats || o.repeats > mostPairs:
		return fmt.Errorf("--repeats %d: it is %d to %d", o.repeats, minRepeats, mostPairs)
	case o.maxPairs < o.repeats || o.maxPairs > mostPairs:
		return fmt.Errorf("--max-pairs %d: it is --repeats, here %d, to %d", o.maxPairs, o.repeats, mostPairs)
	}
	if err := o.settle(c, ""); err != nil {
		return err
	}
	return o.checkWritable()
}

// runClient measures, and returns an error unless the bypass is proven.
func runClient(ctx context.Context, c Config, o clientOptions) error {
	s, err := newPodSite(ctx, o, selfWorker(c.Env), c.ErrOut)
	if err != nil {
		return err
	}
	defer s.close()
	report, err := s.measure(ctx, Parameters{
		Repeats: o.repeats, MaxPairs: o.maxPairs, WarmUp: 10 * time.Millisecond, Length: minLength, NonBlocking: true,
	}, podPoints, c.ErrOut)
	if report == nil {
		return err
	}
	err = errors.Join(err, report.writePodText(o.table(c), o.ports), o.writeFiles(ctx, report, c.Out))
	if err == nil && !report.Proven() {
		err = errors.New("the bypass is not proven")
	}
	return err
}

// podPoints are what two pods are measured with, on a path.
func podPoints(path Path, cpus int) []Point {
	rr := func(placement Placement, bytes int) Point {
		return Point{Test: RequestResponse, Path: path, Placement: placement, RequestBytes: bytes, ResponseBytes: bytes, NoDelay: true, Connections: 1}
	}
	stream := func(placement Placement, bytes int, noDelay bool) Point {
		return Point{Test: Stream, Path: path, Placement: placement, RequestBytes: bytes, NoDelay: noDelay, Connections: 1}
	}
	crr := rr(SameCPU, 64)
	crr.Test = ConnectRequestResponse
	points := []Point{
		rr(SameCPU, 64), rr(SameCPU, 4<<10), rr(SameCPU, 16<<10),
		stream(SameCPU, 64, true), stream(SameCPU, 4<<10, false), stream(SameCPU, 64<<10, false), crr,
	}
	if cpus > 1 {
		points = append(points, rr(CrossCPU, 64), stream(CrossCPU, 64<<10, false))
	}
	return points
}

// podSite is two existing pods: the one this process is in, and the server's.
type podSite struct {
	options clientOptions
	control net.Conn
	reader  *bufio.Reader
	server  greeting
	address netip.Addr // the server's
	path    Path
	cpus    []int // of both

	local   *remote // the client's
	kill    func()
	replies *json.Decoder // the server's
}

// retryPause is the time between two tries to reach the server.
const retryPause = 200 * time.Millisecond

// errNoRetry is wrapped by errors that trying again cannot mend.
var errNoRetry = errors.New("it is of no use to try again")

// newPodSite opens a session with the server. Close the site after use.
func newPodSite(ctx context.Context, o clientOptions, worker *exec.Cmd, log io.Writer) (*podSite, error) {
	s := &podSite{options: o}
	waiting, cancel := context.WithTimeout(ctx, max(o.wait, time.Millisecond))
	defer cancel()
	fmt.Fprintf(log, "bench: looking for the server at %s, port %d\n", o.target, o.plain)
	for {
		err := s.greet(ctx)
		if err == nil {
			break
		}
		if errors.Is(err, errNoRetry) {
			return nil, err
		}
		select {
		case <-waiting.Done():
			return nil, fmt.Errorf("no session with the server after %v: %w", o.wait, err)
		case <-time.After(retryPause):
		}
	}
	if err := s.begin(worker, log); err != nil {
		s.close()
		return nil, err
	}
	fmt.Fprintf(log, "bench: session with %s (%s)\n", s.address, s.path)
	return s, nil
}

// greet tries each address of the target once.
func (s *podSite) greet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, greetingTimeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", s.options.target)
	if err != nil {
		return fmt.Errorf("find %s: %w", s.options.target, err)
	}
	var failed []error
	for _, addr := range addrs {
		err := s.greetAt(ctx, addr.Unmap())
		if err == nil {
			return nil
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

func (s *podSite) greetAt(ctx context.Context, addr netip.Addr) error {
	at := netip.AddrPortFrom(addr, s.options.plain)
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", at.String())
	if err != nil {
		return err
	}
	var server greeting
	r := bufio.NewReaderSize(c, maxLine)
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	if err = writeLine(c, greeting{Protocol: protocol}); err == nil {
		err = readLine(r, &server)
	}
	switch {
	case err != nil:
		err = fmt.Errorf("%s does not answer as `skipstack bench serve` does: %w", at, err)
	case server.Busy:
		err = fmt.Errorf("%s: %s", at, server.Error)
	case server.Protocol != protocol || server.Error != "":
		err = fmt.Errorf("%w: %s: %s", errNoRetry, at, or(server.Error, "another version of the protocol"))
	case len(server.Token) != tokenBytes || len(server.CPUs) == 0:
		err = fmt.Errorf("%w: %s: its greeting is not complete", errNoRetry, at)
	}
	if err != nil {
		c.Close()
		return err
	}
	_ = c.SetDeadline(time.Time{})
	s.control, s.reader, s.server, s.address = c, r, server, addr
	return nil
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// begin checks that the session can be measured, and starts the client's worker.
func (s *podSite) begin(worker *exec.Cmd, log io.Writer) error {
	own, err := bootID()
	if err != nil {
		return err
	}
	if own != s.server.BootID {
		return fmt.Errorf("the server at %s runs on another node: only connections within a node skip the stack (put both pods on one, by affinity)", s.address)
	}
	cpus, err := allowedCPUs()
	if err != nil {
		return err
	}
	for _, cpu := range cpus {
		if slices.Contains(s.server.CPUs, cpu) {
			s.cpus = append(s.cpus, cpu)
		}
	}
	if len(s.cpus) == 0 {
		return fmt.Errorf("the pods share no CPU: this one may use %v, the server %v (give them no exclusive CPUs)", cpus, s.server.CPUs)
	}
	switch {
	case s.address.IsLoopback():
		s.path = Loopback
	case s.address != s.server.Address: // translated on the way
		s.path = ServiceIP
	case s.address.Is6():
		s.path = IPv6
	default:
		s.path = PodIP
	}
	s.replies = json.NewDecoder(s.reader)
	worker.Env = workerEnv(worker.Env)
	worker.Stderr = log
	s.local, err = newRemote(role{clientSide, clientPod, true}, worker, func(cmd *exec.Cmd) (func() error, error) { return cmd.Wait, cmd.Start() })
	if err != nil {
		return err
	}
	s.kill = func() {
		_ = s.local.close()
		_ = worker.Process.Kill()
		_ = worker.Wait()
	}
	return nil
}

// worker returns one of two workers, the local one and the server's, for the port that
// the role needs.
func (s *podSite) worker(r role) (*remote, error) {
	port := s.options.plain
	if r.accelerated {
		port = s.options.accelerated
	}
	if r.side == clientSide {
		w := *s.local
		w.role = r
		w.stamp = func(o *order) {
			o.At, o.Token = endpoint{TCP: netip.AddrPortFrom(s.address, port)}, s.server.Token
		}
		return &w, nil
	}
	return &remote{
		role: r, orders: json.NewEncoder(s.control), in: s.control, out: s.control, reply: s.replies,
		wait:  func() error { return errors.New("the server ended the session") },
		stamp: func(o *order) { o.Port = port },
	}, nil
}

func (s *podSite) target(Path) (netip.Addr, error) { return s.address, nil }

// counters are nothing: a pod does not see the datapath.
func (s *podSite) counters() (datapath.Counters, error) { return datapath.Counters{}, nil }

func (s *podSite) facts() Facts {
	network := fmt.Sprintf("two existing pods, the server at %s", s.address)
	if s.options.target != s.address.String() {
		network += " (" + s.options.target + ")"
	}
	return Facts{Network: network, Verdict: "not visible from a pod"}
}

func (s *podSite) close() {
	if s.kill != nil {
		s.kill()
	}
	_ = s.control.Close()
}

// skipped is the bytes that did not go by TCP.
func skipped(e *Evidence) uint64 { return e.Payload - min(e.TCP, e.Payload) }

// rules judge by TCP_INFO alone: its counters stand still on a connection that
// skips the stack. Both sides count what they received, so bytes that TCP did not carry
// and that have arrived were redirected.
func (s *podSite) rules() *rules {
	return &rules{
		// It looks the same if nothing is accelerated at all.
		lateness: "its bytes went by TCP: not accelerated, or a client was late in the handshake",
		late: func(p Point, accelerated bool, m measured, _ datapath.Counters) bool {
			return accelerated && p.Test != ConnectRequestResponse && float64(m.byTCP()) >= enough*float64(m.payload())
		},
		prove: func(p Point, plain, accelerated *Evidence) (Proof, string) {
			part := func(e *Evidence) float64 { return float64(skipped(e)) / float64(e.Payload) }
			switch {
			case plain.Payload == 0 || accelerated.Payload == 0:
				return Failed, "nothing was sent"
			case part(plain) > 1-enough:
				return Failed, fmt.Sprintf("plain runs: only %d of %d bytes went by TCP: %s", plain.TCP, plain.Payload, s.notExcluded())
			case part(accelerated) >= enough:
				return Proven, ""
			case p.Test == Stream && part(accelerated) >= leastOverflow:
				return Overflow, ""
			}
			return Failed, fmt.Sprintf("%d of %d bytes went by TCP", accelerated.TCP, accelerated.Payload)
		},
	}
}

// leastOverflow is the part of a stream's bytes that must skip TCP: while a receiver has
// its limit of unread bytes, the others go by TCP, which makes the sender wait. A pod
// cannot see how many had that reason; without acceleration it would be all.
const leastOverflow = 0.5

func (s *podSite) notExcluded() string {
	return fmt.Sprintf("annotate the server's pod with skipstack/exclude-ports: %q", strconv.Itoa(int(s.options.plain)))
}

// measure verifies data on both ports and measures the points.
func (s *podSite) measure(ctx context.Context, p Parameters, set func(path Path, cpus int) []Point, log io.Writer) (*Report, error) {
	if err := p.validate(); err != nil {
		return nil, err
	}
	r := &runner{site: s, parameters: p, cpus: s.cpus, log: log, rules: s.rules()}
	start := time.Now()
	report := newReport(p, s.facts())
	var err error
	if report.Header.Verified, err = s.verify(ctx, r); err != nil {
		return nil, err
	}
	fmt.Fprintf(log, "bench: path %s: %s of data verified\n", s.path, quantity(float64(report.Header.Verified), "B"))
	points := set(s.path, len(s.cpus))
	fmt.Fprintf(log, "bench: %s, %s\n", pointsCount(len(points)), p.howLong(points))
	var measured []*series
	for i, point := range points {
		var one *series
		if one, err = r.series(ctx, point); err != nil {
			break
		}
		measured = append(measured, one)
		r.tell(one, fmt.Sprintf("%d/%d", i+1, len(points)))
	}
	if err == nil {
		err = r.refine(ctx, measured, time.Time{})
	}
	for _, one := range measured {
		result := r.conclude(one)
		result.RedirectedBytes = result.PayloadBytes - min(result.TCPBytes, result.PayloadBytes)
		report.Points = append(report.Points, result)
	}
	report.Header.Duration = time.Since(start).Seconds()
	return report.endedBy(err)
}

// verify sends checked data to both ports, and finds out whether it is worth measuring.
func (s *podSite) verify(ctx context.Context, r *runner) (bytes uint64, err error) {
	p := Point{Test: RequestResponse, Path: s.path, Placement: SameCPU, Connections: 1}
	for _, accelerated := range []bool{false, true} {
		m, _, err := r.run(ctx, p, accelerated, true)
		if err != nil {
			return 0, fmt.Errorf("verify data on path %s: %w", s.path, err)
		}
		var e Evidence
		e.add(m, datapath.Counters{})
		switch part := float64(skipped(&e)) / float64(e.Payload); {
		case !accelerated && part > 1-enough:
			return 0, fmt.Errorf("port %d is accelerated, too: %s", s.options.plain, s.notExcluded())
		case accelerated && part < leastOverflow:
			return 0, fmt.Errorf("the bypass is not proven: %s of %s sent to port %d went by TCP: are both pods attached and accelerated, and the port not excluded? On the node, `skipstack doctor` says what keeps pods from it",
				quantity(float64(e.TCP), "B"), quantity(float64(e.Payload), "B"), s.options.accelerated)
		}
		bytes += m.payload()
	}
	return bytes, nil
}

// writePodText writes the report of two existing pods for people.
func (r *Report) writePodText(w io.Writer, p ports) error {
	var b bytes.Buffer
	h := r.Header
	fmt.Fprintln(&b)
	paragraph(&b, "Linux %s, %s, %d CPUs.", h.Kernel, h.CPU, h.CPUs)
	paragraph(&b, "Path: %s; congestion control %s.", h.Network, h.Congestion)
	paragraph(&b, "Medians of %s of %v; plain and accelerated runs differ only in the server's port: %d is plain, %d accelerated.",
		h.Parameters.pairs(), h.Parameters.Length, p.plain, p.accelerated)
	r.writeResults(&b, fmt.Sprintf(`
one CPU, two CPUs: client and server share one, or have one each.
ratio: rate with skipstack over plain rate, the median of the pairs' ratios and
  their median absolute deviation.
?: the ratio is uncertain: its standard error is more than 4 %%.
sent: payload bytes of the skipstack runs, and how much of it TCP did not carry,
  by the counters of TCP_INFO, and arrived. In the plain runs it carried all.
proof: ok is at least 99 %% past TCP; overflow, of a stream, is at least %.0f %%.
  While a receiver has its limit of unread bytes, the others go by TCP, which
  makes the sender wait.
`, 100*leastOverflow))
	_, err := w.Write(b.Bytes())
	return err
}
