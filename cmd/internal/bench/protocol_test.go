package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/node"
)

// These tests have client and server on the loopback of the test: nothing is
// accelerated, and no root is needed.

// startServer runs a server in this process and returns its ports and the end of it.
func startServer(t *testing.T, o serveOptions) (p ports, ended <-chan error, log *lockedBuffer) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	log = &lockedBuffer{}
	listening, done := make(chan ports, 1), make(chan error, 1)
	s := &server{log: log, options: o, listening: listening, command: func() *exec.Cmd { return node.WorkerCommand("bench") }}
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		done <- s.run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-finished
	})
	select {
	case p = <-listening:
	case err := <-done:
		t.Fatal(err)
	}
	return p, done, log
}

func clientOf(p ports) clientOptions {
	return clientOptions{ports: p, target: "localhost", wait: 30 * time.Second, repeats: minRepeats, maxPairs: minRepeats}
}

func newTestClient(t *testing.T, o clientOptions) (*podSite, error) {
	t.Helper()
	s, err := newPodSite(t.Context(), o, node.WorkerCommand("bench"), io.Discard)
	if err == nil {
		t.Cleanup(s.close)
	}
	return s, err
}

// shortRuns is a runner for runs that only have to work.
func (s *podSite) shortRuns() *runner {
	return &runner{site: s, cpus: s.cpus, log: io.Discard, rules: counterRules, parameters: Parameters{
		Repeats: minRepeats, MaxPairs: minRepeats, WarmUp: time.Millisecond, Length: 20 * time.Millisecond, NonBlocking: true,
	}}
}

// works does a run of each test on both ports.
func (s *podSite) works(t *testing.T) {
	t.Helper()
	r := s.shortRuns()
	for _, p := range []Point{point(RequestResponse, 64, 64), point(Stream, 4<<10, 0), point(ConnectRequestResponse, 64, 1000)} {
		for _, accelerated := range []bool{false, true} {
			m, _, err := r.run(t.Context(), p, accelerated, false)
			if err != nil {
				t.Fatalf("%s: %v", p, err)
			}
			if m.client.Sent != m.server.Received || m.server.Sent != m.client.Received || m.payload() < 1000 {
				t.Errorf("%s: client %+v, server %+v", p, m.client, m.server)
			}
			if skipped := m.payload() - min(m.payload(), m.byTCP()); float64(skipped) > 0.001*float64(m.payload()) {
				t.Errorf("%s: %d of %d bytes skipped TCP, though nothing else could carry them", p, skipped, m.payload())
			}
		}
	}
}

func TestSessionWithoutAcceleration(t *testing.T) {
	p, ended, _ := startServer(t, serveOptions{once: true})
	s, err := newTestClient(t, clientOf(p))
	if err != nil {
		t.Fatal(err)
	}
	if s.path != Loopback {
		t.Errorf("path %s", s.path)
	}
	s.works(t)
	var said strings.Builder
	_, err = s.measure(t.Context(), Parameters{Repeats: minRepeats, MaxPairs: minRepeats, WarmUp: time.Millisecond, Length: minLength, NonBlocking: true}, podPoints, &said)
	if err == nil || !strings.Contains(err.Error(), "the bypass is not proven") || strings.Count(said.String(), "not accelerated") != 1 {
		t.Errorf("two pods that are not accelerated: %v, after %s", err, said.String())
	}
	s.close()
	if err := <-ended; err != nil {
		t.Errorf("the server: %v", err)
	}
}

func TestMeasureWithoutAcceleration(t *testing.T) {
	p, _, _ := startServer(t, serveOptions{})
	s, err := newTestClient(t, clientOf(p))
	if err != nil {
		t.Fatal(err)
	}
	r := s.shortRuns()
	r.rules = s.rules()
	r.rules.late = counterRules.late // which would try each run again
	result, err := r.measure(t.Context(), point(RequestResponse, 64, 64))
	if err != nil || result.Proof != Failed || !strings.Contains(result.Reason, "went by TCP") {
		t.Errorf("proof %s (%s), error %v", result.Proof, result.Reason, err)
	}
}

func TestPodRules(t *testing.T) {
	s := &podSite{options: clientOptions{ports: ports{1, 2}}}
	rr, stream := point(RequestResponse, 64, 64), point(Stream, 64, 0)
	for _, c := range []struct {
		name               string
		point              Point
		plain, accelerated Evidence
		want               Proof
		reason             string
	}{
		{"bypassed", rr, Evidence{Payload: 1000, TCP: 1000}, Evidence{Payload: 1000, TCP: 10}, Proven, ""},
		{"TCP_INFO counts more", rr, Evidence{Payload: 1000, TCP: 1001}, Evidence{Payload: 1000}, Proven, ""},
		{"partly", rr, Evidence{Payload: 1000, TCP: 1000}, Evidence{Payload: 1000, TCP: 11}, Failed, "11 of 1000"},
		{"stream, partly", stream, Evidence{Payload: 1000, TCP: 1000}, Evidence{Payload: 1000, TCP: 500}, Overflow, ""},
		{"stream, mostly not", stream, Evidence{Payload: 1000, TCP: 1000}, Evidence{Payload: 1000, TCP: 501}, Failed, "501 of 1000"},
		{"secretly off", stream, Evidence{Payload: 1000, TCP: 1000}, Evidence{Payload: 1000, TCP: 1000}, Failed, "1000 of 1000"},
		{"plain is not", rr, Evidence{Payload: 1000, TCP: 980}, Evidence{Payload: 1000}, Failed, `exclude-ports: "2"`},
		{"no plain bytes", rr, Evidence{}, Evidence{Payload: 1000}, Failed, "nothing"},
		{"no bytes", rr, Evidence{Payload: 1000, TCP: 1000}, Evidence{}, Failed, "nothing"},
	} {
		got, reason := s.rules().prove(c.point, &c.plain, &c.accelerated)
		if got != c.want || !strings.Contains(reason, c.reason) || (reason == "") != (c.want != Failed) {
			t.Errorf("%s: %s (%s), want %s (%s)", c.name, got, reason, c.want, c.reason)
		}
	}
}

// TestStrangers bothers a server before and during runs.
func TestStrangers(t *testing.T) {
	p, _, log := startServer(t, serveOptions{})
	dial := func(port uint16) net.Conn {
		c, err := net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	// hungUp waits for the server to close a connection; what it says before is returned.
	hungUp := func(c net.Conn) string {
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		said, err := io.ReadAll(c)
		if err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("the server does not hang up: %v", err)
		}
		return string(said)
	}
	for _, said := range []string{"\n", "GET / HTTP/1.1\r\n\r\n", "{}\n", strings.Repeat("x", maxLine+1), `{"skipstack_bench":1.5}` + "\n", "\x00\xff\n"} {
		c := dial(p.plain)
		_, _ = io.WriteString(c, said)
		hungUp(c)
	}
	c := dial(p.accelerated)
	_, _ = io.WriteString(c, `{"skipstack_bench":2}`+"\n")
	if got := hungUp(c); !strings.Contains(got, "version 1 of the protocol, the client 2") {
		t.Errorf("another version: %q", got)
	}
	// More silent ones than may be silent at once: the rest are hung up on at once.
	for range 2 * maxGreeters {
		dial(p.plain)
	}
	s, err := newTestClient(t, clientOf(p)) // it waits until they have timed out
	if err != nil {
		t.Fatalf("%v; the server said %s", err, log)
	}
	s.works(t)

	// A second client is told to wait.
	second := clientOf(p)
	second.wait = 300 * time.Millisecond
	if _, err := newTestClient(t, second); err == nil || !strings.Contains(err.Error(), "the server has a client") {
		t.Errorf("a second client: %v", err)
	}

	// Strangers come during runs, too.
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		var d net.Dialer
		for i := 0; ctx.Err() == nil; i++ {
			port := []uint16{p.accelerated, p.plain}[i%2]
			c, err := d.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				continue
			}
			_, _ = io.WriteString(c, []string{"", strings.Repeat("0", tokenBytes), "x", strings.Repeat("y", 1<<16)}[i/2%4])
			time.AfterFunc(5*time.Millisecond, func() { c.Close() })
			time.Sleep(5 * time.Millisecond)
		}
	}()
	r := s.shortRuns()
	for range 3 {
		for _, p := range []Point{point(RequestResponse, 64, 64), point(Stream, 4<<10, 0), point(ConnectRequestResponse, 64, 64)} {
			if _, _, err := r.run(t.Context(), p, true, false); err != nil {
				t.Errorf("%s among strangers: %v", p, err)
			}
		}
	}
	cancel()
	<-done
}

// TestHastyClient says all that a session has at once: a run is stopped before its
// generator can have begun.
func TestHastyClient(t *testing.T) {
	p, _, log := startServer(t, serveOptions{})
	cpus, err := allowedCPUs()
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", fmt.Sprintf("localhost:%d", p.plain))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const runs = 20
	var said bytes.Buffer
	o := goodOrder()
	o.CPU = cpus[0]
	_ = writeLine(&said, greeting{Protocol: protocol})
	for i := range runs {
		o.Port = []uint16{p.plain, p.accelerated}[i%2]
		for _, o.Verb = range []verb{listen, serve, stop} {
			_ = writeLine(&said, o)
		}
	}
	if _, err := c.Write(said.Bytes()); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	r := bufio.NewReaderSize(c, maxLine)
	var hello greeting
	if err := readLine(r, &hello); err != nil || hello.Error != "" {
		t.Fatalf("greeting %+v, %v", hello, err)
	}
	for i := range 2 * runs { // of listen, and of stop
		var got reply
		if err := readLine(r, &got); err != nil || got.Error != "" {
			t.Fatalf("reply %d: %+v, %v; the server said %s", i, got, err, log)
		}
	}
}

func TestClientVanishes(t *testing.T) {
	p, _, log := startServer(t, serveOptions{})
	first, err := newTestClient(t, clientOf(p))
	if err != nil {
		t.Fatal(err)
	}
	r := first.shortRuns()
	r.parameters.Length = maxRun
	time.AfterFunc(50*time.Millisecond, first.close)
	if _, _, err := r.run(t.Context(), point(RequestResponse, 64, 64), true, false); err == nil {
		t.Error("the run of a client that vanished succeeds")
	}
	second, err := newTestClient(t, clientOf(p))
	if err != nil {
		t.Fatalf("%v; the server said %s", err, log)
	}
	second.works(t)
}

func TestServerVanishes(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	listening, done := make(chan ports, 1), make(chan error, 1)
	s := &server{log: io.Discard, listening: listening, command: func() *exec.Cmd { return node.WorkerCommand("bench") }}
	go func() { done <- s.run(ctx) }()
	client, err := newTestClient(t, clientOf(<-listening))
	if err != nil {
		t.Fatal(err)
	}
	r := client.shortRuns()
	r.parameters.Length = maxRun
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, _, err := r.run(t.Context(), point(RequestResponse, 64, 64), true, false); err == nil {
		t.Error("the run of a server that vanished succeeds")
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestNobodyComes(t *testing.T) {
	_, ended, _ := startServer(t, serveOptions{wait: 50 * time.Millisecond})
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "no client came") {
		t.Errorf("a server that nobody comes to ends with %v", err)
	}
	o := clientOf(ports{1, 2})
	o.wait = 50 * time.Millisecond
	if _, err := newTestClient(t, o); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("no server: %v", err)
	}
}

// fakeServer answers a client's greeting with g.
func fakeServer(t *testing.T, g greeting) clientOptions {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			var hello greeting
			_ = readLine(bufio.NewReader(c), &hello)
			_ = writeLine(c, g)
			c.Close()
		}
	}()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	o := clientOf(ports{port, port})
	o.target = "127.0.0.1"
	return o
}

func TestRefusedSessions(t *testing.T) {
	own, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	token := newToken()
	for _, c := range []struct {
		server greeting
		want   string
	}{
		{greeting{Protocol: 1, BootID: "another", CPUs: []int{0, 1}, Token: token}, "another node"},
		{greeting{Protocol: 1, BootID: own, CPUs: []int{1023}, Token: token}, "share no CPU"},
		{greeting{Protocol: 7, BootID: own, CPUs: []int{0}, Token: token}, "another version"},
		{greeting{Protocol: 1, Error: "it has had enough"}, "it has had enough"},
		{greeting{Protocol: 1, BootID: own, CPUs: []int{0}}, "not complete"},
	} {
		if _, err := newTestClient(t, fakeServer(t, c.server)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.server, err, c.want)
		}
	}
}

func goodOrder() order {
	return order{
		Verb: listen, WarmUp: time.Millisecond, Length: time.Second, CPU: 1, Port: DefaultPort,
		Point: Point{Test: RequestResponse, RequestBytes: 64, ResponseBytes: 64, Connections: 1},
	}
}

func TestCheckOrder(t *testing.T) {
	if got, err := checkOrder(goodOrder(), []int{0, 1}); err != nil || got.Verb != listen || !got.NonBlocking {
		t.Errorf("a good order: %+v, %v", got, err)
	}
	for name, spoil := range map[string]func(*order){
		"drive":             func(o *order) { o.Verb = drive },
		"CPU":               func(o *order) { o.CPU = 2 },
		"negative CPU":      func(o *order) { o.CPU = -1 },
		"long":              func(o *order) { o.Length = maxRun + 1 },
		"no length":         func(o *order) { o.Length = 0 },
		"negative warm-up":  func(o *order) { o.WarmUp = -1 },
		"long warm-up":      func(o *order) { o.WarmUp = maxWarmUp + 1 },
		"many connections":  func(o *order) { o.Point.Connections = 2 },
		"test":              func(o *order) { o.Point.Test = "flood" },
		"no request":        func(o *order) { o.Point.RequestBytes = 0 },
		"large request":     func(o *order) { o.Point.RequestBytes = maxMessage + 1 },
		"negative request":  func(o *order) { o.Point.RequestBytes = -1 },
		"no response":       func(o *order) { o.Point.ResponseBytes = 0 },
		"large response":    func(o *order) { o.Point.ResponseBytes = maxMessage + 1 },
		"stream, responses": func(o *order) { o.Point.Test = Stream },
		"crr, no token":     func(o *order) { o.Point.Test, o.Point.RequestBytes = ConnectRequestResponse, tokenBytes-1 },
	} {
		o := goodOrder()
		spoil(&o)
		if got, err := checkOrder(o, []int{0, 1}); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
}

// What a stranger says reaches the worker only within bounds.
func FuzzOrder(f *testing.F) {
	good, err := json.Marshal(goodOrder())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(good, '\n'))
	f.Add([]byte(`{"verb":"listen","token":"x","inherited":9,"interrupts":true,"at":{"tcp":"[::1]:1","unix":"/etc/x"},"point":{"connections":1},"verify":true,"length_ns":1}` + "\n"))
	f.Add([]byte("{}\n"))
	f.Add([]byte(`{"verb":"listen","length_ns":1e300}` + "\n"))
	f.Fuzz(func(t *testing.T, line []byte) {
		var o order
		if readLine(bufio.NewReaderSize(bytes.NewReader(line), maxLine), &o) != nil {
			return
		}
		clean, err := checkOrder(o, []int{0, 1})
		if err != nil {
			return
		}
		p := clean.Point
		if clean.Verb != listen || clean.Inherited != 0 || clean.Token != "" || clean.At != (endpoint{}) || clean.Interrupts || !clean.NonBlocking {
			t.Errorf("passed on: %+v", clean)
		}
		if clean.Length <= 0 || clean.Length > maxRun || clean.CPU < 0 || clean.CPU > 1 || p.Connections != 1 {
			t.Errorf("out of bounds: %+v", clean)
		}
		if !clean.Verify && (p.RequestBytes < 1 || p.RequestBytes > maxMessage || p.ResponseBytes < 0 || p.ResponseBytes > maxMessage) {
			t.Errorf("out of bounds: %+v", clean)
		}
	})
}
