package bench

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Sizes in bytes. Streams: message sizes. rr: requests against responses.
var (
	streamSizes   = []int{64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10}
	requestSizes  = []int{64, 128, 256}
	responseSizes = []int{64, 1 << 10, 8 << 10, 30000}
	// fewSizes are those of the paths that the default set does not measure in full.
	fewSizes = []int{64, 4 << 10, 64 << 10}
	// manyConnections are the numbers of connections beside the one of all else.
	manyConnections = []int{16, 256}
)

const (
	smallMessage = 64       // crr, and rr on many connections
	bulkMessage  = 64 << 10 // streams on many connections
)

// Bounds of --sizes.
const (
	minSize = 1
	maxSize = 16 << 20
)

// allPaths are measured in this order: a Service brings connection tracking, which
// every later run on the node would pay for.
var allPaths = []Path{PodIP, IPv6, Loopback, ServiceIP}

var (
	allTests      = []Test{Stream, RequestResponse, ConnectRequestResponse}
	allPlacements = []Placement{SameCPU, CrossCPU}
)

// The sets of points.
const (
	quickSet   = "quick"
	defaultSet = "default"
	fullSet    = "full"
)

// A selection says which points of a set are measured.
type selection struct {
	set        string
	tests      []Test // of these; empty: all
	paths      []Path
	placements []Placement
	sizes      []int // in place of the set's message and response sizes
}

// points lists the points of the selection on a machine with that many CPUs.
func (s selection) points(cpus int) ([]Point, error) {
	var points []Point
	switch {
	case s.set == quickSet && s.sizes == nil:
		points = quickPoints()
	case s.set == quickSet:
		for _, bytes := range s.sizes {
			points = append(points, rr(PodIP, SameCPU, smallMessage, bytes))
		}
		points = append(points, messagePoints(PodIP, SameCPU, s.sizes)...)
		points = append(points, crr(PodIP, SameCPU))
	default:
		for _, path := range allPaths {
			points = append(points, s.pathPoints(path)...)
		}
	}
	points = slices.DeleteFunc(points, func(p Point) bool {
		return !allowed(s.tests, p.Test) || !allowed(s.paths, p.Path) || !allowed(s.placements, p.Placement) ||
			p.Placement == CrossCPU && cpus < 2
	})
	if len(points) == 0 {
		return nil, fmt.Errorf("the %s set has no such points on %d CPUs: loosen --tests, --paths, --placements or --sizes", s.set, cpus)
	}
	return points, nil
}

func allowed[T comparable](list []T, v T) bool { return len(list) == 0 || slices.Contains(list, v) }

// pathPoints are a path's points in the default and the full set.
func (s selection) pathPoints(path Path) []Point {
	if s.set == defaultSet && path != PodIP {
		sizes := fewSizes
		if s.sizes != nil {
			sizes = s.sizes
		}
		return append(messagePoints(path, SameCPU, sizes), rr(path, SameCPU, smallMessage, smallMessage))
	}
	streams, responses := streamSizes, responseSizes
	if s.sizes != nil {
		streams, responses = s.sizes, s.sizes
	}
	var points []Point
	for _, placement := range allPlacements {
		points = append(points, messagePoints(path, placement, streams)...)
		for _, bytes := range streams {
			points = append(points, noDelay(stream(path, placement, bytes)))
		}
		for _, request := range requestSizes {
			for _, response := range responses {
				points = append(points, rr(path, placement, request, response))
			}
		}
		points = append(points, crr(path, placement))
		for _, n := range manyConnections {
			points = append(points, connections(n, rr(path, placement, smallMessage, smallMessage)),
				connections(n, stream(path, placement, bulkMessage)))
		}
	}
	return points
}

// messagePoints are streams with Nagle's algorithm on.
func messagePoints(path Path, placement Placement, sizes []int) []Point {
	var points []Point
	for _, bytes := range sizes {
		points = append(points, stream(path, placement, bytes))
	}
	return points
}

func stream(path Path, placement Placement, bytes int) Point {
	return Point{Test: Stream, Path: path, Placement: placement, RequestBytes: bytes, Connections: 1}
}

func noDelay(p Point) Point {
	p.NoDelay = true
	return p
}

func rr(path Path, placement Placement, request, response int) Point {
	return Point{Test: RequestResponse, Path: path, Placement: placement, RequestBytes: request, ResponseBytes: response, NoDelay: true, Connections: 1}
}

func crr(path Path, placement Placement) Point {
	return Point{Test: ConnectRequestResponse, Path: path, Placement: placement, RequestBytes: smallMessage, ResponseBytes: smallMessage, Connections: 1}
}

func connections(n int, p Point) Point {
	p.Connections = n
	return p
}

// quickPoints is the set of --quick.
func quickPoints() []Point {
	return []Point{
		rr(PodIP, SameCPU, 64, 64), rr(PodIP, SameCPU, 16<<10, 16<<10),
		stream(PodIP, SameCPU, 64<<10), noDelay(stream(PodIP, SameCPU, 64)),
		crr(PodIP, SameCPU),
		stream(PodIP, CrossCPU, 64<<10),
		rr(ServiceIP, SameCPU, 64, 64),
	}
}

// parameters fit the sets into their times.
func parameters(o options) Parameters {
	return Parameters{
		Set: o.selection.set, Repeats: o.repeats, MaxPairs: o.maxPairs, WarmUp: 10 * time.Millisecond, Length: o.length,
		NonBlocking: o.sockets == nonBlockingSockets, Unix: o.reference == unixReference,
		Congestion: o.congestion,
	}
}

// Bounds of what a run and a point may take.
const (
	minLength  = 200 * time.Millisecond // shorter runs say little
	maxLength  = time.Minute
	minRepeats = 5
	maxRepeats = 1000
	// defaultMaxPairs is where a point that stays uncertain is left at that.
	defaultMaxPairs = 25
)

func (p Parameters) validate() error {
	switch {
	case p.Repeats < minRepeats || p.Repeats > maxRepeats:
		return fmt.Errorf("--repeats %d: it is %d to %d; a median takes at least %d", p.Repeats, minRepeats, maxRepeats, minRepeats)
	case p.MaxPairs < p.Repeats || p.MaxPairs > maxRepeats:
		return fmt.Errorf("--max-pairs %d: it is --repeats, here %d, to %d", p.MaxPairs, p.Repeats, maxRepeats)
	case p.Length < minLength || p.Length > maxLength:
		return fmt.Errorf("--length %v: a run takes %v to %v", p.Length, minLength, maxLength)
	case p.WarmUp <= 0:
		return errors.New("a run needs a warm-up")
	}
	return nil
}

const (
	// runOverhead is what starting and ending a run takes on top of its length.
	runOverhead = 10 * time.Millisecond
	// beginAndEnd is making the node, verifying data and cleaning up.
	beginAndEnd = 2 * time.Second
)

// run is how long a run takes on an idle machine.
func (p Parameters) run() time.Duration { return p.WarmUp + p.Length + runOverhead }

// base is how long the least pairs of some points take on an idle machine, with what is
// missing of their reference.
func (p Parameters) base(points []Point, r *reference) time.Duration {
	return time.Duration(2*len(points)*p.Repeats+r.pending(points)) * p.run()
}

// costs is how long it takes to time the BPF programs at some points.
func (p Parameters) costs(points []Point) time.Duration {
	return time.Duration(len(costPoints(points))) * (p.run() - p.Length/2)
}

// estimate is how long a bench takes on an idle machine: at least, where every ratio is
// certain at once, and at most.
func (p Parameters) estimate(points []Point) (least, most time.Duration) {
	least = p.base(points, p.reference(points)) + p.costs(points) + beginAndEnd
	most = least + time.Duration(len(points)*(p.MaxPairs-p.Repeats)*2)*p.run()
	if limit := p.limit(); limit > 0 {
		most = min(most, max(least, limit))
	}
	return least, most
}

// howLong says how long a bench takes.
func (p Parameters) howLong(points []Point) string {
	least, most := p.estimate(points)
	least, most = least.Round(time.Second), most.Round(time.Second)
	if least == most {
		return fmt.Sprintf("about %v", least)
	}
	return fmt.Sprintf("about %v, with more pairs for uncertain ratios up to %v", least, most)
}

// limit is the time that a bench does not go over for the sake of more pairs; 0 is none.
// It is the set's, less a reserve for a machine on which a run has to be repeated.
func (p Parameters) limit() time.Duration {
	return map[string]time.Duration{quickSet: 19 * time.Second, defaultSet: 175 * time.Second}[p.Set]
}

// parseSizes reads a list such as 64,4KiB,64KiB.
func parseSizes(list string) ([]int, error) {
	var sizes []int
	for _, word := range strings.Split(list, ",") {
		number, unit := strings.TrimSpace(word), 1
		for suffix, bytes := range map[string]int{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30} {
			if n, ok := strings.CutSuffix(number, suffix); ok {
				number, unit = strings.TrimSpace(n), bytes
			}
		}
		n, err := strconv.Atoi(number)
		if err != nil {
			return nil, fmt.Errorf("--sizes: %q is no size: write bytes, or KiB or MiB", word)
		}
		if n < minSize || n > maxSize/unit {
			return nil, fmt.Errorf("--sizes: %q: a message has 1 B to 16 MiB", word)
		}
		if slices.Contains(sizes, n*unit) {
			return nil, fmt.Errorf("--sizes: %q is named twice", word)
		}
		sizes = append(sizes, n*unit)
	}
	slices.Sort(sizes)
	return sizes, nil
}

// parseChoice reads a list of some of all values; an empty one is all of them.
func parseChoice[T ~string](flag, list string, all []T) ([]T, error) {
	if list == "" {
		return nil, nil
	}
	var chosen []T
	for _, word := range strings.Split(list, ",") {
		v := T(strings.TrimSpace(word))
		if !slices.Contains(all, v) {
			return nil, fmt.Errorf("--%s: %q is none of %s", flag, word, joined(all))
		}
		chosen = append(chosen, v)
	}
	return chosen, nil
}

func joined[T ~string](all []T) string {
	words := make([]string, len(all))
	for i, v := range all {
		words[i] = string(v)
	}
	return strings.Join(words, ", ")
}
