package conflist

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin"
)

// What is found is what libcni's users load, in their order: the first by name.
func TestNetworks(t *testing.T) {
	const (
		list   = `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"skipstack"}]}`
		single = `{"cniVersion":"1.0.0","name":"n","type":"ptp"}`
	)
	link := func(to string) func(string) error { return func(path string) error { return os.Symlink(to, path) } }
	text := func(s string) func(string) error {
		return func(path string) error { return os.WriteFile(path, []byte(s), 0o644) }
	}
	fifo := func(path string) error { return unix.Mkfifo(path, 0o600) }
	type files map[string]func(string) error
	for name, tc := range map[string]struct {
		files  files
		want   []string // name: types
		broken string
	}{
		"by name": {files: files{
			"20-b.conflist": text(list), "10-a.conflist": text(list), "10-a.conf": text(single), "1-z.json": text(single),
		}, want: []string{"1-z.json: ptp", "10-a.conf: ptp", "10-a.conflist: bridge skipstack", "20-b.conflist: bridge skipstack"}},
		"of another kind": {files: files{
			"05-x.conflist.cilium_bak": text(list), "00-y.yaml": text(list), "README": text(list), "02-q.conf.skipstack-saved": text(single), "9.conflist": text(list),
		}, want: []string{"9.conflist: bridge skipstack"}},
		"a directory":      {files: files{"00.conflist/x": text(list), "10.conflist": text(list)}, want: []string{"10.conflist: bridge skipstack"}},
		"links":            {files: files{"10.conflist": link("../out"), "../out": text(list), "20.conflist": link("../alias"), "../alias": link("out")}, want: []string{"10.conflist: bridge skipstack", "20.conflist: bridge skipstack"}},
		"a dangling link":  {files: files{"10.conflist": link("nowhere"), "20.conflist": text(list)}, want: []string{"20.conflist: bridge skipstack"}, broken: "10.conflist: the container runtime cannot read it"},
		"a FIFO":           {files: files{"10.conflist": fifo, "20.conflist": text(list)}, want: []string{"20.conflist: bridge skipstack"}, broken: "not a regular file"},
		"too large":        {files: files{"10.conflist": text(list + strings.Repeat(" ", plugin.MaxConflist)), "20.conf": text(single)}, want: []string{"20.conf: ptp"}, broken: "larger than"},
		"broken first":     {files: files{"10.conflist": text("{"), "20.conflist": text(`{"name":"n","plugins":[]}`), "30.conf": text(single)}, want: []string{"30.conf: ptp"}, broken: "10.conflist: the container runtime cannot load it"},
		"broken later":     {files: files{"10.conf": text(single), "20.conflist": text("{")}, want: []string{"10.conf: ptp"}},
		"broken alone":     {files: files{"10.conf": text("")}, broken: "10.conf"},
		"a list in .conf":  {files: files{"10.conf": text(list)}, broken: "missing 'type'"},
		"one in .conflist": {files: files{"10.conflist": text(single)}, broken: "no plugins"},
		"plugins in files": {files: files{"10.conflist": text(`{"cniVersion":"1.0.0","name":"n"}`), "n/5.conf": text(single)}, want: []string{"10.conflist: ptp"}},
		"a name that leads out": {files: files{"10.conflist": text(`{"cniVersion":"1.0.0","name":"../other"}`), "../other/5.conf": text(single)},
			broken: "no plugins"},
		"nothing": {},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "net.d")
			for file, create := range tc.files {
				path := filepath.Join(dir, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := create(path); err != nil {
					t.Fatal(err)
				}
			}
			found, broken, err := Networks(dir)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, n := range found {
				got = append(got, filepath.Base(n.Path)+": "+strings.Join(n.Types, " "))
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("%q, want %q", got, tc.want)
			}
			if (broken == nil) != (tc.broken == "") || broken != nil && !strings.Contains(broken.Error(), tc.broken) {
				t.Errorf("broken: %v, want %q", broken, tc.broken)
			}
			// Install goes by it too, and containerd's way of looking agrees.
			active, err := Options{ConfDir: dir}.activeIn(dir)
			if (err == nil) != (broken == nil && len(found) > 0) || err == nil && active.Path != found[0].Path {
				t.Errorf("active: %s, %v", active.Path, err)
			}
			if name == "a FIFO" || name == "nothing" {
				return // containerd would wait for ever; there is no directory
			}
			paths, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
			if err != nil || len(paths) == 0 {
				t.Fatalf("libcni finds %q, %v", paths, err)
			}
			slices.Sort(paths)
			if first := paths[0]; broken == nil && first != found[0].Path || broken != nil && !strings.HasPrefix(broken.Error(), first+": ") {
				t.Errorf("libcni's first is %s", first)
			}
		})
	}
}

func FuzzPluginTypes(f *testing.F) {
	f.Add("x.conflist", []byte(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"skipstack"}]}`))
	f.Add("x.conf", []byte(`{"cniVersion":"1.0.0","name":"n","type":"ptp"}`))
	f.Add("x.conflist", []byte(`{"name":"..","plugins":null}`))
	f.Add("x.json", []byte(`[]`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, name string, text []byte) {
		types, err := pluginTypes(filepath.Join(dir, filepath.Base(name)), text)
		if (err == nil) != (len(types) > 0) || slices.Contains(types, "") {
			t.Errorf("%q, %v", types, err)
		}
	})
}
