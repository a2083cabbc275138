package plugin

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

func TestInputIsBounded(t *testing.T) {
	const conf = `{"name":"n","cniVersion":"1.0.0"}`
	longest := append([]byte(conf), bytes.Repeat([]byte(" "), maxInput-len(conf))...)
	if in, err := decodeInput(longest); err != nil || in.name != "n" {
		t.Errorf("%d bytes: %v, %v", len(longest), in, err)
	}
	_, err := decodeInput(append(longest, ' '))
	var coded *types.Error
	if !errors.As(err, &coded) || coded.Code != types.ErrDecodingFailure || !strings.Contains(coded.Details, "1048577 bytes") {
		t.Errorf("a byte more: %v", err)
	}
	// It is refused unread.
	if _, again := decodeInput(make([]byte, maxInput+1)); again == nil || again.Error() != err.Error() {
		t.Errorf("garbage: %v, not %v", again, err)
	}
}

func TestFewProblemsAreReported(t *testing.T) {
	for _, n := range []int{1, 5, 6, 10_000} {
		var raw strings.Builder
		raw.WriteString(`{"mode":"off"`)
		for i := range n {
			fmt.Fprintf(&raw, `,"k%d":1`, i)
		}
		raw.WriteString("}")
		conf, err := ParseConfig([]byte(raw.String()))
		if !errors.Is(err, ErrConfig) || conf.Mode != ModeOff {
			t.Fatalf("%d problems: %+v, %v", n, conf, err)
		}
		if got := strings.Count(err.Error(), "unknown key"); got != min(n, 5) || len(err.Error()) > 500 {
			t.Errorf("%d problems: %d are reported", n, got)
		}
		more := fmt.Sprintf("; and %d more", n-5)
		if strings.HasSuffix(err.Error(), more) != (n > 5) || n <= 5 && strings.Contains(err.Error(), " more") {
			t.Errorf("%d problems: %v", n, err)
		}
	}
}
