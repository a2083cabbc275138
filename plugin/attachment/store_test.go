package attachment

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func newTestStore(t *testing.T) *Store {
	t.Helper()
	return NewStore(filepath.Join(t.TempDir(), "run"))
}

// A record from before the node was booted is known as such, until it is written again.
func TestStale(t *testing.T) {
	s := newTestStore(t)
	ids := map[string]string{"first": "a", "second": "b", "unknown": ""}
	now := "first"
	s.boot = func() string { return ids[now] }
	for _, tc := range []struct {
		written, read string
		stale         bool
	}{
		{"first", "first", false}, {"first", "second", true}, {"second", "second", false},
		{"first", "unknown", false}, {"unknown", "second", false},
	} {
		r := testRecord(1, 7)
		r.Stale = tc.read == "second" // that is not what counts
		now = tc.written
		if err := s.Put(r); err != nil {
			t.Fatal(err)
		}
		now = tc.read
		one, err := s.Get(r.Key)
		if err != nil {
			t.Fatal(err)
		}
		all, err := s.List()
		if err != nil || len(all) != 1 {
			t.Fatalf("List: %+v, %v", all, err)
		}
		of, err := s.ByCgroup(7)
		if err != nil || len(of) != 1 {
			t.Fatalf("ByCgroup: %+v, %v", of, err)
		}
		if one.Stale != tc.stale || all[0].Stale != tc.stale || of[0].Stale != tc.stale {
			t.Errorf("written in boot %s, read in %s: %+v, %+v, %+v", tc.written, tc.read, one, all, of)
		}
	}
	// That of the kernel.
	real := NewStore(s.dir)
	if id := real.boot(); len(id) != 36 {
		t.Errorf("boot id %q", id)
	}
	if r, err := real.Get(testKey(1)); err != nil || r.Stale {
		t.Errorf("of an unknown boot: %+v, %v", r, err)
	}
}

func testKey(n int) Key { return Key{"net", fmt.Sprintf("container%d", n), "eth0"} }

func testRecord(n int, cgroup uint64) Record {
	r := Record{Version: Version, Key: testKey(n), Status: Attached, CgroupID: cgroup}
	if cgroup == 0 {
		r.Status, r.Reason = Skipped, "no cgroup"
	}
	return r
}

func mustPut(t *testing.T, s *Store, records ...Record) {
	t.Helper()
	for _, r := range records {
		if err := s.Put(r); err != nil {
			t.Fatal(err)
		}
	}
}

func mustDelete(t *testing.T, s *Store, keys ...Key) {
	t.Helper()
	for _, k := range keys {
		if err := s.Delete(k); err != nil {
			t.Fatal(err)
		}
	}
}

// snapshot lists all paths below the store's directory, nonces masked.
func snapshot(t *testing.T, s *Store) []string {
	t.Helper()
	paths := []string{}
	err := filepath.WalkDir(s.dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(s.dir, path)
		if file, ok := recordOf(filepath.Base(rel)); ok {
			rel = filepath.Join(filepath.Dir(rel), entryName(file, "*"))
		}
		paths = append(paths, rel)
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	slices.Sort(paths)
	return paths
}

// wantExactly fails unless the directory holds the records, one index entry
// for each that has a cgroup, and nothing else.
func wantExactly(t *testing.T, s *Store, records ...Record) {
	t.Helper()
	want := map[string]bool{}
	for _, r := range records {
		got, err := s.Get(r.Key)
		if err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("Get = %+v, %v, want %+v", got, err, r)
		}
		want[filepath.Join(attachmentsDir, r.FileName())] = true
		if r.CgroupID != 0 {
			want[filepath.Join(cgroupsDir, cgroupName(r.CgroupID))] = true
			want[filepath.Join(cgroupsDir, cgroupName(r.CgroupID), entryName(r.FileName(), "*"))] = true
		}
	}
	var got []string
	for _, path := range snapshot(t, s) {
		if path != "." && path != attachmentsDir && path != cgroupsDir && path != lockFile {
			got = append(got, path)
		}
	}
	var wanted []string
	for path := range want {
		wanted = append(wanted, path)
	}
	slices.Sort(wanted)
	if !slices.Equal(got, wanted) {
		t.Errorf("directory holds\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(wanted, "\n\t"))
	}
}

// wantIndexed fails unless ByCgroup agrees with the records.
func wantIndexed(t *testing.T, s *Store, ids ...uint64) {
	t.Helper()
	all, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range all {
		if r.CgroupID != 0 && !slices.Contains(ids, r.CgroupID) {
			ids = append(ids, r.CgroupID)
		}
	}
	for _, id := range ids {
		var want []Record
		for _, r := range all {
			if r.CgroupID == id {
				want = append(want, r)
			}
		}
		got, err := s.ByCgroup(id)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("ByCgroup(%d) = %+v, %v, want %+v", id, got, err, want)
		}
	}
}

func TestDefaultRunDir(t *testing.T) {
	if got := NewStore("").dir; got != "/run/skipstack" {
		t.Errorf("default run directory %q", got)
	}
}

func TestPutGetDelete(t *testing.T) {
	s := newTestStore(t)
	r := fullRecord()
	if _, err := s.Get(r.Key); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get before Put: %v, want ErrNotFound", err)
	}
	mustDelete(t, s, r.Key)
	if all, err := s.List(); len(all) != 0 || err != nil {
		t.Errorf("List = %v, %v", all, err)
	}
	if all, err := s.ByCgroup(7); len(all) != 0 || err != nil {
		t.Errorf("ByCgroup = %v, %v", all, err)
	}
	if err := s.Repair(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(s.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("reading created the run directory: %v", err)
	}

	mustPut(t, s, r)
	wantExactly(t, s, r)
	if _, err := s.Get(testKey(1)); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of another key: %v, want ErrNotFound", err)
	}
	mustDelete(t, s, testKey(1))
	wantExactly(t, s, r)

	r.Status, r.Reason, r.Settings = Skipped, "unloaded", nil
	mustPut(t, s, r)
	wantExactly(t, s, r)
	for range 3 {
		mustDelete(t, s, r.Key)
		wantExactly(t, s)
	}
	if _, err := s.Get(r.Key); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get after Delete: %v, want ErrNotFound", err)
	}
}

func TestReplace(t *testing.T) {
	s := newTestStore(t)
	r := testRecord(1, 0)
	if err := s.Replace(r); !errors.Is(err, ErrNotFound) {
		t.Errorf("without a record: %v", err)
	}
	mustPut(t, s, r)
	r = testRecord(1, 7)
	if err := s.Replace(r); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get(r.Key); err != nil || got.CgroupID != 7 {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := s.ByCgroup(7); err != nil || len(got) != 1 {
		t.Errorf("got %+v, %v", got, err)
	}
	want := snapshot(t, s)
	mustPut(t, s, r)
	if got := snapshot(t, s); !slices.Equal(got, want) {
		t.Errorf("Replace leaves %q, Put %q", want, got)
	}
	mustDelete(t, s, r.Key)
	want = snapshot(t, s)
	if err := s.Replace(r); !errors.Is(err, ErrNotFound) {
		t.Errorf("after Delete: %v", err)
	}
	if got := snapshot(t, s); !slices.Equal(got, want) {
		t.Errorf("a Replace in vain leaves %q of %q", got, want)
	}
}

func TestPutSetsVersion(t *testing.T) {
	s := newTestStore(t)
	r := testRecord(1, 7)
	r.Version = 0
	mustPut(t, s, r)
	if got, err := s.Get(r.Key); err != nil || got.Version != Version {
		t.Errorf("Get = %+v, %v", got, err)
	}
}

func TestPermissions(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	s := newTestStore(t)
	mustPut(t, s, testRecord(1, 7))
	l, err := s.Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Unlock()
	err = filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if d.IsDir() {
			want = 0o700
		}
		if fi.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", path, fi.Mode().Perm(), want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestByCgroup(t *testing.T) {
	s := newTestStore(t)
	a, b, c := testRecord(1, 7), testRecord(2, 7), testRecord(3, 70)
	skipped, nowhere := testRecord(4, 7), testRecord(5, 0)
	skipped.Status, skipped.Reason = Skipped, "mode off"
	mustPut(t, s, a, b, c, skipped, nowhere)
	wantExactly(t, s, a, b, c, skipped, nowhere)
	wantIndexed(t, s, 7, 70, 8)
	if got, _ := s.ByCgroup(7); len(got) != 3 {
		t.Errorf("ByCgroup(7) has %d records, want 3", len(got))
	}
	if got, err := s.ByCgroup(0); len(got) != 0 || err != nil {
		t.Errorf("ByCgroup(0) = %v, %v", got, err)
	}
	mustDelete(t, s, a.Key, b.Key)
	wantIndexed(t, s, 7, 70)
	wantExactly(t, s, c, skipped, nowhere)
}

func TestPutMovesIndexEntry(t *testing.T) {
	s := newTestStore(t)
	other := testRecord(9, 1)
	mustPut(t, s, other)
	for _, id := range []uint64{1, 2, 2, 0, 0, 3, 1, 1<<64 - 1} {
		r := testRecord(1, id)
		mustPut(t, s, r)
		wantExactly(t, s, other, r)
		wantIndexed(t, s, 1, 2, 3)
	}
}

func TestListNetwork(t *testing.T) {
	s := newTestStore(t)
	a, b := testRecord(1, 7), testRecord(2, 7)
	b.Network = "other"
	mustPut(t, s, a, b)
	if got, err := s.ListNetwork("other"); err != nil || !reflect.DeepEqual(got, []Record{b}) {
		t.Errorf("ListNetwork = %+v, %v", got, err)
	}
	if got, err := s.ListNetwork("none"); err != nil || len(got) != 0 {
		t.Errorf("ListNetwork = %+v, %v", got, err)
	}
}

func TestHostileKeys(t *testing.T) {
	parts := []string{"", ".", "..", "/", "../../../../tmp/x", "a\x00b", "a\nb", "\"", "\\u0000", "<&>", "\u2028",
		strings.Repeat("x", 1<<16), strings.Repeat("\x00", 1<<14)}
	s := newTestStore(t)
	var records []Record
	for i, part := range parts {
		for j, k := range []Key{{part, "id", "eth0"}, {"net", part, "eth0"}, {"net", "id", part}} {
			records = append(records, Record{Version: Version, Key: k, Status: Attached, CgroupID: uint64(i*3 + j + 1)})
		}
	}
	mustPut(t, s, records...)
	wantExactly(t, s, records...)
	wantIndexed(t, s)
	if entries, err := os.ReadDir(filepath.Dir(s.dir)); err != nil || len(entries) != 1 {
		t.Errorf("something was written outside the run directory: %v, %v", entries, err)
	}
	for _, r := range records {
		mustDelete(t, s, r.Key)
	}
	wantExactly(t, s)

	bad := testRecord(1, 7)
	bad.IfName = "eth\xff"
	if err := s.Put(bad); !errors.Is(err, ErrInvalid) {
		t.Errorf("Put of a key that is not UTF-8: %v, want ErrInvalid", err)
	}
	if _, err := s.Get(bad.Key); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of a key that is not UTF-8: %v, want ErrNotFound", err)
	}
	mustDelete(t, s, bad.Key)
	wantExactly(t, s)
}

func TestErrorsAreShort(t *testing.T) {
	s := newTestStore(t)
	k := Key{strings.Repeat("n", 1<<16), strings.Repeat("\x00", 1<<16), "eth0"}
	_, err := s.Get(k)
	if err == nil || len(err.Error()) > 1000 || strings.ContainsAny(err.Error(), "\x00\n") {
		t.Errorf("error %.2000q", err)
	}
}

func TestCorruptRecord(t *testing.T) {
	good := testRecord(1, 7)
	victim := testRecord(2, 7)
	corrupt := map[string]func(t *testing.T, s *Store, path string){
		"empty": func(t *testing.T, s *Store, path string) { truncate(t, path, 0) },
		"half":  func(t *testing.T, s *Store, path string) { truncate(t, path, 20) },
		"another's record": func(t *testing.T, s *Store, path string) {
			data, err := os.ReadFile(filepath.Join(s.dir, attachmentsDir, good.FileName()))
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, path, data)
		},
		"too long": func(t *testing.T, s *Store, path string) {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, path, append(data, strings.Repeat(" ", maxRecord)...))
		},
		"FIFO": func(t *testing.T, s *Store, path string) {
			remove(t, path)
			if err := unix.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"socket": func(t *testing.T, s *Store, path string) {
			remove(t, path)
			// The path of a UNIX socket must be short.
			t.Chdir(filepath.Dir(path))
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Base(path)}); err != nil {
				t.Fatal(err)
			}
		},
		"symbolic link to itself": func(t *testing.T, s *Store, path string) {
			remove(t, path)
			symlink(t, filepath.Base(path), path)
		},
		"symbolic link to a valid record": func(t *testing.T, s *Store, path string) {
			target := filepath.Join(filepath.Dir(s.dir), "target")
			if err := os.Rename(path, target); err != nil {
				t.Fatal(err)
			}
			symlink(t, target, path)
		},
	}
	for name, damage := range corrupt {
		t.Run(name, func(t *testing.T) {
			setup := func(t *testing.T) *Store {
				s := newTestStore(t)
				mustPut(t, s, good, victim)
				damage(t, s, filepath.Join(s.dir, attachmentsDir, victim.FileName()))
				return s
			}
			t.Run("read", func(t *testing.T) {
				s := setup(t)
				before := snapshot(t, s)
				if r, err := s.Get(victim.Key); !errors.Is(err, ErrCorrupt) || !reflect.DeepEqual(r, Record{}) {
					t.Errorf("Get = %+v, %v, want ErrCorrupt", r, err)
				}
				for name, list := range map[string]func() ([]Record, error){
					"List":        s.List,
					"ListNetwork": func() ([]Record, error) { return s.ListNetwork("net") },
					"ByCgroup":    func() ([]Record, error) { return s.ByCgroup(7) },
				} {
					got, err := list()
					if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), victim.FileName()) {
						t.Errorf("%s: %v, want ErrCorrupt that names the file", name, err)
					}
					if !reflect.DeepEqual(got, []Record{good}) {
						t.Errorf("%s = %+v, want the good record", name, got)
					}
				}
				if after := snapshot(t, s); !slices.Equal(before, after) {
					t.Errorf("reading changed\n%v to\n%v", before, after)
				}
			})
			t.Run("delete", func(t *testing.T) {
				s := setup(t)
				mustDelete(t, s, victim.Key)
				if _, err := s.Get(victim.Key); !errors.Is(err, ErrNotFound) {
					t.Errorf("Get: %v, want ErrNotFound", err)
				}
				wantIndexed(t, s, 7)
				wantExactly(t, s, good)
			})
			t.Run("put", func(t *testing.T) {
				s := setup(t)
				mustPut(t, s, victim)
				wantIndexed(t, s, 7)
				wantExactly(t, s, good, victim)
			})
			t.Run("repair", func(t *testing.T) {
				s := setup(t)
				if err := s.Repair(); err != nil {
					t.Fatal(err)
				}
				wantIndexed(t, s, 7)
				wantExactly(t, s, good)
			})
		})
	}
}

func TestNewerVersion(t *testing.T) {
	s := newTestStore(t)
	key := Key{"net", "new", "eth0"}
	// What a newer binary would have left.
	r := testRecord(0, 77)
	r.Key = key
	mustPut(t, s, r)
	path := filepath.Join(s.dir, attachmentsDir, key.FileName())
	writeFile(t, path, []byte(newerRecord))
	unchanged := func() {
		t.Helper()
		if data, err := os.ReadFile(path); err != nil || string(data) != newerRecord {
			t.Errorf("the record is now %q, %v", data, err)
		}
	}

	got, err := s.Get(key)
	if err != nil || got.Version != 9 || got.Key != key || got.CgroupID != 77 || got.Status != "migrating" {
		t.Errorf("Get = %+v, %v", got, err)
	}
	wantIndexed(t, s, 77)
	if err := s.Put(r); !errors.Is(err, ErrNewerVersion) {
		t.Errorf("Put over a newer record: %v, want ErrNewerVersion", err)
	}
	if err := s.Put(got); !errors.Is(err, ErrNewerVersion) {
		t.Errorf("Put of a newer record: %v, want ErrNewerVersion", err)
	}
	unchanged()
	// Even where the index is lost, the record is not rewritten.
	if err := os.RemoveAll(filepath.Join(s.dir, cgroupsDir)); err != nil {
		t.Fatal(err)
	}
	if err := s.Repair(); err != nil {
		t.Error(err)
	}
	unchanged()
	wantIndexed(t, s, 77)
	mustDelete(t, s, key)
	wantExactly(t, s)
}

func TestRepair(t *testing.T) {
	s := newTestStore(t)
	a, b, c := testRecord(1, 7), testRecord(2, 7), testRecord(3, 0)
	mustPut(t, s, a, b, c)
	in := func(parts ...string) string { return filepath.Join(append([]string{s.dir}, parts...)...) }
	nonce := newNonce()
	stale := strings.TrimSuffix(testKey(4).FileName(), recordSuffix) + "." + nonce

	writeFile(t, in(attachmentsDir, tempPrefix+nonce), []byte("{"))
	if err := os.MkdirAll(in(cgroupsDir, "8"), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, in(cgroupsDir, "7", stale), nil)
	if err := os.Mkdir(in(cgroupsDir, "9"), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, in(cgroupsDir, "9", stale), nil)
	symlink(t, "/etc/passwd", in(cgroupsDir, "9", entryName(a.FileName(), nonce)))
	// An entry that somebody removed.
	d, err := os.ReadDir(in(cgroupsDir, "7"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range d {
		if file, _ := recordOf(e.Name()); file == b.FileName() {
			remove(t, in(cgroupsDir, "7", e.Name()))
		}
	}
	for range 2 {
		if err := s.Repair(); err != nil {
			t.Fatal(err)
		}
		wantExactly(t, s, a, b, c)
		wantIndexed(t, s, 7, 8, 9)
	}
}

// What is not named as this package names it belongs to somebody else.
func TestForeignFilesStay(t *testing.T) {
	s := newTestStore(t)
	r := testRecord(1, 7)
	mustPut(t, s, r)
	foreign := []string{"verdict-x.json", "attachments/readme", "attachments/.tmp-", "attachments/.tmp-0123456789ABCDEF",
		"attachments/" + strings.Repeat("a", 63) + ".json", "cgroups/7/notes", "cgroups/007", "cgroups/x"}
	for _, name := range foreign {
		writeFile(t, filepath.Join(s.dir, name), []byte("keep"))
	}
	if err := s.Repair(); err != nil {
		t.Fatal(err)
	}
	wantIndexed(t, s, 7)
	mustDelete(t, s, r.Key)
	for _, name := range foreign {
		if data, err := os.ReadFile(filepath.Join(s.dir, name)); err != nil || string(data) != "keep" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
}

func TestListSweepsDeadTemporaryFilesOnly(t *testing.T) {
	s := newTestStore(t)
	mustPut(t, s, testRecord(1, 7))
	dead := filepath.Join(s.dir, attachmentsDir, tempPrefix+newNonce())
	live := filepath.Join(s.dir, attachmentsDir, tempPrefix+newNonce())
	link := filepath.Join(s.dir, attachmentsDir, tempPrefix+newNonce())
	writeFile(t, dead, nil)
	writeFile(t, live, nil)
	symlink(t, "nowhere", link)
	f, err := os.Open(live)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if locked, err := tryFlock(f); !locked || err != nil {
		t.Fatal(locked, err)
	}
	for name, sweep := range map[string]func() error{
		"List":   func() error { _, err := s.List(); return err },
		"Repair": s.Repair,
	} {
		if err := sweep(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, path := range []string{dead, link} {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s left %s: %v", name, path, err)
			}
		}
		if _, err := os.Lstat(live); err != nil {
			t.Errorf("%s removed a live writer's file: %v", name, err)
		}
	}
	f.Close()
	if _, err := s.List(); err != nil {
		t.Error(err)
	}
	wantExactly(t, s, testRecord(1, 7))
}

func TestUnsafeRunDir(t *testing.T) {
	record := testRecord(1, 7)
	cases := map[string]func(t *testing.T, dir string) string{
		"symbolic link": func(t *testing.T, dir string) string {
			symlink(t, t.TempDir(), dir)
			return "symbolic link"
		},
		"dangling symbolic link": func(t *testing.T, dir string) string {
			symlink(t, filepath.Join(t.TempDir(), "x"), dir)
			return "symbolic link"
		},
		"file": func(t *testing.T, dir string) string {
			writeFile(t, dir, nil)
			return "is not a directory"
		},
		"world-writable": func(t *testing.T, dir string) string {
			mkdirMode(t, dir, 0o707)
			return "chmod 0700"
		},
		"sticky": func(t *testing.T, dir string) string {
			mkdirMode(t, dir, 0o777|fs.ModeSticky)
			return "chmod 0700"
		},
		"group-writable": func(t *testing.T, dir string) string {
			mkdirMode(t, dir, 0o770)
			return "chmod 0700"
		},
		"attachments is a symbolic link": func(t *testing.T, dir string) string {
			mkdirMode(t, dir, 0o700)
			symlink(t, t.TempDir(), filepath.Join(dir, attachmentsDir))
			return "symbolic link"
		},
		"attachments is world-writable": func(t *testing.T, dir string) string {
			mkdirMode(t, dir, 0o700)
			mkdirMode(t, filepath.Join(dir, attachmentsDir), 0o777)
			return "chmod 0700"
		},
	}
	for name, plant := range cases {
		for _, suffix := range []string{"", "/"} {
			t.Run(name+suffix, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "run")
				says := plant(t, dir)
				s := NewStore(dir + suffix)
				wantUnsafe(t, s, record, says)
				if strings.HasPrefix(name, "attachments") {
					return
				}
				if l, err := s.Lock(t.Context()); !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), says) {
					t.Errorf("Lock = %v, %v, want ErrUnsafe", l, err)
				}
			})
		}
	}
	t.Run("another user's", func(t *testing.T) {
		// A user other than root has no directory to give away, but / is root's.
		dir := "/"
		if os.Geteuid() == 0 {
			dir = t.TempDir()
			if err := os.Chown(dir, 12345, 0); err != nil {
				t.Fatal(err)
			}
		}
		wantUnsafe(t, NewStore(dir), record, "belongs to uid")
	})
	t.Run("index directories", func(t *testing.T) {
		for _, at := range []string{cgroupsDir, cgroupsDir + "/7"} {
			s := newTestStore(t)
			mustPut(t, s, record, testRecord(2, 8))
			target := t.TempDir()
			writeFile(t, filepath.Join(target, entryName(record.FileName(), newNonce())), nil)
			if err := os.RemoveAll(filepath.Join(s.dir, at)); err != nil {
				t.Fatal(err)
			}
			symlink(t, target, filepath.Join(s.dir, at))
			if err := s.Put(record); !errors.Is(err, ErrUnsafe) {
				t.Errorf("%s: Put: %v, want ErrUnsafe", at, err)
			}
			if _, err := s.ByCgroup(7); !errors.Is(err, ErrUnsafe) {
				t.Errorf("%s: ByCgroup: %v, want ErrUnsafe", at, err)
			}
			if got, err := s.Get(record.Key); err != nil || !reflect.DeepEqual(got, record) {
				t.Errorf("%s: the failed Put changed the record: %+v, %v", at, got, err)
			}
			if entries, err := os.ReadDir(target); err != nil || len(entries) != 1 {
				t.Errorf("%s: the link's target was changed: %v, %v", at, entries, err)
			}
			if names, _ := filepath.Glob(filepath.Join(s.dir, attachmentsDir, tempPrefix+"*")); len(names) != 0 {
				t.Errorf("%s: the failed Put left %v", at, names)
			}
		}
	})
}

func wantUnsafe(t *testing.T, s *Store, record Record, says string) {
	t.Helper()
	_, getErr := s.Get(record.Key)
	_, listErr := s.List()
	_, netErr := s.ListNetwork("net")
	_, byErr := s.ByCgroup(7)
	for name, err := range map[string]error{"Put": s.Put(record), "Get": getErr, "Delete": s.Delete(record.Key),
		"List": listErr, "ListNetwork": netErr, "ByCgroup": byErr, "Repair": s.Repair()} {
		if !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want ErrUnsafe that says %q", name, err, says)
		}
	}
}

// A record or temporary name that is planted as a link is replaced, not
// followed.
func TestPutFollowsNoLink(t *testing.T) {
	s := newTestStore(t)
	r := testRecord(1, 7)
	mustPut(t, s, testRecord(2, 7))
	target := filepath.Join(t.TempDir(), "target")
	writeFile(t, target, []byte("keep"))
	symlink(t, target, filepath.Join(s.dir, attachmentsDir, r.FileName()))
	mustPut(t, s, r)
	wantExactly(t, s, r, testRecord(2, 7))
	if data, err := os.ReadFile(target); err != nil || string(data) != "keep" {
		t.Errorf("target: %q, %v", data, err)
	}
}

// A directory in the place of a record is nobody's record: it is reported, not
// removed, and a Put that fails on it takes back its index entry.
func TestDirectoryInPlaceOfRecord(t *testing.T) {
	s := newTestStore(t)
	r := testRecord(1, 7)
	mustPut(t, s, testRecord(2, 7))
	mkdirMode(t, filepath.Join(s.dir, attachmentsDir, r.FileName()), 0o700)
	before := snapshot(t, s)
	for _, id := range []uint64{0, 7, 8} {
		if err := s.Put(testRecord(1, id)); !errors.Is(err, unix.EISDIR) {
			t.Errorf("Put: %v, want EISDIR", err)
		}
	}
	if err := s.Delete(r.Key); !errors.Is(err, unix.EISDIR) {
		t.Errorf("Delete: %v, want EISDIR", err)
	}
	if _, err := s.Get(r.Key); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Get: %v, want ErrCorrupt", err)
	}
	if after := snapshot(t, s); !slices.Equal(before, after) {
		t.Errorf("%v became %v", before, after)
	}
}

func TestNothingGrowsWithChurn(t *testing.T) {
	s := newTestStore(t)
	stays := testRecord(0, 7)
	mustPut(t, s, stays, testRecord(1, 1))
	mustDelete(t, s, testKey(1))
	before := snapshot(t, s)
	for i := range 1000 {
		r := testRecord(i%17+1, uint64(i%5+5))
		if i%7 == 0 {
			r = testRecord(i%17+1, 0)
		}
		mustPut(t, s, r)
		if i%3 == 0 {
			r.CgroupID = uint64(i%11 + 1)
			mustPut(t, s, r)
		}
		mustDelete(t, s, r.Key)
	}
	if after := snapshot(t, s); !slices.Equal(before, after) {
		t.Errorf("before:\n\t%s\nafter:\n\t%s", strings.Join(before, "\n\t"), strings.Join(after, "\n\t"))
	}
	wantExactly(t, s, stays)
}

// The cost of Put, Get, ByCgroup and Delete does not depend on the number of
// attachments: they read neither the directory nor other records.
func TestNoScan(t *testing.T) {
	s := newTestStore(t)
	for i := range 50 {
		mustPut(t, s, testRecord(i, uint64(i+100)))
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, dir := range []string{attachmentsDir, cgroupsDir} {
		if _, err := unix.InotifyAddWatch(fd, filepath.Join(s.dir, dir), unix.IN_ACCESS|unix.IN_OPEN); err != nil {
			t.Fatal(err)
		}
	}
	// seen returns the names that were opened or read, "." for a watched
	// directory that was read.
	seen := func() map[string]bool {
		names := map[string]bool{}
		buf := make([]byte, 1<<16)
		for {
			n, err := unix.Read(fd, buf)
			if err == unix.EAGAIN {
				return names
			}
			if err != nil {
				t.Fatal(err)
			}
			for off := 0; off < n; {
				ev := (*unix.InotifyEvent)(unsafe.Pointer(&buf[off]))
				off += unix.SizeofInotifyEvent
				name := strings.TrimRight(string(buf[off:off+int(ev.Len)]), "\x00")
				off += int(ev.Len)
				if ev.Mask&unix.IN_Q_OVERFLOW != 0 {
					t.Fatal("too many events")
				}
				if name == "" && ev.Mask&unix.IN_ACCESS != 0 {
					name = "."
				}
				if name != "" {
					names[name] = true
				}
			}
		}
	}
	if _, err := s.List(); err != nil {
		t.Fatal(err)
	}
	if got := seen(); !got["."] || !got[testKey(3).FileName()] {
		t.Fatalf("the test does not see a scan: %v", got)
	}
	r := testRecord(1000, 1000)
	ops := []struct {
		name string
		do   func() error
	}{
		{"Put", func() error { return s.Put(r) }},
		{"Put again", func() error { return s.Put(r) }},
		{"Put moved", func() error { m := r; m.CgroupID = 1001; return s.Put(m) }},
		{"Get", func() error { _, err := s.Get(r.Key); return err }},
		{"ByCgroup", func() error { _, err := s.ByCgroup(1001); return err }},
		{"ByCgroup none", func() error { _, err := s.ByCgroup(5000); return err }},
		{"Delete", func() error { return s.Delete(r.Key) }},
		{"Delete none", func() error { return s.Delete(r.Key) }},
		{"Lock", func() error {
			l, err := s.Lock(t.Context())
			if err != nil {
				return err
			}
			return l.Unlock()
		}},
	}
	for _, op := range ops {
		if err := op.do(); err != nil {
			t.Fatalf("%s: %v", op.name, err)
		}
		for name := range seen() {
			if name != r.FileName() && !isTemp(name) && name != "1000" && name != "1001" {
				t.Errorf("%s read %q", op.name, name)
			}
		}
	}
}

func TestConcurrentGoroutines(t *testing.T) {
	s := newTestStore(t)
	const workers, rounds = 8, 40
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() { churn(t, s, w, rounds) })
	}
	wg.Wait()
	afterChurn(t, s)
}

// churn writes and deletes records whose keys and cgroups other workers use
// too, and reads them. It fails on any error.
func churn(t testing.TB, s *Store, worker, rounds int) {
	for i := range rounds {
		n := (i*7 + worker*3) % 5
		var err error
		switch (i + worker) % 6 {
		case 0, 1, 2:
			err = s.Put(testRecord(n, uint64((i+worker)%4)))
		case 3:
			err = s.Delete(testKey(n))
		case 4:
			_, err = s.ByCgroup(uint64(i%3 + 1))
		case 5:
			if _, err = s.Get(testKey(n)); errors.Is(err, ErrNotFound) {
				err = nil
			}
			if i%10 == 0 && err == nil {
				err = s.Repair()
			}
		}
		if err != nil {
			t.Errorf("worker %d, round %d: %v", worker, i, err)
		}
	}
}

// afterChurn checks that no record lacks its index entry, before anything
// could have repaired it, and that nothing is left over.
func afterChurn(t *testing.T, s *Store) {
	t.Helper()
	for n := range 5 {
		r, err := s.Get(testKey(n))
		if errors.Is(err, ErrNotFound) || err == nil && r.CgroupID == 0 {
			continue
		}
		if err != nil {
			t.Error(err)
			continue
		}
		if matches, _ := filepath.Glob(filepath.Join(s.dir, cgroupsDir, cgroupName(r.CgroupID), entryName(r.FileName(), "*"))); len(matches) == 0 {
			t.Errorf("record %d has no index entry for cgroup %d", n, r.CgroupID)
		}
	}
	wantIndexed(t, s, 1, 2, 3)
	if err := s.Repair(); err != nil {
		t.Error(err)
	}
	all, err := s.List()
	if err != nil {
		t.Error(err)
	}
	wantExactly(t, s, all...)
	for _, r := range all {
		mustDelete(t, s, r.Key)
	}
	wantExactly(t, s)
}

func BenchmarkPutDelete(b *testing.B) {
	for _, others := range []int{1, 250} {
		b.Run(fmt.Sprintf("beside%d", others), func(b *testing.B) {
			s := NewStore(filepath.Join(b.TempDir(), "run"))
			for i := range others {
				if err := s.Put(testRecord(i, uint64(i+1))); err != nil {
					b.Fatal(err)
				}
			}
			r := testRecord(1000, 1000)
			r.Settings, r.Created = json.RawMessage(`{"mode":"auto"}`), time.Now()
			for b.Loop() {
				if err := errors.Join(s.Put(r), s.Delete(r.Key)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func truncate(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func mkdirMode(t *testing.T, path string, mode fs.FileMode) {
	t.Helper()
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}
