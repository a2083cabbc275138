package bench

import (
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Test is an experiment, by netperf's definitions.
type Test string

const (
	// Stream sends messages one way; its rate is bytes read per second.
	Stream Test = "stream"
	// RequestResponse exchanges one message each way at a time on one connection.
	RequestResponse Test = "rr"
	// ConnectRequestResponse opens and closes a connection for each exchange.
	ConnectRequestResponse Test = "crr"
)

// Path is how the client reaches the server.
type Path string

const (
	PodIP     Path = "pod"      // the server pod's address
	ServiceIP Path = "service"  // an address that the node translates (DNAT)
	IPv6      Path = "ipv6"     // the server pod's IPv6 address
	Loopback  Path = "loopback" // 127.0.0.1, client and server in one pod
)

// Placement is which CPUs client and server run on.
type Placement string

const (
	SameCPU  Placement = "same-cpu"
	CrossCPU Placement = "cross-cpu"
)

// A Point is one thing to measure.
type Point struct {
	Test          Test      `json:"test"`
	Path          Path      `json:"path"`
	Placement     Placement `json:"placement"`
	RequestBytes  int       `json:"request_bytes"`  // of a stream: bytes of each send
	ResponseBytes int       `json:"response_bytes"` // 0 for a stream
	NoDelay       bool      `json:"nodelay"`
	Connections   int       `json:"connections"`
}

func (p Point) String() string {
	s := fmt.Sprintf("%s %s %s %s", p.Test, p.Path, p.Placement, p.message())
	if p.NoDelay {
		s += " nodelay"
	}
	return s
}

// message describes the messages' sizes.
func (p Point) message() string {
	request, unit := size(p.RequestBytes)
	if p.Test == Stream {
		return request + " " + unit
	}
	response, responseUnit := size(p.ResponseBytes)
	if unit != responseUnit {
		request += " " + unit
	}
	return request + "/" + response + " " + responseUnit
}

func size(bytes int) (number, unit string) {
	if bytes >= 1<<10 && bytes%(1<<10) == 0 {
		return strconv.Itoa(bytes >> 10), "KiB"
	}
	return strconv.Itoa(bytes), "B"
}

// Parameters are how long and how often each point is measured.
type Parameters struct {
	Repeats int           `json:"repeats"` // of plain and accelerated each
	WarmUp  time.Duration `json:"warm_up_ns"`
	Length  time.Duration `json:"length_ns"` // of one run, without its warm-up
	// NonBlocking: the generators use O_NONBLOCK sockets and poll(2), as event
	// loops do, instead of blocking ones.
	NonBlocking bool `json:"non_blocking"`
}

// minLength is the shortest run whose result is worth something.
const minLength = 200 * time.Millisecond

func (p Parameters) validate() error {
	switch {
	case p.Repeats < 5:
		return errors.New("a median takes at least 5 repeats")
	case p.Length < minLength:
		return fmt.Errorf("a run takes at least %v", minLength)
	case p.WarmUp <= 0:
		return errors.New("a run needs a warm-up")
	}
	return nil
}

// quickPoints is the set of --quick. Pod IP comes first: its plain runs must not pay
// for the connection tracking that a Service brings.
func quickPoints(cpus int) []Point {
	base := Point{Path: PodIP, Placement: SameCPU, Connections: 1}
	rr := func(request, response int) Point {
		p := base
		p.Test, p.RequestBytes, p.ResponseBytes, p.NoDelay = RequestResponse, request, response, true
		return p
	}
	stream := func(bytes int, noDelay bool) Point {
		p := base
		p.Test, p.RequestBytes, p.NoDelay = Stream, bytes, noDelay
		return p
	}
	crr := base
	crr.Test, crr.RequestBytes, crr.ResponseBytes = ConnectRequestResponse, 64, 64
	service := rr(64, 64)
	service.Path = ServiceIP
	points := []Point{rr(64, 64), rr(16<<10, 16<<10), stream(64<<10, false), stream(64, true), crr}
	if cpus > 1 {
		cross := stream(64<<10, false)
		cross.Placement = CrossCPU
		points = append(points, cross)
	}
	return append(points, service)
}
