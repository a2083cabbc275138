package main

import (
	"encoding/json"
	"fmt"
	"strings"
)

// iperfBytes are sent in each test.
const iperfBytes = 200 << 20

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
			for _, args := range [][]string{{}, {"-R"}, {"-P", "4"}, {"-l", "1000", "-n", "5M"}, {"--bidir"}} {
				text, err := client.run("iperf3", append([]string{"-c", server.ip.String(), "-J", "-n", fmt.Sprint(iperfBytes)}, args...)...)
				if err != nil {
					return "", err
				}
				var report struct {
					End struct {
						Sent     struct{ Bytes int64 } `json:"sum_sent"`
						Received struct{ Bytes int64 } `json:"sum_received"`
					}
					Error string
				}
				if err := json.Unmarshal([]byte(text), &report); err != nil {
					return "", err
				}
				fmt.Fprintf(&out, "%v: error %q, arrived %v\n", args, report.Error, report.End.Received.Bytes > 0)
			}
			return out.String(), nil
		},
	}}
}
