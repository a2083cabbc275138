package plugin

import (
	"errors"
	"testing"
)

func TestParseConflist(t *testing.T) {
	for _, tc := range []struct {
		raw  string
		err  error
		mode Mode
	}{
		{`{"name":"n","plugins":[{"type":"bridge"},{"type":"skipstack","mode":"on"}]}`, nil, ModeOn},
		{`{"name":"n","type":"skipstack","mode":"off"}`, nil, ModeOff},
		{`{"name":"n","plugins":[{"type":"bridge"}]}`, ErrNoEntry, ""},
		{`{"name":"n","plugins":[{"type":7},3,null]}`, ErrNoEntry, ""},
		{`{"name":"n","type":"bridge"}`, ErrNoEntry, ""},
		{`{}`, ErrNoEntry, ""},
		{`{"plugins":[{"type":"skipstack"},{"type":"skipstack"}]}`, ErrConfig, ""},
		{`{"plugins":[{"type":"skipstack","x":1}]}`, ErrConfig, ""},
	} {
		conf, err := ParseConflist([]byte(tc.raw))
		if !errors.Is(err, tc.err) || err == nil && conf.Mode != tc.mode {
			t.Errorf("%s: %+v, %v", tc.raw, conf, err)
		}
	}
	for _, raw := range []string{``, `[]`, `{"plugins":{}}`} {
		if _, err := ParseConflist([]byte(raw)); err == nil {
			t.Errorf("%s: no error", raw)
		}
	}
}

func FuzzParseConflist(f *testing.F) {
	f.Add([]byte(`{"name":"n","plugins":[{"type":"bridge"},{"type":"skipstack","mode":"on"}]}`))
	f.Add([]byte(`{"type":"skipstack"}`))
	f.Add([]byte(`{"plugins":[null,[],{"type":"skipstack","type":"bridge"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		conf, err := ParseConflist(raw)
		if conf.Mode == "" || conf.RunDir == "" || conf.BPFFS == "" {
			t.Errorf("unusable configuration %+v, error %v", conf, err)
		}
	})
}
