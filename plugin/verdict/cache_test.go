package verdict

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func encoded(t testing.TB, v *Verdict) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestSaveAndCached(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run", "skipstack")
	v := made(NotOK, ProbeSplice)
	v.Funnel = true
	v.ProbedAt = noon
	if _, err := cached(dir, v.BootID, v.Build, noon); !errors.Is(err, ErrNoVerdict) {
		t.Fatalf("without a directory: %v", err)
	}
	for range 2 {
		if err := v.Save(dir); err != nil {
			t.Fatal(err)
		}
	}
	got, err := cached(dir, v.BootID, v.Build, noon.Add(1000*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if want := encoded(t, v); !bytes.Equal(encoded(t, got), want) || got.Level != Risky || !got.Funnel || !got.MPTCPListeners {
		t.Errorf("%s, not %s", encoded(t, got), want)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%v %v", entries, err)
	}
	info, err := entries[0].Info()
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	if want := "verdict-boot-01000000000000000000000000000000.json"; info.Name() != want {
		t.Errorf("file %s, not %s", info.Name(), want)
	}
	if _, err := cached(dir, "another", v.Build, noon); !errors.Is(err, ErrNoVerdict) {
		t.Errorf("another boot: %v", err)
	}
	if _, err := cached(dir, v.BootID, [16]byte{2}, noon); !errors.Is(err, ErrNoVerdict) {
		t.Errorf("another build: %v", err)
	}
}

// TestCachedOfThisBoot uses the real boot and build.
func TestCachedOfThisBoot(t *testing.T) {
	dir := t.TempDir()
	v, err := newVerdict()
	if err != nil {
		t.Fatal(err)
	}
	v.conclude()
	if err := v.Save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := Cached(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got.Level != Unsupported || got.Build != build() || got.Kernel == "" {
		t.Errorf("%+v", got)
	}
}

// TestBuild: another binary, even with the same BPF programs, has other probes.
func TestBuild(t *testing.T) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	id := goBuildID("/proc/self/exe")
	if len(id) < 40 || bytes.Count(self, id) == 0 {
		t.Fatalf("build id %q", id)
	}
	other := slices.Clone(id)
	other[0] ^= 1
	at := bytes.Index(self, slices.Concat([]byte("Go\x00\x00"), id))
	if at < 8 {
		t.Fatal("no note of the build id")
	}
	none := slices.Clone(self)
	copy(none[at-8:], make([]byte, 4)) // its size
	builds := map[string]string{}
	for name, content := range map[string][]byte{
		"copy":  self,
		"other": bytes.ReplaceAll(self, id, other),
		"no id": none,
	} {
		path := filepath.Join(t.TempDir(), "binary")
		if err := os.WriteFile(path, content, 0o700); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(path, buildArg).Output()
		if err != nil {
			t.Fatal(err)
		}
		builds[name] = string(out)
		if seen := fmt.Sprintf("%x", buildOf(path)); name != "no id" && seen != builds[name] {
			t.Errorf("%s is %s to others, %s to itself", name, seen, builds[name])
		}
	}
	own := fmt.Sprintf("%x", build())
	if builds["copy"] != own {
		t.Errorf("a copy is %s, not %s", builds["copy"], own)
	}
	if builds["other"] == own || builds["no id"] == own || builds["no id"] == builds["other"] {
		t.Errorf("%q are those of others, this one is %s", builds, own)
	}
}

func TestCachedRefuses(t *testing.T) {
	good := string(encoded(t, made(NotOK, ProbeSplice)))
	for name, data := range map[string]string{
		"empty":            "",
		"truncated":        good[:len(good)/2],
		"not an object":    "[]",
		"more":             good + "{}",
		"null":             "null",
		"foreign format":   strings.Replace(good, `"format":2`, `"format":3`, 1),
		"unknown member":   strings.Replace(good, `"format":2`, `"format":2,"colour":"red"`, 1),
		"unknown result":   strings.Replace(good, `"not ok"`, `"maybe"`, 1),
		"unknown risk":     strings.Replace(good, `["splice"]`, `["splice","rain"]`, 1),
		"missing risk":     strings.Replace(good, `["splice"]`, `[]`, 1),
		"too many risks":   strings.Replace(good, `["splice"]`, `["splice","epoll"]`, 1),
		"too good":         strings.Replace(good, `"risky"`, `"safe"`, 1),
		"wrong mptcp":      strings.Replace(good, `"mptcpListeners":true`, `"mptcpListeners":false`, 1),
		"another probe":    strings.Replace(good, `"name":"epoll"`, `"name":"select"`, 1),
		"fewer probes":     good[:strings.Index(good, `{"name"`)] + good[strings.LastIndex(good, `{"name"`):],
		"another boot":     strings.Replace(good, `"bootID":"boot"`, `"bootID":"other"`, 1),
		"another build":    strings.Replace(good, `"build":"01`, `"build":"02`, 1),
		"malformed build":  strings.Replace(good, `"build":"01`, `"build":"xx`, 1),
		"long build":       strings.Replace(good, `"build":"01`, `"build":"0101`, 1),
		"longer than kept": good[:len(good)-1] + strings.Repeat(" ", maxFile) + "}",
	} {
		t.Run(name, func(t *testing.T) {
			if data == good {
				t.Fatal("the data is good")
			}
			v := made(NotOK, ProbeSplice)
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, fileName(v.BootID, v.Build)), []byte(data), 0o600); err != nil {
				t.Fatal(err)
			}
			if got, err := cached(dir, v.BootID, v.Build, noon); !errors.Is(err, ErrNoVerdict) {
				t.Errorf("%+v, %v", got, err)
			}
			// A new verdict takes its place.
			if err := v.Save(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := cached(dir, v.BootID, v.Build, noon); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestCachedTells: what cannot be read is not the same as what is not there.
func TestCachedTells(t *testing.T) {
	v := made(OK)
	dir := t.TempDir()
	path := filepath.Join(dir, fileName(v.BootID, v.Build))
	if err := os.Symlink("/dev/zero", path); err != nil {
		t.Fatal(err)
	}
	if _, err := cached(dir, v.BootID, v.Build, noon); err == nil || errors.Is(err, ErrNoVerdict) {
		t.Errorf("symbolic link: %v", err)
	}
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := cached(dir, v.BootID, v.Build, noon); err == nil || errors.Is(err, ErrNoVerdict) {
		t.Errorf("directory: %v", err)
	}
}

func TestInconclusiveExpires(t *testing.T) {
	dir := t.TempDir()
	for probe, after := range map[string]time.Duration{
		ProbeOrder: time.Minute, ProbeRedirect: time.Minute, ProbeLoad: time.Minute,
	} {
		v := made(CouldNotTell, probe)
		v.ProbedAt = noon
		if err := v.Save(dir); err != nil {
			t.Fatal(err)
		}
		for age, holds := range map[time.Duration]bool{
			0: true, after: true, after + 1: false, -time.Second: false,
		} {
			_, err := cached(dir, v.BootID, v.Build, noon.Add(age))
			if holds && err != nil || !holds && !errors.Is(err, ErrNoVerdict) {
				t.Errorf("%s, after %v: %v", probe, age, err)
			}
		}
	}
}

// A risk that a probe could not rule out holds until it is looked at again.
func TestDue(t *testing.T) {
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		result Result
		probes []string
		after  time.Duration // 0: never
	}{
		"a risk":            {CouldNotTell, []string{ProbeEpoll}, 10 * time.Minute},
		"no risk":           {CouldNotTell, []string{ProbeMPTCP}, 10 * time.Minute},
		"inconclusive":      {CouldNotTell, []string{ProbeOrder, ProbeEpoll}, time.Minute},
		"all told":          {NotOK, []string{ProbeEpoll, ProbeSplice}, 0},
		"unsupported":       {NotOK, []string{ProbeOrder}, 0},
		"nothing to report": {OK, nil, 0},
	} {
		v := made(tc.result, tc.probes...)
		v.ProbedAt = noon
		for age, due := range map[time.Duration]bool{
			0: false, tc.after: false, tc.after + 1: tc.after > 0, 1000 * time.Hour: tc.after > 0, -time.Second: tc.after > 0,
		} {
			if got := v.Due(noon.Add(age)); got != due {
				t.Errorf("%s, after %v: due is %v", name, age, got)
			}
		}
		if v.Inconclusive() {
			continue
		}
		if err := v.Save(dir); err != nil {
			t.Fatal(err)
		}
		if got, err := cached(dir, v.BootID, v.Build, noon.Add(time.Hour)); err != nil || got.Level != v.Level {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// What a busy machine could not tell is known from before.
func TestRecall(t *testing.T) {
	earlier := made(NotOK, ProbeCharged)
	earlier.set(ProbeEpoll, CouldNotTell, "busy")
	earlier.Funnel, earlier.Guard, earlier.ProbedAt = true, datapath.GuardLSM, noon
	v := made(CouldNotTell, ProbeOrder, ProbeCharged, ProbeEpoll, ProbeFIONREAD, ProbeSplice, ProbeMPTCP)
	v.ProbedAt = noon.Add(time.Hour)
	v.Recall(earlier)
	if v.Level != Risky || v.Risks != datapath.RiskUncharged|datapath.RiskEpoll || !v.MPTCPListeners ||
		!v.Funnel || v.Guard != datapath.GuardLSM || v.Due(v.ProbedAt) || !v.Due(v.ProbedAt.Add(11*time.Minute)) {
		t.Errorf("%+v", v)
	}
	if _, err := decode(encoded(t, v)); err != nil {
		t.Error(err)
	}
	// What it could tell now counts, better or worse.
	v = made(NotOK, ProbeEpoll, ProbeSplice)
	v.Recall(earlier)
	if v.Risks != datapath.RiskEpoll|datapath.RiskSplice || v.Funnel || v.Guard != datapath.NoGuard {
		t.Errorf("%+v", v)
	}
}

// What was judged with io_uring stands where a seccomp filter keeps a later look from
// trying it, and not the other way round.
func TestRecallRing(t *testing.T) {
	for name, tc := range map[string]struct {
		earlier, now       Result
		earlierPart, part  bool
		risks              datapath.Risk
		guard              datapath.Guard
		untried, tellsLess bool
	}{
		"full, then in part":         {earlier: OK, now: OK, part: true, guard: datapath.GuardLSM, tellsLess: true},
		"not ok, then in part":       {earlier: NotOK, now: OK, part: true, risks: datapath.RiskSplice, tellsLess: true},
		"not told, then in part":     {earlier: CouldNotTell, now: OK, part: true, guard: datapath.GuardFmodRet, untried: true},
		"in part twice":              {earlier: OK, earlierPart: true, now: OK, part: true, guard: datapath.GuardFmodRet, untried: true},
		"in part, then full":         {earlier: OK, earlierPart: true, now: OK, guard: datapath.GuardFmodRet},
		"in part, then not ok":       {earlier: OK, earlierPart: true, now: NotOK, risks: datapath.RiskSplice},
		"in part, then not told":     {earlier: OK, earlierPart: true, now: CouldNotTell, guard: datapath.GuardLSM, untried: true, tellsLess: true},
		"full, then could not tell":  {earlier: OK, now: CouldNotTell, guard: datapath.GuardLSM, tellsLess: true},
		"not told, then told in all": {earlier: CouldNotTell, now: OK, guard: datapath.GuardFmodRet},
	} {
		earlier, v := made(tc.earlier, ProbeSplice), made(tc.now, ProbeSplice)
		if earlier.RingUntried = tc.earlierPart; tc.earlier == OK {
			earlier.Guard = datapath.GuardLSM
		}
		if v.RingUntried = tc.part; tc.now == OK {
			v.Guard = datapath.GuardFmodRet
		}
		if got := v.TellsLess(earlier); got != tc.tellsLess {
			t.Errorf("%s: tells less: %v", name, got)
		}
		v.Recall(earlier)
		if v.Risks != tc.risks || v.Guard != tc.guard || v.RingUntried != tc.untried {
			t.Errorf("%s: %+v", name, v)
		}
		got, err := decode(encoded(t, v))
		if err != nil || got.RingUntried != tc.untried {
			t.Errorf("%s: read back: %+v, %v", name, got, err)
		}
		if due := got.Due(got.ProbedAt.Add(recheckAfter + 1)); due != (tc.untried && !filtered()) || got.Due(got.ProbedAt) {
			t.Errorf("%s: due: %v", name, due)
		}
	}
	v := made(NotOK, ProbeSplice)
	v.RingUntried = true
	if got, err := decode(encoded(t, v)); err == nil {
		t.Errorf("read %+v", got)
	}
	v = made(NotOK, ProbeOrder)
	if v.RingUntried = true; v.Due(v.ProbedAt.Add(recheckAfter + 1)) {
		t.Error("a kernel that is not supported is not by io_uring")
	}
}

// A guard that cannot be attached after all leaves the risk until the next look.
func TestGuardFailed(t *testing.T) {
	v := made(OK)
	v.Guard, v.ProbedAt = datapath.GuardLSM, noon
	then := noon.Add(time.Hour)
	v.GuardFailed(fmt.Errorf("%w: too many programs", datapath.ErrGuard), then)
	if v.Level != Risky || v.Risks != datapath.RiskSplice || v.Guard != datapath.NoGuard || !v.NodeSettings().Open ||
		v.Due(then) || !v.Due(then.Add(11*time.Minute)) {
		t.Errorf("%+v", v)
	}
	got, err := decode(encoded(t, v))
	if err != nil || !strings.Contains(string(encoded(t, got)), "no splice guard: too many programs") {
		t.Errorf("%v, %v", got, err)
	}
}

func TestSaveRemovesOthers(t *testing.T) {
	dir := t.TempDir()
	v := made(OK)
	old, young := time.Now().Add(-2*tmpAge), time.Now()
	for name, made := range map[string]time.Time{
		fileName("old", v.Build):        young, // another boot
		fileName("boo", v.Build):        young, // begins like this one
		fileName(v.BootID, [16]byte{9}): young, // another build of this boot
		tmpPrefix + "1":                 old,   // left half written
		tmpPrefix + "2":                 young, // being written
		"verdict-notes.txt":             old,   // not ours
		"lock":                          old,
		"attachments":                   old,
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, made, made); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Save(dir); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	want := strings.Join([]string{
		tmpPrefix + "2", "attachments", "lock", fileName(v.BootID, v.Build),
		fileName(v.BootID, [16]byte{9}), "verdict-notes.txt",
	}, "\n")
	if got := strings.Join(names, "\n"); got != want {
		t.Errorf("left:\n%s\nwant:\n%s", got, want)
	}
}

// TestSaveIsAtomic reads while others write.
func TestSaveIsAtomic(t *testing.T) {
	dir := t.TempDir()
	v := made(OK)
	if err := v.Save(dir); err != nil {
		t.Fatal(err)
	}
	var writers sync.WaitGroup
	for range 4 {
		writers.Go(func() {
			for range 50 {
				if err := v.Save(dir); err != nil {
					t.Error(err)
				}
			}
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		writers.Wait()
		cancel()
	}()
	for ctx.Err() == nil {
		if _, err := cached(dir, v.BootID, v.Build, noon); err != nil {
			t.Error(err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, v := range []*Verdict{made(OK), made(NotOK, ProbeSplice), made(CouldNotTell, ProbeLoad, ProbeOrder)} {
		data := encoded(f, v)
		f.Add(data)
		f.Add(data[:len(data)-2])
		f.Add(bytes.Replace(data, []byte(`"format":2`), []byte(`"format":0`), 1))
		f.Add(bytes.Replace(data, []byte(`"probedAt":"0001`), []byte(`"probedAt":"9999`), 1))
		f.Add(bytes.Replace(data, []byte(`"build":"01`), []byte(`"build":"é`), 1))
	}
	f.Add([]byte(`{}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := decode(data)
		if (v == nil) == (err == nil) {
			t.Fatalf("%v and %v", v, err)
		}
		if err != nil {
			return
		}
		// What is accepted is a verdict that probing could have ended with.
		if v.Level == Safe && v.Risks != 0 || v.Level == Risky && v.Risks == 0 || v.NodeSettings().Open != (v.Level != Unsupported) {
			t.Errorf("%+v", v)
		}
		_ = v.String()
		once := encoded(t, v)
		again, err := decode(once)
		if err != nil {
			t.Fatalf("%s: %v", once, err)
		}
		if !bytes.Equal(encoded(t, again), once) {
			t.Errorf("%s is not %s", encoded(t, again), once)
		}
	})
}
