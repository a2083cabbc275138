package attachment

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestFileNamesAreDistinctAndSafe(t *testing.T) {
	long := strings.Repeat("x", 1<<16)
	keys := []Key{
		{},
		{"net", "id", "eth0"},
		{"neti", "d", "eth0"},
		{"net", "ideth0", ""},
		{"net", "", "ideth0"},
		{"", "net", "ideth0"},
		{"net\x00id", "", "eth0"},
		{"net", "\x00id", "eth0"},
		{"../../etc", "passwd", "/"},
		{"a\nb", "..", "."},
		{long, "id", "eth0"},
		{long + "x", "id", "eth0"},
		{"\xff", "id", "eth0"},
		{"\ufffd", "id", "eth0"},
	}
	seen := map[string]Key{}
	for _, k := range keys {
		name := k.FileName()
		if other, ok := seen[name]; ok {
			t.Errorf("%.80q and %.80q share the file name %s", k, other, name)
		}
		seen[name] = k
		if !isRecord(name) || len(name) > 100 {
			t.Errorf("%.80q: %q is not a record's file name", k, name)
		}
		if name != k.FileName() {
			t.Errorf("%.80q: the file name changes", k)
		}
	}
}

// The name is part of the format: a binary finds another version's records.
func TestFileNameIsStable(t *testing.T) {
	const want = "123f06558bf81ef38a13fc507d434800b87e56032084ed75def6005df00da2dd.json"
	if got := (Key{"net", "id", "eth0"}).FileName(); got != want {
		t.Errorf("FileName = %s, want %s", got, want)
	}
}

func fullRecord() Record {
	return Record{
		Version: Version,
		Key:     Key{"net", "container", "eth0"}, PodNamespace: "default", PodName: "web", PodUID: "1-2",
		Status: Attached, CgroupID: 1<<64 - 1, CgroupPath: "kubepods/pod1", BPFFSDev: 33, MountNS: 4026531840,
		NetNS: "/var/run/netns/x", Settings: json.RawMessage(`{"mode":"auto"}`),
		Created: time.Date(2024, 5, 6, 7, 8, 9, 10, time.UTC),
	}
}

func TestEncodeDecode(t *testing.T) {
	skipped := fullRecord()
	skipped.Status, skipped.Reason, skipped.CgroupID, skipped.Settings = Skipped, "bandwidth \"limit\"\n", 0, nil
	for _, want := range []Record{fullRecord(), skipped, {Version: Version, Status: Attaching}} {
		data, err := want.encode()
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Count(data, []byte("\n")) != 1 {
			t.Errorf("not one line: %q", data)
		}
		got, err := decode(data)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("decode(encode(r)) = %+v, want %+v", got, want)
		}
	}
}

func TestEncodeRefusesWhatCannotBeReadBack(t *testing.T) {
	for name, change := range map[string]func(*Record){
		"no status":         func(r *Record) { r.Status = "" },
		"unknown status":    func(r *Record) { r.Status = "atached" },
		"network not UTF-8": func(r *Record) { r.Network = "\xff" },
		"id not UTF-8":      func(r *Record) { r.ContainerID = "a\xc3" },
		"ifname not UTF-8":  func(r *Record) { r.IfName = "eth\x80" },
		"settings no JSON":  func(r *Record) { r.Settings = json.RawMessage(`{"a":`) },
		"too long":          func(r *Record) { r.Reason = strings.Repeat("x", maxRecord) },
		"year 10000":        func(r *Record) { r.Created = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		t.Run(name, func(t *testing.T) {
			r := fullRecord()
			change(&r)
			if data, err := r.encode(); !errors.Is(err, ErrInvalid) || data != nil {
				t.Errorf("encode = %.80q, %v, want ErrInvalid", data, err)
			}
		})
	}
	r := fullRecord()
	r.Version = Version + 1
	if data, err := r.encode(); !errors.Is(err, ErrNewerVersion) || data != nil {
		t.Errorf("encode = %.80q, %v, want ErrNewerVersion", data, err)
	}
}

func TestDecodeCorrupt(t *testing.T) {
	for name, data := range map[string]string{
		"empty":            "",
		"null":             "null",
		"array":            "[]",
		"half":             `{"version":1,"network":"n","contai`,
		"trailing":         `{"version":1,"status":"attached"}{}`,
		"no version":       `{"network":"n","containerID":"c","ifName":"i","status":"attached"}`,
		"version 0":        `{"version":0,"status":"attached"}`,
		"negative version": `{"version":-1,"status":"attached"}`,
		"version string":   `{"version":"1","status":"attached"}`,
		"huge version":     `{"version":1e99,"status":"attached"}`,
		"unknown status":   `{"version":1,"status":"maybe"}`,
		"no status":        `{"version":1}`,
		"cgroup negative":  `{"version":1,"status":"attached","cgroupID":-1}`,
		"cgroup too big":   `{"version":1,"status":"attached","cgroupID":18446744073709551616}`,
		"cgroup fraction":  `{"version":1,"status":"attached","cgroupID":1.5}`,
		"created":          `{"version":1,"status":"attached","created":"yesterday"}`,
		"newer, cgroup":    `{"version":2,"cgroupID":"7"}`,
		"newer, key":       `{"version":2,"network":1}`,
		"newer, status":    `{"version":2,"status":{}}`,
		"NUL":              "\x00",
	} {
		t.Run(name, func(t *testing.T) {
			r, err := decode([]byte(data))
			if !errors.Is(err, ErrCorrupt) || !reflect.DeepEqual(r, Record{}) {
				t.Errorf("decode = %+v, %v, want ErrCorrupt", r, err)
			}
		})
	}
}

// A record of the present version may carry fields that this binary does not
// know: they came with a release that did not need another format.
func TestDecodeUnknownField(t *testing.T) {
	r, err := decode([]byte(`{"version":1,"status":"attached","cgroupID":7,"colour":"red"}`))
	if err != nil || r.CgroupID != 7 {
		t.Errorf("decode = %+v, %v", r, err)
	}
}

const newerRecord = `{"version":9,"network":"net","containerID":"new","ifName":"eth0","cgroupID":77,"status":"migrating",
	"reason":["a","list"],"podName":"web","settings":7,"created":12345,"colour":"red"}`

func TestDecodeNewerVersion(t *testing.T) {
	got, err := decode([]byte(newerRecord))
	want := Record{Version: 9, Key: Key{"net", "new", "eth0"}, CgroupID: 77, Status: "migrating", PodName: "web"}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("decode = %+v, %v, want %+v", got, err, want)
	}
}

func FuzzDecode(f *testing.F) {
	for _, r := range []Record{fullRecord(), {Status: Attaching}, {Status: Skipped, Reason: "\u2028<&>\"", Key: Key{"\x00", "/", ".."}}} {
		data, err := r.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		f.Add(data[:len(data)/2])
	}
	f.Add([]byte(newerRecord))
	f.Add([]byte(`{"version":1,"status":"attached","settings":null,"created":"2024-01-01T00:00:00+23:59"}`))
	f.Add([]byte(`{"VERSION":1,"Status":"skipped","network":"\ud800","settings":{"a":[1e400,"<"]}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decode(data)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("error is not ErrCorrupt: %v", err)
			}
			if !reflect.DeepEqual(r, Record{}) {
				t.Fatalf("both a record and an error: %+v, %v", r, err)
			}
			return
		}
		if !isRecord(r.FileName()) {
			t.Fatalf("file name %q", r.FileName())
		}
		again, err := r.encode()
		if r.Version > Version {
			if !errors.Is(err, ErrNewerVersion) {
				t.Fatalf("a newer record can be rewritten: %v", err)
			}
			return
		}
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
		r2, err := decode(again)
		if err != nil {
			t.Fatalf("decode %q: %v", again, err)
		}
		if r2.Key != r.Key || r2.CgroupID != r.CgroupID || r2.Status != r.Status || !r2.Created.Equal(r.Created) {
			t.Fatalf("%+v became %+v", r, r2)
		}
		if third, err := r2.encode(); err != nil || !bytes.Equal(third, again) {
			t.Fatalf("%q became %q, %v", again, third, err)
		}
	})
}
