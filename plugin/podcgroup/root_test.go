package podcgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFindRoot(t *testing.T) {
	for _, c := range []struct {
		name  string
		v2    []string // directories, of those made, that are on cgroup2
		made  []string
		mount []string // "root point" of cgroup2 mounts
		want  string
	}{
		{name: "unified", made: []string{"sys/unified"}, v2: []string{"sys"}, want: "sys"},
		{name: "unified with a cgroup of that name", made: []string{"sys/unified"}, v2: []string{"sys", "sys/unified"}, want: "sys"},
		{name: "hybrid", made: []string{"sys/unified"}, v2: []string{"sys/unified"}, want: "sys/unified"},
		{name: "elsewhere", made: []string{"sys", "mnt/cg"}, v2: []string{"mnt/cg"}, mount: []string{"/ mnt/cg"}, want: "mnt/cg"},
		{name: "elsewhere, with a space", made: []string{"sys", "mnt/c g"}, v2: []string{"mnt/c g"}, mount: []string{`/ mnt/c\040g`}, want: "mnt/c g"},
		{name: "no sysfs directory", made: []string{"mnt/cg"}, v2: []string{"mnt/cg"}, mount: []string{"/ mnt/cg"}, want: "mnt/cg"},
		{name: "the whole before a part", made: []string{"sys", "a", "b"}, v2: []string{"a", "b"}, mount: []string{"/part a", "/ b"}, want: "b"},
		{name: "only a part", made: []string{"sys", "a"}, v2: []string{"a"}, mount: []string{"/part a"}, want: "a"},
		{name: "mounted over", made: []string{"sys", "a", "b"}, v2: []string{"b"}, mount: []string{"/ a", "/ b"}, want: "b"},
		{name: "pure v1", made: []string{"sys/cpu", "sys/memory"}},
		{name: "listed but gone", made: []string{"sys"}, mount: []string{"/ a"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			n := &node{t: t}
			for _, path := range c.made {
				n.mkdir(filepath.Join(dir, path))
			}
			lines := "25 1 0:24 / / rw - ext4 /dev/sda rw\n31 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
			for i, m := range c.mount {
				root, point, _ := strings.Cut(m, " ")
				lines += fmt.Sprintf("%d 25 0:28 %s %s rw shared:1 master:2 - cgroup2 none rw\n", 40+i, root, filepath.Join(dir, point))
			}
			n.write(filepath.Join(dir, "proc/self/mountinfo"), lines)
			inodes := map[uint64]bool{}
			for _, path := range c.v2 {
				var st unix.Stat_t
				if err := unix.Stat(filepath.Join(dir, path), &st); err != nil {
					t.Fatal(err)
				}
				inodes[st.Ino] = true
			}
			fsType := func(fd int) (int64, error) {
				var st unix.Stat_t
				err := unix.Fstat(fd, &st)
				if inodes[st.Ino] {
					return unix.CGROUP2_SUPER_MAGIC, err
				}
				return unix.TMPFS_MAGIC, err
			}
			got, err := findRoot(filepath.Join(dir, "sys"), filepath.Join(dir, "proc"), fsType)
			if c.want == "" {
				if !errors.Is(err, ErrNoCgroup2) {
					t.Fatalf("got %q, %v, want %v", got, err, ErrNoCgroup2)
				}
				for _, word := range []string{filepath.Join(dir, "sys"), "mountinfo", "systemd.unified_cgroup_hierarchy"} {
					if !strings.Contains(err.Error(), word) {
						t.Errorf("error lacks %q: %v", word, err)
					}
				}
				return
			}
			if err != nil || got != filepath.Join(dir, c.want) {
				t.Errorf("got %q, %v, want %q", got, err, filepath.Join(dir, c.want))
			}
		})
	}
	t.Run("nothing to read", func(t *testing.T) {
		dir := t.TempDir()
		if got, err := FindRoot(dir, dir); !errors.Is(err, ErrNoCgroup2) || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %q, %v, want %v", got, err, ErrNoCgroup2)
		}
	})
}

func TestMountBase(t *testing.T) {
	for _, c := range []struct{ name, mounts, root, want string }{
		{"whole hierarchy", "/ /cg", "/cg", "/"},
		{"below the mount point", "/ /cg", "/cg/a/b", "/a/b"},
		{"bind mount of a part", "/a /cg", "/cg/b", "/a/b"},
		{"mount within a mount", "/ /cg|/x /cg/a", "/cg/a/b", "/x/b"},
		{"the last of two on one point", "/x /cg|/y /cg", "/cg", "/y"},
		{"at the root", "/ /", "/cg", "/cg"},
		{"trailing slash", "/ /cg", "/cg/", "/"},
		{"similar name", "/ /cg", "/cgroup", "error"},
		{"none", "", "/cg", "error"},
		{"outside the cgroup namespace", "/.. /cg", "/cg", "error"},
	} {
		proc := t.TempDir()
		n := &node{t: t}
		lines := ""
		for m := range strings.SplitSeq(c.mounts, "|") {
			if root, point, ok := strings.Cut(m, " "); ok {
				lines += fmt.Sprintf("1 2 0:3 %s %s rw - cgroup2 none rw\n", root, point)
			}
		}
		n.write(filepath.Join(proc, "self/mountinfo"), lines)
		got, err := mountBase(proc, c.root)
		if c.want == "error" {
			if err == nil {
				t.Errorf("%s: got %s, want an error", c.name, slash(got))
			}
			continue
		}
		if err != nil || slash(got) != c.want {
			t.Errorf("%s: got %s, %v, want %s", c.name, slash(got), err, c.want)
		}
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		`/a`: "/a", `/a\040b`: "/a b", `\134`: `\`, `\011\012`: "\t\n", `\`: `\`, `\04`: `\04`, `\999`: `\999`, `\777`: `\777`, `a\040`: "a ",
	} {
		if got := unescape(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestCheckRoot(t *testing.T) {
	for _, path := range []string{t.TempDir(), "/no/such/directory", "/dev/null", "/proc"} {
		if err := CheckRoot(path); !errors.Is(err, ErrNoCgroup2) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if root, err := FindRoot("/sys/fs/cgroup", "/proc"); err == nil {
		if err := CheckRoot(root); err != nil {
			t.Error(err)
		}
	}
}
