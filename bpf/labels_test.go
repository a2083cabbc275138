package bpf

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// The labels are made from the enumerators' names, so that no one has to look
// up which counter is which.
func TestLabelsMatchEnumerators(t *testing.T) {
	spec, err := LoadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		enum, prefix, end string
		labels            []string
	}{
		{"message_outcome", "MESSAGE_", "MESSAGE_OUTCOMES", MessageLabels[:]},
		{"connection_outcome", "CONNECTION_", "CONNECTION_OUTCOMES", ConnectionLabels[:]},
		{"event", "EVENT_", "EVENTS", EventLabels[:]},
	} {
		t.Run(tc.enum, func(t *testing.T) {
			var e *btf.Enum
			if err := spec.Types.TypeByName(tc.enum, &e); err != nil {
				t.Fatal(err)
			}
			for _, v := range e.Values {
				if v.Name == tc.end {
					if int(v.Value) != len(tc.labels) {
						t.Errorf("%d labels for %d enumerators", len(tc.labels), v.Value)
					}
					continue
				}
				want := strings.ToLower(strings.TrimPrefix(v.Name, tc.prefix))
				if int(v.Value) >= len(tc.labels) || tc.labels[v.Value] != want {
					t.Errorf("%s has no label %q", v.Name, want)
				}
			}
		})
	}
}
