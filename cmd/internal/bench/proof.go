package bench

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/skipstack/skipstack/bpf"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// enough is the part of the bytes, and of the connections, that must be explained.
const enough = 0.99

// lateClaim counts connections whose client a busy machine kept from the handshake for
// milliseconds: they stay plain by design.
var lateClaim = bpf.ConnectionLabels[bpf.DatapathConnectionOutcomeCONNECTION_LATE_CLAIM]

// Evidence is what a point's proof rests on.
type Evidence struct {
	Payload    uint64 // bytes that the applications sent
	TCP        uint64 // bytes that went by TCP, says TCP_INFO of their sockets
	Counters   datapath.Counters
	Connection uint64 // connections made
}

func (e *Evidence) add(m measured, c datapath.Counters) {
	e.Payload += m.payload()
	e.TCP += m.byTCP()
	e.Connection += m.client.Conns
	e.Counters = sum(e.Counters, c)
}

func sum(a, b datapath.Counters) datapath.Counters {
	total := datapath.Counters{
		Messages: maps.Clone(a.Messages), Connections: maps.Clone(a.Connections), Events: maps.Clone(a.Events),
	}
	if a.Messages == nil {
		return b
	}
	for label, n := range b.Messages {
		m := total.Messages[label]
		total.Messages[label] = datapath.Count{Messages: m.Messages + n.Messages, Bytes: m.Bytes + n.Bytes}
	}
	for label, n := range b.Connections {
		total.Connections[label] += n
	}
	for label, n := range b.Events {
		total.Events[label] += n
	}
	return total
}

func (e *Evidence) messages(outcome bpf.DatapathMessageOutcome) datapath.Count {
	return e.Counters.Messages[bpf.MessageLabels[outcome]]
}

func (e *Evidence) redirected() uint64 {
	return e.messages(bpf.DatapathMessageOutcomeMESSAGE_REDIRECTED).Bytes
}

// prove judges a point by the evidence of its plain and its accelerated runs. The
// reason is empty unless the proof failed.
func prove(plain, accelerated *Evidence) (Proof, string) {
	if reason := notPlain(plain); reason != "" {
		return Failed, "plain runs: " + reason
	}
	if reason := unexplained(accelerated); reason != "" {
		return Failed, reason
	}
	redirected := accelerated.redirected()
	part := func(bytes uint64) float64 { return float64(bytes) / float64(accelerated.Payload) }
	// The counters say what was meant to be redirected, TCP_INFO what was not:
	// both must agree.
	if part(redirected) >= enough && part(accelerated.TCP) <= 1-enough {
		return Proven, ""
	}
	overflow := accelerated.messages(bpf.DatapathMessageOutcomeMESSAGE_RECEIVER_FULL).Bytes
	if overflow > 0 {
		overflow += accelerated.messages(bpf.DatapathMessageOutcomeMESSAGE_UNACKNOWLEDGED).Bytes +
			accelerated.messages(bpf.DatapathMessageOutcomeMESSAGE_NOT_READ).Bytes
	}
	if part(redirected+overflow) >= enough && part(accelerated.TCP) <= part(overflow)+1-enough {
		return Overflow, ""
	}
	return Failed, fmt.Sprintf("of %d bytes sent %d were redirected and %d went by TCP%s",
		accelerated.Payload, redirected, accelerated.TCP, passed(accelerated))
}

// notPlain says what in the evidence of plain runs the datapath had a part in.
func notPlain(e *Evidence) string {
	for _, label := range slices.Sorted(maps.Keys(e.Counters.Messages)) {
		if n := e.Counters.Messages[label]; n.Messages > 0 {
			return fmt.Sprintf("the datapath saw %d messages (%s)", n.Messages, label)
		}
	}
	for _, label := range slices.Sorted(maps.Keys(e.Counters.Connections)) {
		if n := e.Counters.Connections[label]; n > 0 {
			return fmt.Sprintf("the datapath saw %d connections (%s)", n, label)
		}
	}
	if e.Payload == 0 {
		return "nothing was sent"
	}
	if float64(e.TCP) < enough*float64(e.Payload) {
		return fmt.Sprintf("only %d of %d bytes went by TCP", e.TCP, e.Payload)
	}
	return ""
}

// unexplained says which connections of the accelerated runs were not accelerated.
func unexplained(e *Evidence) string {
	if e.Payload == 0 {
		return "nothing was sent"
	}
	if lost := e.messages(bpf.DatapathMessageOutcomeMESSAGE_LOST_RACE).Messages; lost > 0 {
		return fmt.Sprintf("%d connections sent before the server was enrolled (lost_race)", lost)
	}
	enrolled := bpf.ConnectionLabels[bpf.DatapathConnectionOutcomeCONNECTION_ENROLLED]
	for _, label := range slices.Sorted(maps.Keys(e.Counters.Connections)) {
		n := e.Counters.Connections[label]
		if n == 0 || label == enrolled || label == lateClaim && float64(n) <= (1-enough)*float64(e.Connection) {
			continue
		}
		return fmt.Sprintf("%d of %d connections were not accelerated (%s)", n, e.Connection, label)
	}
	return ""
}

// passed lists why messages were not redirected.
func passed(e *Evidence) string {
	var reasons []string
	redirected := bpf.MessageLabels[bpf.DatapathMessageOutcomeMESSAGE_REDIRECTED]
	for _, label := range slices.Sorted(maps.Keys(e.Counters.Messages)) {
		if n := e.Counters.Messages[label]; n.Messages > 0 && label != redirected {
			reasons = append(reasons, fmt.Sprintf("%s %d", label, n.Bytes))
		}
	}
	if len(reasons) == 0 {
		return ""
	}
	return " (bytes passed: " + strings.Join(reasons, ", ") + ")"
}
