package plugin

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/plugin/datapath"
)

func TestParseConfigEveryKey(t *testing.T) {
	raw := `{
		"cniVersion": "1.1.0", "name": "net", "type": "skipstack",
		"mode": "on", "onError": "fail", "acceptRisks": ["splice", "blocking"],
		"excludePorts": [5432, "80", "8000-8100"], "unreadLimit": 65536, "maxConnections": 1024,
		"spliceGuard": "off", "logFile": "/var/log/skipstack.log", "logLevel": "debug",
		"bpffs": "/mnt/bpf/", "runDir": "/run/other", "cgroupRoot": "/sys/fs/cgroup/unified"
	}`
	got, err := ParseConfig([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Mode: ModeOn, OnError: OnErrorFail, AcceptRisks: datapath.RiskSplice | datapath.RiskBlocking,
		ExcludePorts: []datapath.PortRange{{First: 80, Last: 80}, {First: 5432, Last: 5432}, {First: 8000, Last: 8100}},
		UnreadLimit:  65536, MaxConnections: 1024, SpliceGuard: SpliceGuardOff,
		LogFile: "/var/log/skipstack.log", LogLevel: "debug",
		BPFFS: "/mnt/bpf", RunDir: "/run/other", CgroupRoot: "/sys/fs/cgroup/unified",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}

	// Every key is in there, so that a new one has to be added.
	var keys map[string]json.RawMessage
	if err := json.Unmarshal([]byte(raw), &keys); err != nil {
		t.Fatal(err)
	}
	for _, key := range Keys() {
		if _, ok := keys[key]; !ok {
			t.Errorf("key %s is not tested", key)
		}
	}
}

func TestParseConfigDefaults(t *testing.T) {
	got, err := ParseConfig([]byte(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Mode: ModeAuto, OnError: OnErrorPlain, UnreadLimit: 16 << 20, MaxConnections: 262144,
		SpliceGuard: SpliceGuardAuto, LogLevel: "info", BPFFS: "/sys/fs/bpf", RunDir: "/run/skipstack",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestParseConfigRefuses(t *testing.T) {
	for _, tc := range []struct{ name, members, want string }{
		{"unknown", `"colour": 1`, `unknown key "colour"`},
		{"case", `"Mode": "on"`, `write "mode"`},
		{"upper case", `"UNREADLIMIT": 1`, `write "unreadLimit"`},
		{"empty key", `"": 1`, `unknown key ""`},
		{"twice", `"mode": "on", "mode": "off"`, `key "mode" is given twice`},
		{"twice, escaped", `"mode": "on", "\u006dode": "off"`, `key "mode" is given twice`},
		{"mode", `"mode": "maybe"`, `"maybe" is not one of auto, on, off`},
		{"mode case", `"mode": "On"`, `"On" is not one of`},
		{"mode number", `"mode": 3`, `3 is not a string`},
		{"mode null", `"mode": null`, `null is not a string`},
		{"mode list", `"mode": ["on"]`, `is not a string`},
		{"onError", `"onError": "retry"`, `"retry" is not one of plain, fail`},
		{"acceptRisks string", `"acceptRisks": "splice"`, `is not an array`},
		{"acceptRisks name", `"acceptRisks": ["splice", "all"]`, `"all" is not one of splice, fionread, epoll, uncharged, blocking`},
		{"acceptRisks null", `"acceptRisks": null`, `is not an array`},
		{"acceptRisks element", `"acceptRisks": [null]`, `null is not a string`},
		{"acceptRisks empty name", `"acceptRisks": [""]`, `"" is not one of`},
		{"ports string", `"excludePorts": "80"`, `is not an array`},
		{"port 0", `"excludePorts": [0]`, `"0" is neither a port`},
		{"port 65536", `"excludePorts": [65536]`, `"65536" is neither a port`},
		{"port negative", `"excludePorts": [-1]`, `"-1" is neither a port`},
		{"port fraction", `"excludePorts": [80.5]`, `"80.5" is neither a port`},
		{"port bool", `"excludePorts": [true]`, `"true" is neither a port`},
		{"port list", `"excludePorts": [[80]]`, `"[80]" is neither a port`},
		{"port empty", `"excludePorts": [""]`, `"" is neither a port`},
		{"port space", `"excludePorts": ["80 - 90"]`, `is neither a port`},
		{"range reversed", `"excludePorts": ["90-80"]`, `"90-80" is neither a port`},
		{"range open", `"excludePorts": ["90-"]`, `"90-" is neither a port`},
		{"range triple", `"excludePorts": ["1-2-3"]`, `is neither a port`},
		{"too many ranges", `"excludePorts": [1,3,5,7,9,11,13,15,17,19,21,23,25,27,29,31,33]`, `17 separate ranges, at most 16`},
		{"unreadLimit string", `"unreadLimit": "65536"`, `is not a whole number from 4096 to 1073741824`},
		{"unreadLimit small", `"unreadLimit": 4095`, `4095 is not a whole number`},
		{"unreadLimit large", `"unreadLimit": 1073741825`, `is not a whole number`},
		{"unreadLimit huge", `"unreadLimit": 1e400`, `1e400 is not a whole number`},
		{"unreadLimit digits", `"unreadLimit": 99999999999999999999999999`, `is not a whole number`},
		{"unreadLimit fraction", `"unreadLimit": 65536.5`, `is not a whole number`},
		{"unreadLimit negative", `"unreadLimit": -1`, `is not a whole number`},
		{"unreadLimit null", `"unreadLimit": null`, `null is not a whole number`},
		{"maxConnections", `"maxConnections": 0`, `0 is not a whole number from 1 to 4194304`},
		{"spliceGuard", `"spliceGuard": true`, `true is not a string`},
		{"spliceGuard name", `"spliceGuard": "on"`, `is not one of auto, off`},
		{"logLevel", `"logLevel": "trace"`, `is not one of debug, info, warn, error`},
		{"logFile", `"logFile": "skipstack.log"`, `is not an absolute path`},
		{"logFile empty", `"logFile": ""`, `is not an absolute path`},
		{"runDir root", `"runDir": "/"`, `"/": the root directory cannot be used`},
		{"cgroupRoot root", `"cgroupRoot": "//"`, `the root directory cannot be used`},
		{"bpffs dots", `"bpffs": "/sys/fs/bpf/../x"`, `is not an absolute path`},
		{"bpffs nul", `"bpffs": "/sys\u0000"`, `is not an absolute path`},
		{"runDir", `"runDir": 1`, `1 is not a string`},
		{"cgroupRoot", `"cgroupRoot": "./x"`, `is not an absolute path`},
		{"whole conflist", `"plugins": []`, `unknown key "plugins"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conf, err := ParseConfig([]byte("{" + tc.members + "}"))
			if !errors.Is(err, ErrConfig) {
				t.Fatalf("error %v does not wrap ErrConfig", err)
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %q does not say %q", err, tc.want)
			}
			if strings.ContainsAny(err.Error(), "\n\r\x00") {
				t.Errorf("error %q is not one line", err)
			}
			conf.Mode = ModeAuto // the one bad member that is valid at first
			if !reflect.DeepEqual(conf, DefaultConfig()) {
				t.Errorf("a bad key changed the defaults: %+v", conf)
			}
			if err := Validate([]byte("{" + tc.members + "}")); !errors.Is(err, ErrConfig) {
				t.Errorf("Validate says %v", err)
			}
		})
	}
}

// All problems are named at once, and the keys beside them hold.
func TestParseConfigKeepsValidKeys(t *testing.T) {
	conf, err := ParseConfig([]byte(`{"mod": "on", "runDir": "/run/x", "unreadLimit": 1, "onError": "fail"}`))
	if err == nil || !strings.Contains(err.Error(), `"mod"`) || !strings.Contains(err.Error(), "unreadLimit") {
		t.Errorf("error %v does not name both problems", err)
	}
	if conf.RunDir != "/run/x" || conf.OnError != OnErrorFail || conf.UnreadLimit != DefaultUnreadLimit {
		t.Errorf("got %+v", conf)
	}
}

func TestParseConfigForeignKeys(t *testing.T) {
	raw := `{
		"cniVersion": "1.0.0", "name": "n", "type": "skipstack", "prevResult": {}, "capabilities": {"x": true},
		"runtimeConfig": null, "args": {"cni": {}}, "ipam": {}, "dns": {}, "deviceID": "0000:00:01.0",
		"pciBusID": "0000:00:01.0", "cni.dev/valid-attachments": [], "cni.dev/attachments": null,
		"cni.dev/whatever": 1, "_comment": ["any"], "_": 1, "name": "again"
	}`
	if err := Validate([]byte(raw)); err != nil {
		t.Error(err)
	}
}

func TestParseConfigNotAnObject(t *testing.T) {
	for _, raw := range []string{``, `[]`, `null`, `1`, `"x"`, `{`, `{"a"}`, `{"a":}`, `{} {}`, `{"a":1,}`, `{"mode":"on"} x`, `{}}`, `{}]`, `{},`} {
		if err := Validate([]byte(raw)); err == nil || errors.Is(err, ErrConfig) {
			t.Errorf("%s: error %v", raw, err)
		}
	}
}

func TestMergePorts(t *testing.T) {
	in := []datapath.PortRange{{First: 65535, Last: 65535}, {First: 10, Last: 20}, {First: 15, Last: 30}, {First: 31, Last: 31}, {First: 33, Last: 40}, {First: 1, Last: 1}, {First: 12, Last: 13}}
	want := []datapath.PortRange{{First: 1, Last: 1}, {First: 10, Last: 31}, {First: 33, Last: 40}, {First: 65535, Last: 65535}}
	if got := mergePorts(in); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, seed := range []string{
		`{}`, `{"mode":"on"}`, `{"mode":"on","mode":"off"}`, `{"Mode":"on"}`, `{"excludePorts":["1-2",3,"x"]}`,
		`{"unreadLimit":1e400}`, `{"acceptRisks":["splice","blocking"]}`, `{"bpffs":"/a/../b"}`, `{"_x":{"a":[1]}}`,
		`{"cni.dev/valid-attachments":null}`, `[`, "{\"\\ud800\":1}", `{"mode":"on"}{}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		conf, err := ParseConfig(raw)
		if conf.UnreadLimit < MinUnreadLimit || conf.UnreadLimit > MaxUnreadLimit ||
			conf.MaxConnections < MinMaxConnections || conf.MaxConnections > MaxMaxConnections ||
			len(conf.ExcludePorts) > datapath.MaxExcludePorts ||
			conf.Mode == "" || conf.OnError == "" || conf.SpliceGuard == "" || conf.BPFFS == "" || conf.RunDir == "" {
			t.Errorf("unusable configuration %+v", conf)
		}
		if err == nil && !json.Valid(raw) {
			t.Error("took invalid JSON")
		}
		if err != nil && strings.ContainsAny(err.Error(), "\n\r") {
			t.Errorf("error %q is not one line", err)
		}
	})
}
