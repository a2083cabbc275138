package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
)

// fakeSwitch is a switch that no kernel has, so that a test can throw it without
// reaching other sets of the machine.
type fakeSwitch struct {
	slots  map[bpf.DatapathSwitchSlot]uint32
	fail   error
	closed bool
}

func (s *fakeSwitch) Put(key, value any) error {
	if s.fail != nil {
		return s.fail
	}
	if s.slots == nil {
		s.slots = map[bpf.DatapathSwitchSlot]uint32{}
	}
	s.slots[key.(bpf.DatapathSwitchSlot)] = value.(uint32)
	return nil
}

func (s *fakeSwitch) Close() error { s.closed = true; return nil }

// A map that is gone is passed over; any other trouble is reported, after all
// others were switched.
func TestSwitchOffTriesAllAndReportsWhatItMissed(t *testing.T) {
	for _, tc := range []struct {
		name     string
		open     error // of map 2
		put      error // into map 2
		list     error // after map 4
		sets     int
		reported error
	}{
		{name: "all", sets: 3},
		{name: "gone meanwhile", open: unix.ENOENT, sets: 2},
		{name: "not permitted", open: unix.EPERM, sets: 2, reported: fs.ErrPermission},
		{name: "no descriptors", open: unix.EMFILE, sets: 2, reported: unix.EMFILE},
		{name: "not written", put: unix.EIO, sets: 2, reported: unix.EIO},
		{name: "not all listed", list: unix.EPERM, sets: 3, reported: fs.ErrPermission},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ours := map[ebpf.MapID]*fakeSwitch{1: {}, 2: {fail: tc.put}, 4: {}} // 3 is somebody else's
			next := func(id ebpf.MapID) (ebpf.MapID, error) {
				if id < 4 {
					return id + 1, nil
				}
				if tc.list != nil {
					return 0, tc.list
				}
				return 0, unix.ENOENT
			}
			var seen []ebpf.MapID
			open := func(id ebpf.MapID) (switchMap, error) {
				seen = append(seen, id)
				if id == 2 && tc.open != nil {
					return nil, fmt.Errorf("open BPF map: %w", tc.open)
				}
				if m, ok := ours[id]; ok {
					return m, nil
				}
				return nil, nil
			}
			sets, err := switchAll(kernelSwitches(next, open), true)
			if sets != tc.sets || (err != nil) != (tc.reported != nil) || tc.reported != nil && !errors.Is(err, tc.reported) {
				t.Errorf("%d sets, error %v", sets, err)
			}
			if !slices.Equal(seen, []ebpf.MapID{1, 2, 3, 4}) {
				t.Errorf("tried %v", seen)
			}
			for id, m := range ours {
				if reached := id != 2 || tc.open == nil && tc.put == nil; (m.slots[bpf.DatapathSwitchSlotSWITCH_OFF] == 1) != reached {
					t.Errorf("map %d: %v", id, m.slots)
				}
				if m.closed != (id != 2 || tc.open == nil) {
					t.Errorf("map %d: closed %v", id, m.closed)
				}
			}
		})
	}
}

// What may not be read is not "not loaded".
func TestSwitchOnReportsWhatItMayNotRead(t *testing.T) {
	bpffs := t.TempDir()
	if sets, err := SwitchNode(bpffs, false); sets != 0 || err != nil {
		t.Errorf("nothing there: %d sets, %v", sets, err)
	}
	if err := os.Mkdir(filepath.Join(bpffs, "skipstack"), 0); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		// This thread's file access becomes that of a user without privileges.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := unix.Setfsuid(65534); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := unix.Setfsuid(0); err != nil {
				t.Error(err)
			}
		}()
	}
	if sets, err := SwitchNode(bpffs, false); sets != 0 || !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%d sets, %v", sets, err)
	}
}

func TestPublished(t *testing.T) {
	for _, path := range []string{t.TempDir(), "/no/such/directory"} {
		if _, err := Published(path); !errors.Is(err, ErrNoBPFFS) {
			t.Errorf("%s: %v", path, err)
		}
	}
	bpffs := newBPFFS(t)
	if there, err := Published(bpffs); there || err != nil {
		t.Errorf("nothing loaded: %v, %v", there, err)
	}
	mustLoad(t, bpffs)
	if there, err := Published(bpffs); !there || err != nil {
		t.Errorf("loaded: %v, %v", there, err)
	}
}

// The switch is known from all other maps of a set.
func TestOpenSwitch(t *testing.T) {
	s := mustLoad(t, newBPFFS(t))
	for name, m := range s.maps {
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, ok := info.ID()
		if !ok {
			t.Fatal("no id")
		}
		found, err := openSwitch(id)
		if err != nil || (found != nil) != (name == bpf.DatapathMapSkipstackSwitch) {
			t.Errorf("%s: %v, %v", name, found, err)
		}
		if found != nil {
			found.Close()
		}
	}
	if m, err := openSwitch(^ebpf.MapID(0)); m != nil || !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "map") {
		t.Errorf("%v, %v", m, err)
	}
}

// What is there and cannot be looked at is not taken for gone.
func TestLiveInKernelWithoutProc(t *testing.T) {
	s := mustLoad(t, newBPFFS(t))
	info, err := s.maps[bpf.DatapathMapSkipstackSwitch].Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	var openErr, countErr error
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the mount namespace ends with the thread
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = unix.Mount("none", "/proc", "tmpfs", 0, "")
		}
		if err == nil {
			_, openErr = openSwitch(id)
			_, countErr = LiveInKernel()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if openErr == nil || errors.Is(openErr, fs.ErrNotExist) {
		t.Errorf("open the switch: %v", openErr)
	}
	if countErr == nil || !strings.Contains(countErr.Error(), "fdinfo") {
		t.Errorf("count sockets: %v", countErr)
	}
}
