package main

import (
	"encoding/json"
	"fmt"
	"strings"
)

const (
	iperfBytes = 200 << 20 // are sent in each test, unless it says otherwise
	// iperfUnderWay is how many bytes of a connection may still be under way when
	// iperf3 stops counting, at most: unread ones, and TCP's.
	iperfUnderWay = 32 << 20
)

func iperfCases() []testCase {
	return []testCase{{
		software: "iperf3", name: "both ways", packages: []string{"iperf3"}, blocking: "iperf3 connects with blocking sockets", share: 0.3,
		run: func(s *scene) (string, error) {
			client, server, err := s.twoPods()
			if err != nil {
				return "", err
			}
			if _, err := server.start("iperf3", "-s"); err != nil {
				return "", err
			}
			if err := server.listens(5201); err != nil {
				return "", err
			}
			var out strings.Builder
			for _, test := range []struct {
				bytes, connections int64 // 0: it ends when one direction has sent all
				args               []string
			}{
				{iperfBytes, 1, nil}, {iperfBytes, 1, []string{"-R"}}, {iperfBytes, 4, []string{"-P", "4"}},
				{5 << 20, 1, []string{"-l", "1000"}}, {iperfBytes, 0, []string{"--bidir"}},
			} {
				text, err := client.run("iperf3", append([]string{"-c", server.ip.String(), "-J", "-n", fmt.Sprint(test.bytes)}, test.args...)...)
				if err != nil {
					return "", err
				}
				type sum struct{ Bytes int64 }
				var report struct {
					End struct {
						Sent     sum `json:"sum_sent"`
						Received sum `json:"sum_received"`
					}
					Error string
				}
				if err := json.Unmarshal([]byte(text), &report); err != nil {
					return "", err
				}
				sent, received := report.End.Sent.Bytes, report.End.Received.Bytes
				fmt.Fprintf(&out, "%v: error %q, all sent: %v, and received: %v\n", test.args, report.Error,
					test.connections == 0 || sent >= test.bytes,
					received > 0 && (test.connections == 0 || received <= sent && received >= sent-test.connections*iperfUnderWay))
			}
			return out.String(), nil
		},
	}}
}
