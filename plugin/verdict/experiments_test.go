package verdict

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/uring"
)

func testLab() lab { return lab{deadline: time.Now().Add(20 * time.Second), settle: time.Second} }

// TestOnPlainTCP: plain TCP is what the experiments expect of the kernel, so it
// passes them, with every byte carried by TCP.
func TestOnPlainTCP(t *testing.T) {
	for name, e := range experiments {
		t.Run(name, func(t *testing.T) {
			f, err := e(testLab())
			if err != nil {
				t.Fatal(err)
			}
			if f.Fault != "" || f.Connections == 0 || f.Sent == 0 || f.ByTCP != f.Sent {
				t.Errorf("%+v", f)
			}
			switch name {
			case expWaiting:
				if f.Counted != f.Waiting || f.Waiting != firstWaiting+secondWaiting {
					t.Errorf("%+v", f)
				}
			case expSplice:
				want := []string{"splice(2)", "sendfile(2)"}
				if !noRing() {
					want = append(want, "io_uring's splice")
				}
				if f.Spliced != spliceWorks || !slices.Equal(f.NotRefused, want) || (f.NoRing != "") != noRing() {
					t.Errorf("%+v", f)
				}
			case expFlood:
				if f.Charged < f.Unread || f.Unread != floodFirst || !f.Stopped || !f.Released || f.Accepted >= floodStop {
					t.Errorf("%+v", f)
				}
			}
		})
	}
}

// noRing tells if io_uring cannot be used here.
func noRing() bool {
	ring, err := uring.New()
	return err != nil || ring.Close() != nil
}

// guarded is a call that a guard refuses on TCP sockets.
func guarded(call splicer) splicer {
	return splicer{call.name, func(in, out, n int) (int, error) {
		if domain, err := unix.GetsockoptInt(in, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
			return 0, unix.EINVAL
		}
		return call.move(in, out, n)
	}}
}

// blind is a call that sees nothing on TCP sockets, and is not refused.
func blind(call splicer) splicer {
	call = guarded(call)
	return splicer{call.name, func(in, out, n int) (int, error) {
		n, err := call.move(in, out, n)
		if errors.Is(err, unix.EINVAL) {
			err = unix.EAGAIN
		}
		return n, err
	}}
}

// TestSpliceSees: a guard has to refuse each of the calls, and nothing else.
func TestSpliceSees(t *testing.T) {
	a, b := splicers[0], splicers[1]
	refuses := splicer{b.name, func(int, int, int) (int, error) { return 0, unix.EINVAL }}
	for name, tc := range map[string]struct {
		calls      []splicer
		spliced    string
		notRefused []string
		fault      string
	}{
		"no guard":     {[]splicer{a, b}, spliceWorks, []string{a.name, b.name}, ""},
		"guard":        {[]splicer{guarded(a), guarded(b)}, spliceRefused, nil, ""},
		"misses one":   {[]splicer{guarded(a), blind(b)}, spliceBlind, []string{b.name}, ""},
		"lets one go":  {[]splicer{guarded(a), b}, spliceBlind, []string{b.name}, ""},
		"refuses more": {[]splicer{guarded(a), refuses}, spliceRefused, nil, b.name + " from a socket that is not accelerated fails"},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := testLab().spliceBy(tc.calls)
			if err != nil || f.Spliced != tc.spliced || !slices.Equal(f.NotRefused, tc.notRefused) || !strings.HasPrefix(f.Fault, tc.fault) ||
				(f.Fault == "") != (tc.fault == "") {
				t.Errorf("%+v, %v", f, err)
			}
		})
	}
}

// TestRingTellsErrors: a refusal is one, and nothing waits for ever.
func TestRingTellsErrors(t *testing.T) {
	if noRing() {
		t.Skip("needs io_uring")
	}
	l := testLab()
	r, w, closePipe, err := newPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer closePipe()
	if n, err := l.spliceByRing(r, w, 1); n != 0 || !errors.Is(err, unix.EINVAL) { // to itself
		t.Errorf("%d, %v", n, err)
	}
	_, out, closeOther, err := newPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer closeOther()
	if n, err := l.spliceByRing(r, out, 1); n != 0 || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("from an empty pipe: %d, %v", n, err)
	}
}

// TestFlowSees: the reader notices every kind of damage.
func TestFlowSees(t *testing.T) {
	stream := make([]byte, 0, shuffleBytes)
	for p := newPattern(7); len(stream) < shuffleBytes; {
		stream = append(stream, p.at(len(stream), shuffleBytes-len(stream))...)
	}
	const at, n = 300_000, 5000
	swapped := slices.Concat(stream[:at], stream[at+n:at+2*n], stream[at:at+n], stream[at+2*n:])
	flipped := slices.Clone(stream)
	flipped[at] ^= 1
	for name, tc := range map[string]struct {
		sent []byte
		ok   bool
	}{
		"intact":         {stream, true},
		"out of order":   {swapped, false},
		"one bit":        {flipped, false},
		"missing":        {slices.Concat(stream[:at], stream[at+n:]), false},
		"last missing":   {stream[:len(stream)-1], false},
		"twice":          {slices.Concat(stream[:at+n], stream[at:]), false},
		"more":           {append(slices.Clip(stream), 0), false},
		"another stream": {bytes.Repeat([]byte{1}, shuffleBytes), false},
	} {
		t.Run(name, func(t *testing.T) {
			l := testLab()
			client, server, err := l.connect(overIPv4())
			if err != nil {
				t.Fatal(err)
			}
			defer server.close()
			written := make(chan error, 1)
			go func() {
				err := l.send(client, tc.sent)
				_ = unix.Shutdown(client.fd, unix.SHUT_WR)
				written <- err
			}()
			f := newFlow(l, client, server, 7)
			f.sent, f.stuck = shuffleBytes, true
			err = f.read()
			if tc.ok && err != nil || !tc.ok && !errors.Is(err, errWrong) {
				t.Error(err)
			}
			_ = unix.Shutdown(client.fd, unix.SHUT_RDWR) // the writer may wait
			<-written
			client.close()
		})
	}
}

func TestExpectSees(t *testing.T) {
	l := testLab()
	client, server, err := l.connect(overIPv4())
	if err != nil {
		t.Fatal(err)
	}
	defer client.close()
	defer server.close()
	if err := l.send(client, []byte("abcdef")); err != nil {
		t.Fatal(err)
	}
	if err := l.expect(server, []byte("abd")); !errors.Is(err, errWrong) {
		t.Error(err)
	}
	if err := l.expectEOF(server); !errors.Is(err, errWrong) {
		t.Errorf("bytes instead of the end: %v", err)
	}
	short := lab{deadline: time.Now().Add(10 * time.Millisecond)}
	if err := short.expect(server, []byte("x")); !errors.Is(err, errDeadline) {
		t.Errorf("nothing comes: %v", err)
	}
	if err := unix.Shutdown(client.fd, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	if err := l.expect(server, []byte("x")); !errors.Is(err, errWrong) {
		t.Errorf("the end instead of bytes: %v", err)
	}
}

// TestWakerSees: an epoll that watches nothing is one that does not wake.
func TestWakerSees(t *testing.T) {
	for _, tc := range []struct {
		name  string
		watch bool
		fault string
	}{
		{"silent", false, "does not report the first bytes"},
		{"edge-triggered as level-triggered", true, "does not report bytes that came while others were unread"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := waker{lab: testLab()}
			w.settle = 200 * time.Millisecond
			var err error
			if w.client, w.server, err = w.connect(overIPv4()); err != nil {
				t.Fatal(err)
			}
			defer w.client.close()
			defer w.server.close()
			if w.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			defer unix.Close(w.epoll)
			if tc.watch {
				event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}
				if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, w.server.fd, &event); err != nil {
					t.Fatal(err)
				}
			}
			var f finding
			fault, err := w.rounds(&f, newPattern(5))
			if err != nil || !strings.Contains(fault, tc.fault) {
				t.Errorf("%q, %v", fault, err)
			}
		})
	}
}

func TestPattern(t *testing.T) {
	p := newPattern(1)
	var b []byte
	for len(b) < 3*patternLength {
		b = append(b, p.at(len(b), 1000)...)
	}
	if !p.matches(0, b) || !p.matches(12345, b[12345:]) {
		t.Error("a stream does not match itself")
	}
	if p.matches(1, b) || newPattern(2).matches(0, b) {
		t.Error("different streams match")
	}
	if p.matches(0, append(slices.Clip(b[:100]), b[101:]...)) {
		t.Error("a missing byte is not seen")
	}
}

// serveRequests runs a worker on the requests and returns its replies.
func serveRequests(t *testing.T, table map[string]experiment, requests ...request) []reply {
	t.Helper()
	in, requestWriter := io.Pipe()
	replyReader, out := io.Pipe()
	exit := make(chan int, 1)
	go func() { exit <- serve(in, out, table) }()
	d := json.NewDecoder(replyReader)
	var replies []reply
	read := func() {
		var r reply
		if err := d.Decode(&r); err != nil {
			t.Fatal(err)
		}
		replies = append(replies, r)
	}
	read() // the network is up
	for _, r := range requests {
		if err := json.NewEncoder(requestWriter).Encode(r); err != nil {
			t.Fatal(err)
		}
		read()
	}
	requestWriter.Close()
	select {
	case code := <-exit:
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
	case <-time.After(time.Minute):
		t.Error("the worker outlives its parent")
	}
	return replies
}

func TestServe(t *testing.T) {
	table := map[string]experiment{
		"works": func(l lab) (finding, error) {
			return finding{Sent: uint64(l.settle)}, nil
		},
		"fails": func(lab) (finding, error) { return finding{}, io.ErrUnexpectedEOF },
	}
	replies := serveRequests(t, table,
		request{Experiment: "works", Settle: 7}, request{Experiment: "fails"}, request{Experiment: "unheard of"})
	if r := replies[1]; r.Error != "" || r.Finding.Sent != 7 {
		t.Errorf("%+v", r)
	}
	if r := replies[2]; r.Error != io.ErrUnexpectedEOF.Error() {
		t.Errorf("%+v", r)
	}
	if r := replies[3]; !strings.Contains(r.Error, "unheard of") {
		t.Errorf("%+v", r)
	}
}

// TestServeEnds: a worker goes with its parent even when it hangs.
func TestServeEnds(t *testing.T) {
	in, requests := io.Pipe()
	started := make(chan bool)
	exit := make(chan int, 1)
	go func() {
		exit <- serve(in, io.Discard, map[string]experiment{"hangs": func(lab) (finding, error) {
			close(started)
			select {}
		}})
	}()
	if err := json.NewEncoder(requests).Encode(request{Experiment: "hangs"}); err != nil {
		t.Fatal(err)
	}
	<-started
	requests.Close()
	select {
	case <-exit:
	case <-time.After(time.Minute):
		t.Error("the worker outlives its parent")
	}
}

func TestWorkerArguments(t *testing.T) {
	if code := Worker([]string{"more"}, strings.NewReader(""), io.Discard); code != 2 {
		t.Errorf("exit code %d", code)
	}
	if code := Worker(nil, strings.NewReader("no JSON"), io.Discard); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
