package bench

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCongestionControl: both ends of a connection have what was asked for. Every
// kernel has reno.
func TestCongestionControl(t *testing.T) {
	at := endpoint{TCP: netip.MustParseAddrPort("127.0.0.1:0")}
	open := func() *socket {
		t.Helper()
		s, err := newSocket(unix.AF_INET, false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.close() })
		if err := s.setCongestionControl("reno"); err != nil {
			t.Fatal(err)
		}
		return s
	}
	server, client := open(), open()
	port, err := server.listen(at)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.connect(at.withPort(port).sockaddr()); err != nil {
		t.Fatal(err)
	}
	accepted, err := server.accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.close()
	for what, s := range map[string]*socket{"client": client, "accepted": accepted} {
		got, err := unix.GetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		if err != nil || strings.TrimRight(got, "\x00") != "reno" {
			t.Errorf("%s: congestion control %q, %v", what, got, err)
		}
	}
	if err := client.setCongestionControl("nonsense"); err == nil || !strings.Contains(err.Error(), "set congestion control nonsense") {
		t.Errorf("a congestion control that does not exist: %v", err)
	}
}

// TestCongestionControlOfRuns: a run's sockets are told.
func TestCongestionControlOfRuns(t *testing.T) {
	for _, p := range []Point{point(Stream, 64, 0), point(ConnectRequestResponse, 64, 64), connections(16, point(RequestResponse, 64, 64))} {
		r := testRunner(t, newLoopbackSite(t))
		r.parameters.Congestion = "reno"
		if _, _, err := r.run(t.Context(), p, false, false); err != nil {
			t.Errorf("%s: %v", p, err)
		}
		r.parameters.Congestion = "nonsense"
		if _, _, err := r.run(t.Context(), p, false, false); err == nil || !strings.Contains(err.Error(), "congestion control nonsense") {
			t.Errorf("%s: a run with a congestion control that does not exist: %v", p, err)
		}
	}
}
