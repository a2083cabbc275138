package bench

import (
	"errors"
	"fmt"
	"strconv"
	"time"
)

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
