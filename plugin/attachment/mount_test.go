package attachment

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inMountNamespace runs the calling test again, alone, in a mount namespace of
// its own; there it returns true.
func inMountNamespace(t *testing.T) bool {
	t.Helper()
	const env = "SKIPSTACK_TEST_MOUNTS"
	if os.Getenv(env) != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), env+"=1", "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission) {
		t.Skip("no unprivileged user namespaces: cannot mount")
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// mountTmpfs returns a store on a tmpfs of its own.
func mountTmpfs(t *testing.T, options string) *Store {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options+",mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return NewStore(dir)
}

// However little room there is, Put works or leaves everything as it was.
func TestFullFileSystem(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	t.Run("inodes", func(t *testing.T) {
		for free := range 12 {
			for _, c := range changes() {
				if c.do != "put" {
					continue
				}
				t.Run(fmt.Sprintf("%s with %d", c.name, free), func(t *testing.T) {
					s := mountTmpfs(t, "size=1m,nr_inodes=64")
					mustPut(t, s, c.before...)
					var filler []string
					for i := 0; ; i++ {
						path := filepath.Join(s.dir, fmt.Sprintf("filler%d", i))
						if err := os.WriteFile(path, nil, 0o600); errors.Is(err, unix.ENOSPC) {
							break
						} else if err != nil {
							t.Fatal(err)
						}
						filler = append(filler, path)
					}
					for _, path := range filler[:free] {
						remove(t, path)
					}
					filler = filler[free:]
					fullPut(t, s, c, filler, free == 0, free == 11)
				})
			}
		}
	})
	t.Run("blocks", func(t *testing.T) {
		c := change{"", []Record{testRecord(2, 7), testRecord(1, 7)}, "put", testRecord(1, 8)}
		s := mountTmpfs(t, "size=64k")
		mustPut(t, s, c.before...)
		path := filepath.Join(s.dir, "filler")
		if err := os.WriteFile(path, make([]byte, 1<<17), 0o600); !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		fullPut(t, s, c, []string{path}, true, false)
	})
}

func fullPut(t *testing.T, s *Store, c change, filler []string, mustFail, mustWork bool) {
	t.Helper()
	before := snapshot(t, s)
	err := s.Put(c.record)
	switch {
	case err != nil && (!errors.Is(err, unix.ENOSPC) || mustWork):
		t.Errorf("Put: %v", err)
	case err != nil:
		after := slices.DeleteFunc(snapshot(t, s), func(path string) bool {
			// Made on the way, and kept once they exist.
			return (path == attachmentsDir || path == cgroupsDir) && !slices.Contains(before, path)
		})
		if !slices.Equal(before, after) {
			t.Errorf("the failed Put changed\n%v to\n%v", before, after)
		}
	case mustFail:
		t.Error("Put works on a full file system")
	}
	c.wantNoHalf(t, s)
	wantIndexed(t, s, 7, 8, 9)
	if l, err := s.Lock(context.Background()); err == nil {
		mustUnlock(t, l)
	} else if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Lock: %v", err)
	}
	for _, path := range filler {
		remove(t, path)
	}
	mustPut(t, s, c.record)
	wantExactly(t, s, append(c.others(), c.record)...)
}

func TestDeleteOnFullFileSystem(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	s := mountTmpfs(t, "size=64k")
	r := testRecord(1, 7)
	mustPut(t, s, r)
	path := filepath.Join(s.dir, "filler")
	if err := os.WriteFile(path, make([]byte, 1<<17), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	// The lock is held even where the pid cannot be written.
	l := mustLock(t, s)
	wantBusy(t, s)
	mustUnlock(t, l)
	mustDelete(t, s, r.Key)
	remove(t, path)
	wantExactly(t, s)
}

func TestReadOnlyFileSystem(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	s := mountTmpfs(t, "size=1m")
	r, other := testRecord(1, 7), testRecord(2, 7)
	mustPut(t, s, r, other)
	// A stale index entry, which cannot be removed.
	writeFile(t, filepath.Join(s.dir, cgroupsDir, "7", entryName(testKey(3).FileName(), newNonce())), nil)
	if err := unix.Mount("", s.dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, s)
	_, lockErr := s.Lock(context.Background())
	for name, err := range map[string]error{
		"Put": s.Put(r), "Put new": s.Put(testRecord(4, 8)), "Delete": s.Delete(r.Key), "Repair": s.Repair(), "Lock": lockErr,
	} {
		if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), s.dir) {
			t.Errorf("%s: %v, want EROFS on %s", name, err, s.dir)
		}
	}
	if got, err := s.Get(r.Key); err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("Get = %+v, %v", got, err)
	}
	wantIndexed(t, s, 7)
	if after := snapshot(t, s); !slices.Equal(before, after) {
		t.Errorf("%v became %v", before, after)
	}
	if err := s.Delete(testKey(4)); err != nil {
		t.Errorf("Delete of nothing: %v", err)
	}
}
