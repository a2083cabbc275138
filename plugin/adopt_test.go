package plugin

import (
	"errors"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// A pod whose ADD had no time is plain until the prober attaches it.
func TestAdopt(t *testing.T) {
	probe := func(t *testing.T, b *bench) {
		t.Helper()
		if _, err := b.node().Probe(t.Context(), b.config(), true, nil); err != nil {
			t.Fatal(err)
		}
	}
	// wantStarted wants a prober that loads the datapath. An ADD that cannot load it,
	// and leaves its pod for later, starts a second one, which finds the probe lock taken.
	wantStarted := func(t *testing.T, b *bench) {
		t.Helper()
		if starts := b.prober.starts; len(starts) == 0 || slices.Contains(starts, false) {
			t.Errorf("prober started %v", starts)
		}
	}
	// late makes an ADD fail because the datapath is being loaded.
	late := func(t *testing.T, r request) *bench {
		t.Helper()
		b := newBench(t)
		b.verdicts.cached, b.verdicts.probed = nil, safe()
		b.datapath.fail["Load"] = datapath.ErrBusy
		b.mustAdd(r)
		b.wantRecord(r, attachment.Skipped, "busy: ")
		b.wantLinks()
		wantStarted(t, b)
		delete(b.datapath.fail, "Load")
		return b
	}
	timed(t, "adopted", func(t *testing.T) {
		r := request{conf: `"excludePorts":[80]`}
		b := late(t, r)
		probe(t, b)
		b.wantRecord(r, attachment.Attached, "")
		b.wantLinks(101)
		want := []datapath.PortRange{{First: 80, Last: 80}}
		if got := b.pod(101).ExcludePorts; !reflect.DeepEqual(got, want) {
			t.Errorf("excluded ports %v, want %v", got, want)
		}
		if rec, _ := b.record(r); rec.Pending != nil || rec.CgroupID != 101 || rec.BPFFSDev != 7 {
			t.Errorf("record %+v", rec)
		}
		if err := b.check(r); err != nil {
			t.Errorf("CHECK: %v", err)
		}
		b.mustDel(r)
		b.wantNothing()
	})
	timed(t, "load by hand", func(t *testing.T) {
		b := late(t, request{})
		if _, err := b.node().Load(t.Context(), b.config()); err != nil {
			t.Fatal(err)
		}
		b.wantRecord(request{}, attachment.Attached, "")
	})
	timed(t, "lock busy", func(t *testing.T) {
		b := newBench(t)
		b.budget = 200 * time.Millisecond
		lock, err := b.store().Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		b.mustAdd(request{})
		b.wantRecord(request{}, attachment.Skipped, "busy: ")
		if err := lock.Unlock(); err != nil {
			t.Fatal(err)
		}
		wantStarted(t, b)
		probe(t, b)
		b.wantRecord(request{}, attachment.Attached, "")
		b.wantLinks(101)
	})
	// Whatever becomes of an ADD that waits, and of the prober that runs meanwhile, the
	// record is there before anybody is asked to look.
	timed(t, "recorded while it waits", func(t *testing.T) {
		b := newBench(t)
		b.datapath.loaded, b.datapath.node.Open = true, true
		lock, err := b.store().Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(b.budget/2, func() {
			b.wantRecord(request{}, attachment.Skipped, "busy: ")
			if rec, _ := b.record(request{}); rec.Pending == nil || len(b.prober.starts) > 0 {
				t.Errorf("record %+v, prober started %v", rec, b.prober.starts)
			}
			lock.Unlock()
		})
		b.mustAdd(request{})
		b.wantRecord(request{}, attachment.Attached, "")
		b.wantLinks(101)
		b.mustDel(request{})
		b.wantNothing()
	})
	// A pod that cannot be attached does not keep the prober from looking again.
	timed(t, "recorded while another fails", func(t *testing.T) {
		b := late(t, request{})
		rec, _ := b.record(request{})
		b.datapath.fail["Attach"] = errors.New("EPERM")
		b.datapath.during = func(op string) {
			if op == "Attach" && b.datapath.called("Attach") == 1 {
				rec.ContainerID, rec.Pending.CgroupID, rec.Pending.CgroupPath = "c2", 102, "/pod-b"
				if err := b.store().Put(rec); err != nil {
					t.Error(err)
				}
				delete(b.datapath.fail, "Attach")
			}
		}
		probe(t, b)
		b.wantRecord(request{}, attachment.Attached, "")
		b.wantRecord(request{container: "c2"}, attachment.Attached, "")
	})
	timed(t, "lock held for long", func(t *testing.T) {
		b := late(t, request{})
		lock, err := b.store().Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n := b.node()
		n.lockWait = 20 * time.Millisecond
		time.AfterFunc(100*time.Millisecond, func() { lock.Unlock() })
		if _, err := n.Probe(t.Context(), b.config(), true, nil); err != nil {
			t.Fatal(err)
		}
		b.wantRecord(request{}, attachment.Attached, "")
	})
	timed(t, "by a sweep", func(t *testing.T) {
		b := late(t, request{})
		if err := b.node().Sweep(t.Context(), b.config()); err != nil {
			t.Fatal(err)
		}
		b.wantRecord(request{}, attachment.Skipped, "busy: ")
		b.datapath.loaded = true
		if err := b.node().Sweep(t.Context(), b.config()); err != nil {
			t.Fatal(err)
		}
		b.wantRecord(request{}, attachment.Attached, "")
	})
	timed(t, "killed while it loads", func(t *testing.T) {
		b := newBench(t)
		b.budget = 200 * time.Millisecond
		b.verdicts.cached, b.verdicts.probed = nil, safe()
		stuck := make(chan struct{})
		b.datapath.block["Load"] = stuck
		b.mustAdd(request{})
		b.wantRecord(request{}, attachment.Skipped, "busy: the datapath is being loaded")
		wantStarted(t, b)
		close(stuck)
	})
	// The run directory outlives a reboot here, and the runtime has not sent DELs.
	timed(t, "killed while it loads after a reboot", func(t *testing.T) {
		for _, id := range []uint64{101, 104} { // cgroups are numbered anew
			b := newBench(t)
			b.mustAdd(request{})
			b.wantRecord(request{}, attachment.Attached, "")
			stuck := make(chan struct{})
			b.datapath.reboot()
			b.cgroups.ids["pod-a"] = id
			b.verdicts.cached, b.verdicts.probed = nil, safe()
			b.budget = 200 * time.Millisecond
			b.datapath.block["Load"] = stuck
			b.mustAdd(request{})
			b.wantRecord(request{}, attachment.Skipped, "busy: the datapath is being loaded")
			wantStarted(t, b)
			b.datapath.mu.Lock()
			delete(b.datapath.block, "Load")
			b.datapath.mu.Unlock()
			probe(t, b)
			b.wantRecord(request{}, attachment.Attached, "")
			b.wantLinks(id)
			close(stuck)
		}
	})
	timed(t, "earlier attachment that cannot be undone", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{})
		b.datapath.reboot()
		b.datapath.fail["DropPod"] = errors.New("EIO")
		b.mustAdd(request{})
		b.wantRecord(request{}, attachment.Attached, "")
		b.wantLinks(101)
	})
	timed(t, "deleted", func(t *testing.T) {
		b := late(t, request{})
		b.mustDel(request{})
		probe(t, b)
		b.wantNothing()
	})
	timed(t, "deleted without the lock", func(t *testing.T) {
		for _, at := range []string{"BPFFSIdentity", "Attach", "SetPod"} {
			b := late(t, request{})
			b.datapath.during = func(op string) {
				if op == at {
					rec, _ := b.record(request{})
					if err := b.store().Delete(rec.Key); err != nil {
						t.Error(err)
					}
				}
			}
			probe(t, b)
			b.wantNothing()
		}
	})
	timed(t, "left half attached", func(t *testing.T) {
		b := late(t, request{})
		rec, _ := b.record(request{})
		rec.Status, rec.CgroupID, rec.CgroupPath, rec.Settings = attachment.Attaching, 101, "/pod-a", rec.Pending.Settings
		rec.Reason, rec.Pending = "", nil
		if err := b.store().Put(rec); err != nil {
			t.Fatal(err)
		}
		probe(t, b)
		b.wantRecord(request{}, attachment.Attached, "")
		b.wantLinks(101)
	})
	timed(t, "cgroup of another pod", func(t *testing.T) {
		b := late(t, request{})
		b.cgroups.ids["pod-a"] = 103
		probe(t, b)
		b.wantRecord(request{}, attachment.Skipped, "busy: ")
		b.wantLinks()
	})
	timed(t, "one cannot be attached", func(t *testing.T) {
		b := late(t, request{})
		b.datapath.fail["Load"] = datapath.ErrBusy
		b.mustAdd(request{container: "c2", cgroup: "pod-b"})
		delete(b.datapath.fail, "Load")
		delete(b.cgroups.ids, "pod-a")
		if _, err := b.node().Probe(t.Context(), b.config(), true, nil); err == nil {
			t.Error("no error")
		}
		b.wantRecord(request{}, attachment.Skipped, "busy: ")
		b.wantRecord(request{container: "c2"}, attachment.Attached, "")
		b.wantLinks(102)
	})
	timed(t, "attaching fails", func(t *testing.T) {
		b := late(t, request{})
		b.datapath.fail["Attach"] = errors.New("EPERM")
		if _, err := b.node().Probe(t.Context(), b.config(), true, nil); err == nil {
			t.Error("no error")
		}
		b.wantRecord(request{}, attachment.Skipped, "busy: ")
		delete(b.datapath.fail, "Attach")
		probe(t, b)
		b.wantRecord(request{}, attachment.Attached, "")
	})
	timed(t, "not supported", func(t *testing.T) {
		b := late(t, request{})
		b.verdicts.probed = &Verdict{Summary: "unsupported: order"}
		probe(t, b)
		b.wantRecord(request{}, attachment.Skipped, "kernel: ")
		if rec, _ := b.record(request{}); rec.Pending != nil {
			t.Errorf("record %+v", rec)
		}
	})
	timed(t, "pods that fail are made anew", func(t *testing.T) {
		b := newBench(t)
		b.datapath.fail["Load"] = datapath.ErrBusy
		if _, err := b.add(request{conf: `"onError":"fail"`}); err == nil {
			t.Fatal("ADD succeeds")
		}
		if rec, ok := b.record(request{}); ok && rec.Pending != nil {
			t.Errorf("record %+v", rec)
		}
	})
	timed(t, "mode off", func(t *testing.T) {
		b := newBench(t)
		b.datapath.fail["Load"] = datapath.ErrBusy
		b.mustAdd(request{conf: `"mode":"off"`})
		delete(b.datapath.fail, "Load")
		probe(t, b)
		b.wantRecord(request{conf: `"mode":"off"`}, attachment.Skipped, "mode off")
		b.wantLinks()
	})
}
