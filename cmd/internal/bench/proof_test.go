package bench

import (
	"strings"
	"testing"

	"github.com/skipstack/skipstack/plugin/datapath"
)

func counted(messages map[string]uint64, connections map[string]uint64) datapath.Counters {
	c := datapath.Counters{Messages: map[string]datapath.Count{}, Connections: connections}
	for label, bytes := range messages {
		n := datapath.Count{Bytes: bytes}
		if bytes > 0 {
			n.Messages = 1 + bytes/64
		}
		c.Messages[label] = n
	}
	return c
}

func TestProve(t *testing.T) {
	plain := Evidence{Payload: 1000, TCP: 1000, Connection: 5}
	accelerated := func(tcp uint64, messages, connections map[string]uint64) Evidence {
		return Evidence{Payload: 100000, TCP: tcp, Connection: 1000, Counters: counted(messages, connections)}
	}
	for _, c := range []struct {
		name               string
		plain, accelerated Evidence
		want               Proof
		reason             string
	}{
		{"all redirected", plain, accelerated(0, map[string]uint64{"redirected": 100000}, map[string]uint64{"enrolled": 1000}), Proven, ""},
		{"all but 1 %", plain, accelerated(1000, map[string]uint64{"redirected": 99000, "not_read": 1000}, nil), Proven, ""},
		{"receiver full", plain, accelerated(20000, map[string]uint64{"redirected": 80000, "receiver_full": 5000, "unacknowledged": 12000, "not_read": 3000}, nil), Overflow, ""},
		{"passed without overflow", plain, accelerated(20000, map[string]uint64{"redirected": 80000, "unacknowledged": 20000}, nil), Failed, "unacknowledged 20000"},
		{"overflow does not explain the rest", plain, accelerated(20000, map[string]uint64{"redirected": 80000, "receiver_full": 10000, "memory": 10000}, nil), Failed, "memory 10000"},
		{"counted as redirected, but went by TCP", plain, accelerated(50000, map[string]uint64{"redirected": 100000}, nil), Failed, "50000 went by TCP"},
		{"switched off", plain, accelerated(100000, map[string]uint64{"switched_off": 100000}, map[string]uint64{"enrolled": 5}), Failed, "switched_off 100000"},
		{"the datapath saw nothing", plain, accelerated(100000, nil, nil), Failed, "0 were redirected"},
		{"lost race", plain, accelerated(0, map[string]uint64{"redirected": 100000, "lost_race": 1}, nil), Failed, "lost_race"},
		{"not enrolled", plain, accelerated(0, map[string]uint64{"redirected": 100000}, map[string]uint64{"enrolled": 999, "blocking": 1}), Failed, "1 of 1000 connections were not accelerated (blocking)"},
		{"a few late claims", plain, accelerated(1000, map[string]uint64{"redirected": 99000}, map[string]uint64{"late_claim": 10}), Proven, ""},
		{"many late claims", plain, accelerated(1000, map[string]uint64{"redirected": 99000}, map[string]uint64{"late_claim": 11}), Failed, "late_claim"},
		{"nothing sent", plain, Evidence{}, Failed, "nothing was sent"},
		{"plain was redirected", Evidence{Payload: 1000, TCP: 1000, Counters: counted(map[string]uint64{"redirected": 64}, nil)}, accelerated(0, map[string]uint64{"redirected": 100000}, nil), Failed, "plain runs: the datapath saw 2 messages (redirected)"},
		{"plain was seen", Evidence{Payload: 1000, TCP: 1000, Counters: counted(nil, map[string]uint64{"remote_server": 1})}, accelerated(0, map[string]uint64{"redirected": 100000}, nil), Failed, "remote_server"},
		{"plain did not go by TCP", Evidence{Payload: 1000, TCP: 900}, accelerated(0, map[string]uint64{"redirected": 100000}, nil), Failed, "900 of 1000"},
		{"no plain traffic", Evidence{}, accelerated(0, map[string]uint64{"redirected": 100000}, nil), Failed, "plain runs: nothing was sent"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, reason := prove(&c.plain, &c.accelerated)
			if got != c.want || !strings.Contains(reason, c.reason) || (reason != "") != (got == Failed) {
				t.Errorf("%s (%s), want %s (%s)", got, reason, c.want, c.reason)
			}
		})
	}
}

func TestEvidenceAddsUp(t *testing.T) {
	var e Evidence
	m := measured{client: tally{Sent: 100, TCPSent: 10, Asked: 50, Conns: 2}, server: tally{Sent: 60, TCPSent: 1, Asked: 60}}
	for range 2 {
		e.add(m, counted(map[string]uint64{"redirected": 139}, map[string]uint64{"enrolled": 2}))
	}
	// The client's connections were sampled: 10 of 50 bytes stands for 20 of 100.
	if e.Payload != 320 || e.TCP != 42 || e.Connection != 4 || e.redirected() != 278 || e.Counters.Connections["enrolled"] != 4 {
		t.Errorf("%+v", e)
	}
}
