package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/skipstack/skipstack/bpf"
)

// Count is a number of messages and their bytes.
type Count struct {
	Messages uint64 `json:"messages"`
	Bytes    uint64 `json:"bytes"`
}

// Plus is the sum.
func (c Count) Plus(d Count) Count { return Count{c.Messages + d.Messages, c.Bytes + d.Bytes} }

// Counters is what became of messages and connections since the datapath was
// loaded, by the labels of package bpf.
type Counters struct {
	Messages    map[string]Count  `json:"messages"`
	Connections map[string]uint64 `json:"connections"`
	Events      map[string]uint64 `json:"events"` // and [EventSpliceRefused], [EventULPRefused]
}

// Labels of calls that the splice guard has refused.
const (
	EventSpliceRefused = "splice_refused"
	EventULPRefused    = "ulp_refused"
)

// Counters sums the counters of all CPUs, and adds the splice guard's.
func (s *Set) Counters() (Counters, error) {
	var perCPU []bpf.DatapathCounters
	if err := s.maps[bpf.DatapathMapSkipstackCount].Lookup(uint32(0), &perCPU); err != nil {
		return Counters{}, fmt.Errorf("read counters: %w", err)
	}
	c := Counters{Messages: map[string]Count{}, Connections: map[string]uint64{}, Events: map[string]uint64{}}
	for _, cpu := range perCPU {
		for i, label := range bpf.MessageLabels {
			n := c.Messages[label]
			n.Messages += cpu.Message[i].Messages
			n.Bytes += cpu.Message[i].Bytes
			c.Messages[label] = n
		}
		for i, label := range bpf.ConnectionLabels {
			c.Connections[label] += cpu.Connection[i]
		}
		for i, label := range bpf.EventLabels {
			c.Events[label] += cpu.Event[i]
		}
	}
	refused, err := s.guardRefusals()
	c.Events[EventSpliceRefused] = refused[bpf.GuardRefusalREFUSAL_SPLICE]
	c.Events[EventULPRefused] = refused[bpf.GuardRefusalREFUSAL_ULP]
	return c, err
}

// LabelRedirected is the label of messages that skipped the stack. All others
// went by TCP.
var LabelRedirected = bpf.MessageLabels[bpf.DatapathMessageOutcomeMESSAGE_REDIRECTED]

// Redirected is what skipped the stack.
func (c Counters) Redirected() Count { return c.Messages[LabelRedirected] }

// Passed is what recognised connections have sent by TCP.
func (c Counters) Passed() Count {
	var sum Count
	for _, label := range bpf.MessageLabels[firstPass:] {
		sum = sum.Plus(c.Messages[label])
	}
	return sum
}

// Since returns what was counted after an earlier reading.
func (c Counters) Since(earlier Counters) Counters {
	d := Counters{Messages: map[string]Count{}, Connections: map[string]uint64{}, Events: map[string]uint64{}}
	for k, n := range c.Messages {
		e := earlier.Messages[k]
		d.Messages[k] = Count{n.Messages - e.Messages, n.Bytes - e.Bytes}
	}
	for k, n := range c.Connections {
		d.Connections[k] = n - earlier.Connections[k]
	}
	for k, n := range c.Events {
		d.Events[k] = n - earlier.Events[k]
	}
	return d
}

// PodCounters is what one pod's connections have done.
type PodCounters struct {
	Live     uint64 // sockets of recognised connections that have not closed
	Enrolled uint64 // sockets ever enrolled
	// Accelerated is how many of the live ones may redirect; see [Set.Observe],
	// PodCounters leaves it 0.
	Accelerated uint64
	// Messages sent on connections that have closed.
	Redirected, Passed Count
	PassedBy           map[string]uint64 // messages, by the labels of package bpf
}

// PodCounters reads the counters of every attached pod, by cgroup id.
func (s *Set) PodCounters() (map[uint64]PodCounters, error) {
	pods := map[uint64]PodCounters{}
	var id uint64
	var v bpf.DatapathPodCounters
	it := s.maps[bpf.DatapathMapPodsCount].Iterate()
	for it.Next(&id, &v) {
		by, passed := passes(v.Passed[:])
		pods[id] = PodCounters{
			Live:       v.Live,
			Enrolled:   v.Enrolled,
			Redirected: Count{v.Redirected.Messages, v.Redirected.Bytes},
			Passed:     Count{passed, v.PassedBytes},
			PassedBy:   by,
		}
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read the pods' counters: %w", err)
	}
	return pods, nil
}

// Live is how many enrolled sockets the node has.
func (s *Set) Live() (uint64, error) {
	pods, err := s.PodCounters()
	var n uint64
	for _, p := range pods {
		n += p.Live
	}
	return n, err
}

// Enrolled is how many sockets the sockhash holds.
func (s *Set) Enrolled() (int, error) { return countKeys(s.maps[bpf.DatapathMapSocks]) }

// countKeys lists a sockhash that may change meanwhile: the kernel begins again when
// the key that it goes on from is gone (sock_hash_get_next_key()).
func countKeys(socks *ebpf.Map) (int, error) {
	var next bpf.DatapathSockKey
	keys := map[bpf.DatapathSockKey]struct{}{}
	err := socks.NextKey(nil, &next)
	for steps := 4 * socks.MaxEntries(); err == nil && steps > 0; steps-- {
		keys[next] = struct{}{}
		key := next
		err = socks.NextKey(&key, &next)
	}
	if err == nil {
		err = ebpf.ErrIterationAborted
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return len(keys), nil
	}
	return len(keys), fmt.Errorf("list the sockhash: %w", err)
}
