package conflist

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/conf"
	"github.com/skipstack/skipstack/plugin"
)

var update = flag.Bool("update", false, "write testdata/golden")

func samples(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/lists/*")
	if err != nil || len(files) < 60 {
		t.Fatalf("%d samples, error %v", len(files), err)
	}
	return files
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// Each sample has its outcome beside it: the list that install makes of it, or the
// reason why it is refused.
func TestGolden(t *testing.T) {
	edited, refused := 0, 0
	for _, path := range samples(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			text := read(t, path)
			original := bytes.Clone(text)
			var out []byte
			var err error
			if filepath.Ext(path) == ".conflist" {
				out, err = Add(text, conf.Entry, false)
			} else {
				out, err = Convert(text, conf.Entry)
			}
			if !bytes.Equal(text, original) {
				t.Error("the input was changed")
			}
			golden := filepath.Join("testdata/golden", filepath.Base(path))
			if err != nil {
				refused++
				if !errors.Is(err, ErrRefused) || out != nil {
					t.Errorf("error %v with %d bytes", err, len(out))
				}
				out = []byte(err.Error() + "\n")
				golden += ".refused"
			} else {
				edited++
				wantChained(t, path, text, out)
			}
			if *update {
				if err := os.WriteFile(golden, out, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if want := read(t, golden); !bytes.Equal(out, want) {
				t.Errorf("got\n%s\nwant\n%s", out, want)
			}
		})
	}
	if edited < 40 || refused < 20 {
		t.Errorf("%d edited, %d refused", edited, refused)
	}
	if all, err := filepath.Glob("testdata/golden/*"); err != nil || len(all) != edited+refused {
		t.Errorf("%d outcomes of %d samples, error %v", len(all), edited+refused, err)
	}
}

// wantChained checks with libcni that out is text and skipstack, and that removing it
// gives back text.
func wantChained(t *testing.T, path string, text, out []byte) {
	t.Helper()
	after, err := libcni.NetworkConfFromBytes(out)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Add(out, conf.Entry, false)
	if err != nil || !bytes.Equal(again, out) {
		t.Errorf("it is not idempotent: %v", err)
	}
	entries := 0
	for _, p := range after.Plugins {
		if p.Network.Type == plugin.Type {
			entries++
			if err := plugin.Validate(p.Bytes); err != nil {
				t.Error(err)
			}
		}
	}
	if entries != 1 || after.Plugins[0].Network.Type == plugin.Type {
		t.Errorf("plugins %v", after.Plugins)
	}
	if filepath.Ext(path) != ".conflist" {
		single, err := libcni.NetworkPluginConfFromBytes(text)
		if err != nil {
			t.Fatal(err)
		}
		before, err := libcni.ConfListFromConf(single)
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, before, after)
		return
	}
	before, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, before, after)
	back, err := Remove(out)
	if err != nil || !Has(text) && !bytes.Equal(back, text) {
		t.Errorf("error %v, removed:\n%s", err, back)
	}
}

// wantSame checks that two lists are the same but for skipstack.
func wantSame(t *testing.T, before, after *libcni.NetworkConfigList) {
	t.Helper()
	if before.Name != after.Name || before.CNIVersion != after.CNIVersion || before.DisableCheck != after.DisableCheck || before.DisableGC != after.DisableGC {
		t.Errorf("list %+v\nbecame %+v", before, after)
	}
	others := func(list *libcni.NetworkConfigList) (all []string) {
		for _, p := range list.Plugins {
			if p.Network.Type != plugin.Type {
				all = append(all, string(p.Bytes))
			}
		}
		return all
	}
	if x, y := strings.Join(others(before), "\n"), strings.Join(others(after), "\n"); x != y {
		t.Errorf("plugins %s\nbecame %s", x, y)
	}
}

// Another entry takes the place of the one that is there, and only that.
func TestReplace(t *testing.T) {
	entry := []byte(`{"type":"skipstack","acceptRisks":["splice"]}`)
	for _, name := range []string{"edited-entry.conflist", "installed.conflist", "installed-elsewhere-in-chain.conflist"} {
		text := read(t, filepath.Join("testdata/lists", name))
		if _, err := Add(text, entry, false); !errors.Is(err, ErrEdited) || !errors.Is(err, ErrRefused) {
			t.Errorf("%s: error %v", name, err)
		}
		out, err := Add(text, entry, true)
		if err != nil {
			t.Fatal(err)
		}
		got, err := plugin.ParseConflist(out)
		if err != nil || got.AcceptRisks == 0 {
			t.Errorf("%s: %+v, error %v:\n%s", name, got, err, out)
		}
		x, errX := Remove(text)
		y, errY := Remove(out)
		if errX != nil || errY != nil || !bytes.Equal(x, y) {
			t.Errorf("%s: errors %v, %v; without the entry\n%s\nwas\n%s", name, errX, errY, y, x)
		}
	}
}

func TestRemove(t *testing.T) {
	for name, want := range map[string]string{
		"twice.conflist":                        `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}` + "\n",
		"skipstack-first.conflist":              `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}` + "\n",
		"installed-elsewhere-in-chain.conflist": `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"tuning"}]}` + "\n",
		"minified.conflist":                     string(read(t, "testdata/lists/minified.conflist")),
		"skipstack-only.conflist":               "",
		"half-written.conflist":                 "",
	} {
		got, err := Remove(read(t, filepath.Join("testdata/lists", name)))
		if string(got) != want || (err != nil) != (want == "") || err != nil && !errors.Is(err, ErrRefused) {
			t.Errorf("%s: error %v\n%s", name, err, got)
		}
	}
}

// An entry that skipstack would not take is never installed.
func TestEntryIsChecked(t *testing.T) {
	text := read(t, "testdata/lists/minified.conflist")
	for entry, want := range map[string]string{
		`{"type":"skipstack","mode":"fast"}`: `"fast" is not one of`,
		`{"type":"skipstack","x":1}`:         `unknown key "x"`,
		`{"type":"bridge"}`:                  `its type is "bridge"`,
		`{}`:                                 "missing 'type'",
		`[]`:                                 "not an object",
		`{"type":"skipstack"} x`:             "invalid character",
	} {
		for _, f := range []func() ([]byte, error){
			func() ([]byte, error) { return Add(text, []byte(entry), false) },
			func() ([]byte, error) { return Convert(read(t, "testdata/lists/terway.conf"), []byte(entry)) },
		} {
			if out, err := f(); err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, ErrRefused) {
				t.Errorf("%s: %s, error %v", entry, out, err)
			}
		}
	}
}

// FuzzRoundTrip: what is installed can be removed exactly, and what comes between is a
// list that runtimes load, or nothing is installed, with a reason.
func FuzzRoundTrip(f *testing.F) {
	for _, path := range samples(f) {
		f.Add(read(f, path))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		out, err := Add(text, conf.Entry, false)
		if err != nil {
			if out != nil || !errors.Is(err, ErrRefused) || len(err.Error()) < len("refused: x") {
				t.Errorf("%d bytes, error %v", len(out), err)
			}
		} else {
			wantChained(t, ".conflist", text, out)
		}
		list, err := Convert(text, conf.Entry)
		switch {
		case err == nil:
			wantChained(t, ".conf", text, list)
		case list != nil || !errors.Is(err, ErrRefused):
			t.Errorf("%d bytes, error %v", len(list), err)
		}
	})
}
