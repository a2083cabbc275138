package cni_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// accepted is v.accelerates for pods of networks that have [accepting].
func accepted(t *testing.T) bool {
	return theVerdict(t).accelerates("splice", "fionread", "epoll", "uncharged")
}

// linkPin is where a pod's link is pinned.
func (s *site) linkPin(cgroupID uint64) string {
	return filepath.Join(s.BPFFS, "skipstack/v2/links", strconv.FormatUint(cgroupID, 10))
}

func TestRepeatedDel(t *testing.T) {
	s := newSite(t, options{})
	p := s.light()
	s.wantLines(0, "", s.want(0, s.run(p.call().del()))) // before ADD
	if _, err := os.Stat(filepath.Join(s.RunDir, "attachments")); err == nil {
		t.Error("DEL before ADD made something")
	}
	s.want(0, s.run(p.call().add()))
	s.wantRecord(p.id, "attached", "")
	s.wantLinks(p.cgroupID)
	for range 3 {
		s.wantLines(0, "", s.want(0, s.run(p.call().del())))
		s.wantNothing()
	}
	s.want(0, s.run(p.call().add()))
	s.wantLinks(p.cgroupID)
	for range 2 { // as a runtime that was restarted in between
		s.want(0, s.run(p.call().add()))
	}
	s.wantLinks(p.cgroupID)
	c := p.call().del()
	c.prev, c.cgroup, c.args, c.netns = "-", "-", "-", "-"
	s.want(0, s.run(c))
	s.wantNothing()
}

// The kubelet restarts a pod's sandbox: its cgroup stays, the old sandbox's DEL
// comes when it likes.
func TestLateDel(t *testing.T) {
	s := newSite(t, options{})
	list := s.network(node.Network{})
	const uid = "11111111-2222-4333-8444-555555555555"
	old := must.Get(s.NewPod("server", node.PodOptions{UID: uid}))(t)
	s.attach(old, list, node.IfName)
	successor := s.pod("server", list, node.PodOptions{UID: uid})
	if old.Cgroup != successor.Cgroup {
		t.Fatal("two cgroups")
	}
	client := s.pod("client", list, node.PodOptions{})
	for range 2 {
		s.detach(old, list, node.IfName)
		s.wantLinks(successor.cgroupID(t), client.cgroupID(t))
		s.wantRecord(successor.ID, "attached", "")
		must.Do(t, successor.Check(t.Context(), list, node.IfName))
		s.wantAcceleratedIf(accepted(t), "the new sandbox", direct(client, successor))
	}
	s.detach(successor.Pod, list, node.IfName)
	s.wantLinks(client.cgroupID(t))
}

// A DEL whose cgroup the kubelet has removed before, and one that never comes.
func TestCgroupGone(t *testing.T) {
	s := newSite(t, options{})
	early, never, next := s.light(), s.light(), s.light()
	s.want(0, s.run(early.call().add()))
	s.want(0, s.run(never.call().add()))
	early.remove(t)
	s.wantLines(0, "", s.want(0, s.run(early.call().del())))
	s.wantLinks(never.cgroupID)
	never.remove(t)
	wait(t, "the kernel has released the cgroup", func() (string, bool) {
		return "", !must.Get(datapath.HasLink(s.BPFFS, never.cgroupID))(t)
	})
	// The next ADD sweeps the dead link; GC removes the record.
	s.want(0, s.run(next.call().add()))
	s.wantLinks(next.cgroupID)
	s.want(0, s.run(call{verb: "GC", members: `"cni.dev/valid-attachments":[{"containerID":"` + next.id + `","ifname":"eth0"}]`}))
	s.wantLinks(next.cgroupID)
	if all := s.records(); len(all) != 1 {
		t.Errorf("records %+v", all)
	}
	s.want(0, s.run(next.call().del()))
	s.wantNothing()
}

// reboot takes away what a reboot does: all pins, and what is in /run.
func (s *site) reboot(keepRunDir bool) {
	s.t.Helper()
	s.waitProber() // it might write to what goes
	// Made before the old one goes, it has another device number.
	fresh := must.Get(os.MkdirTemp(s.Dir, "bpf-"))(s.t)
	must.Do(s.t, unix.Mount("bpf", fresh, "bpf", 0, "mode=0700"))
	must.Do(s.t, unix.Unmount(s.BPFFS, unix.MNT_DETACH))
	must.Do(s.t, unix.Mount(fresh, s.BPFFS, "", unix.MS_MOVE, ""))
	if !keepRunDir {
		must.Do(s.t, os.RemoveAll(s.RunDir))
	}
}

// newBoot makes the kernel's boot id another one until the test ends.
func newBoot(t *testing.T) {
	t.Helper()
	const bootID = "/proc/sys/kernel/random/boot_id"
	file := filepath.Join(t.TempDir(), "boot_id")
	must.Do(t, os.WriteFile(file, []byte("99999999-8888-4777-8666-555555555555\n"), 0o644))
	must.Do(t, unix.Mount(file, bootID, "", unix.MS_BIND, ""))
	t.Cleanup(func() { must.Do(t, unix.Unmount(bootID, 0)) })
}

func TestReboot(t *testing.T) {
	for name, keep := range map[string]bool{"run directory gone": false, "run directory kept": true} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, options{})
			s.load()
			v := theVerdict(t)
			pods := s.lightPods(3)
			for _, p := range pods {
				s.want(0, s.run(p.call().add()))
			}
			newBoot(t)
			s.reboot(keep)
			// DEL needs nothing, CHECK does not complain, and a pod that is
			// started afresh is as on the first boot, by the prober where loading
			// the datapath takes longer than an ADD has.
			s.wantLines(0, "", s.want(0, s.run(pods[0].call().del())))
			s.want(0, s.run(pods[1].call().check()))
			s.want(0, s.run(pods[2].call().add()))
			wait(t, "the pod is attached", func() (string, bool) {
				r := s.record(pods[2].id)
				links := s.links()
				return fmt.Sprintf("record %s (%s), links %v", r.Status, r.Reason, links), r.Status == "attached" && slices.Equal(links, []uint64{pods[2].cgroupID})
			})
			s.want(0, s.run(pods[1].call().check())) // its bpffs is gone, not its link
			s.want(0, s.run(pods[2].call().check()))
			// The verdict of the last boot does not count.
			wait(t, "the kernel is probed again", func() (string, bool) {
				files := must.Get(filepath.Glob(filepath.Join(s.RunDir, "verdict-99999999-*.json")))(t)
				return "", len(files) == 1
			})
			s.waitProber()
			if _, err := os.Stat(filepath.Join(s.RunDir, v.file)); err == nil {
				t.Error("the last boot's verdict is kept")
			}
			for _, p := range pods {
				s.want(0, s.run(p.call().del()))
			}
			s.wantNothing()
		})
	}
}

func TestCheck(t *testing.T) {
	s := newSite(t, options{})
	p, q, off := s.light(), s.light(), s.light()
	strict := `"onError":"fail"`
	for _, light := range []light{p, q} {
		s.want(0, s.run(light.call().add()))
		s.wantLines(0, "", s.want(0, s.run(light.call().check())))
		s.wantLines(0, "", s.want(0, s.run(light.call(strict).check())))
	}
	s.want(0, s.run(off.call(`"mode":"off"`).add()))
	s.want(0, s.run(off.call(`"mode":"off"`, strict).check()))

	// The link removed by hand is what CHECK is for; the other pod's is there.
	must.Do(t, os.Remove(s.linkPin(p.cgroupID)))
	got := s.want(11, s.run(p.call().check()))
	if !strings.Contains(got.stdout, strconv.FormatUint(p.cgroupID, 10)) || !strings.Contains(got.stdout, "restart the pod") {
		t.Errorf("the error does not help: %s", got.stdout)
	}
	s.want(0, s.run(q.call().check()))
	s.want(0, s.run(p.call().add())) // repairs it
	s.want(0, s.run(p.call().check()))

	// A pod that nobody knows, and a node that is not loaded, pass unless asked
	// to fail: a runtime would kill the pod.
	unknown := s.light()
	s.want(0, s.run(unknown.call().check()))
	s.want(11, s.run(unknown.call(strict).check()))
	s.reboot(true)
	s.want(0, s.run(p.call().check()))
	s.want(11, s.run(p.call(strict).check()))
	s.want(0, s.run(p.call().check().with(`"mod":"auto"`)))
	s.want(7, s.run(p.call().check().with(`"mod":"auto",`+strict)))
	for _, light := range []light{p, q, off} {
		s.want(0, s.run(light.call().del()))
	}
}

func TestGC(t *testing.T) {
	s := newSite(t, options{})
	pods := s.lightPods(4)
	gc := func(members string) outcome { return s.run(call{verb: "GC", members: members}) }
	fill := func() {
		for _, p := range pods[:3] {
			s.want(0, s.run(p.call().add()))
		}
		other := pods[3].call().add()
		other.network = "other"
		s.want(0, s.run(other))
	}
	all := func() []uint64 {
		return []uint64{pods[0].cgroupID, pods[1].cgroupID, pods[2].cgroupID, pods[3].cgroupID}
	}
	fill()
	// Without a list, or with one that cannot be read, nothing is removed.
	s.want(7, gc(""))
	for _, list := range []string{`{}`, `"x"`, `[null]`, `[{"containerID":"a"}]`, `[{"containerID":1,"ifname":"eth0"}]`} {
		s.want(7, gc(`"cni.dev/valid-attachments":`+list))
	}
	s.wantLinks(all()...)
	// A list keeps what is in it, by container and interface.
	s.want(0, gc(`"cni.dev/valid-attachments":[{"containerID":"`+pods[0].id+`","ifname":"eth0"},{"containerID":"`+pods[1].id+`","ifname":"eth1"}]`))
	s.wantLinks(pods[0].cgroupID, pods[3].cgroupID)
	// null and [] mean this network's attachments, all of them, and no other's.
	for _, list := range []string{`null`, `[]`} {
		fill()
		s.wantLinks(all()...)
		s.want(0, gc(`"cni.dev/valid-attachments":`+list))
		s.wantLinks(pods[3].cgroupID)
		s.wantRecord(pods[3].id, "attached", "")
	}
	// Own keys that are broken do not matter.
	s.want(0, s.run(call{verb: "GC", network: "other", members: `"mod":1,"onError":"fail","cni.dev/valid-attachments":[]`}))
	s.wantNothing()
}

func TestStatusAndVersion(t *testing.T) {
	s := newSite(t, options{})
	status := func(members string) outcome { return s.run(call{verb: "STATUS", members: members}) }
	strict := `"onError":"fail"`
	s.want(0, status(""))
	s.want(0, status(strict))
	s.want(0, status(`"mod":1`))
	s.want(50, status(`"mod":1,`+strict))
	s.want(0, s.run(call{verb: "STATUS", cgroupRoot: s.Dir}))
	s.want(50, s.run(call{verb: "STATUS", cgroupRoot: s.Dir, members: strict}))
	if _, err := os.Stat(filepath.Join(s.BPFFS, "skipstack")); err == nil {
		t.Error("STATUS has loaded the datapath")
	}

	const versions = `{"cniVersion":"1.1.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}` + "\n"
	if got := s.run(call{verb: "VERSION", stdin: `{"cniVersion":"0.4.0"}`}); got.code != 0 || got.stdout != versions || got.stderr != "" {
		t.Errorf("VERSION: %+v", got)
	}
}

// Each verb in each version: served from the one that introduced it on.
func TestVerbsOfEveryVersion(t *testing.T) {
	s := newSite(t, options{})
	p := s.light()
	versions := []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
	for i, v := range versions {
		prev := `{"cniVersion":"` + v + `","ips":[{"address":"10.88.0.5/16"}],"dns":{} , "x":1}`
		if i < 3 {
			prev = `{"cniVersion":"` + v + `","ips":[{"version":"4","address":"10.88.0.5/16"}],"dns":{} , "x":1}`
		}
		do := func(verb, members string) outcome {
			return s.run(call{verb: verb, version: v, pod: p, prev: prev, members: members})
		}
		since := func(first string) uint {
			if i < slices.Index(versions, first) {
				return 1 // incompatible version
			}
			return 0
		}
		s.want(0, do("ADD", ""))
		s.wantRecord(p.id, "attached", "")
		s.want(since("0.4.0"), do("CHECK", ""))
		s.want(since("1.1.0"), do("STATUS", ""))
		s.want(since("1.1.0"), do("GC", `"cni.dev/valid-attachments":[{"containerID":"`+p.id+`","ifname":"eth0"}]`))
		s.wantLinks(p.cgroupID)
		s.want(0, do("DEL", ""))
		s.wantNothing()
	}
	for _, v := range []string{"0.1.0", "0.2.0", "2.0.0"} {
		s.want(1, s.run(call{verb: "ADD", version: v, pod: p}))
	}
	s.wantNothing()
}

// Multus: a second network for the same pod, which is told neither cgroupPath nor
// annotations. The two share a link, and the stricter setting holds.
func TestTwoNetworks(t *testing.T) {
	s := newSite(t, options{})
	first := s.network(node.Network{Skipstack: withAccepting("excludePorts", []int{7001})})
	second := must.Get(s.Conflist([]byte(`{"cniVersion":"1.0.0","name":"second","plugins":[
		{"type":"ptp","ipam":{"type":"host-local","ranges":[[{"subnet":"10.99.0.0/16"}]]}},
		{"type":"skipstack","excludePorts":[7002],"unreadLimit":65536,
			"acceptRisks":["splice","fionread","epoll","uncharged","blocking"]}]}`)))(t)
	client, server := s.twoPods(first, node.PodOptions{})
	for _, p := range []*pod{client, server} {
		s.attach(p.Pod, second, "net1")
	}
	if n := len(s.records()); n != 4 {
		t.Errorf("%d records, want 4", n)
	}
	both := []uint64{client.cgroupID(t), server.cgroupID(t)}
	s.wantLinks(both...)
	for _, port := range []uint16{7001, 7002} {
		s.wantPlain("a port that one network excludes", direct(client, server).port(port))
	}
	s.wantPlain("blocking, which one network does not accept", direct(client, server).blocking())
	s.wantAcceleratedIf(accepted(t), "another port", direct(client, server).port(7003))

	// One attachment less: the link stays, and the other's settings hold alone.
	for _, p := range []*pod{client, server} {
		s.detach(p.Pod, second, "net1")
		must.Do(t, p.Check(t.Context(), first, node.IfName))
	}
	s.wantLinks(both...)
	s.wantPlain("the port that is still excluded", direct(client, server).port(7001))
	s.wantAcceleratedIf(accepted(t), "the port that is not excluded any more", direct(client, server).port(7002))

	// A network that is off keeps the whole pod plain, while it is attached.
	off := must.Get(s.Conflist([]byte(`{"cniVersion":"1.0.0","name":"third","plugins":[
		{"type":"ptp","ipam":{"type":"host-local","ranges":[[{"subnet":"10.98.0.0/16"}]]}},{"type":"skipstack","mode":"off"}]}`)))(t)
	s.attach(server.Pod, off, "net2")
	s.wantPlain("a pod on a network with mode off", direct(client, server))
	s.wantLinks(both...)
	s.detach(server.Pod, off, "net2")
	s.wantAcceleratedIf(accepted(t), "after that network's DEL", direct(client, server))
}

func withAccepting(key string, value any) map[string]any {
	conf := map[string]any{key: value}
	for k, v := range accepting {
		conf[k] = v
	}
	return conf
}

// CRI-O with the systemd cgroup driver: it passes the last component of the
// cgroup's path, runs CHECK after every ADD, and DEL with the configuration that
// it cached at ADD.
func TestCRIO(t *testing.T) {
	s := newSite(t, options{})
	s.load()
	list := s.network(node.Network{})
	slice := func(uid string) node.PodOptions {
		name := "kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
		return node.PodOptions{UID: uid, Cgroup: "kubepods.slice/kubepods-burstable.slice/" + name, CgroupPath: name}
	}
	client := s.pod("client", list, slice("11111111-2222-4333-8444-555555555555"))
	server := s.pod("server", list, slice("11111111-2222-4333-8444-666666666666"))
	for _, p := range []*pod{client, server} {
		must.Do(t, p.Check(t.Context(), list, node.IfName))
		if r := s.record(p.ID); r.CgroupPath != strings.TrimPrefix(p.Cgroup, s.CgroupRoot) || r.CgroupID != p.cgroupID(t) {
			t.Errorf("cgroup %s (%d), want %s", r.CgroupPath, r.CgroupID, p.Cgroup)
		}
	}
	s.wantAcceleratedIf(accepted(t), "CRI-O's pods", direct(client, server))

	cni := s.CNI()
	raw, _, err := cni.GetNetworkListCachedConfig(list, server.RuntimeConf(node.IfName))
	must.Do(t, err)
	cached := must.Get(libcni.ConfListFromBytes(raw))(t)
	s.detach(server.Pod, cached, node.IfName)
	s.wantLinks(client.cgroupID(t))
	// A configuration that was broken since does not keep DEL from its work.
	broken := s.network(node.Network{Skipstack: map[string]any{"mode": 7, "onError": "fail", "nonsense": true}})
	s.onTime(client.ID, func() error { return client.Del(t.Context(), broken, node.IfName) }, func() { s.attach(client.Pod, list, node.IfName) })
	s.wantNothing()
}

// containerd 1.6 passes no cgroupPath, but the pod's UID; kind's cgroups are
// nested.
func TestPodUID(t *testing.T) {
	s := newSite(t, options{})
	s.load()
	list := s.network(node.Network{})
	const a, b = "21111111-2222-4333-8444-555555555555", "21111111-2222-4333-8444-666666666666"
	client := s.pod("client", list, node.PodOptions{UID: a, NoCgroupPath: true, Cgroup: "kubepods/besteffort/pod" + a})
	nested := "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + strings.ReplaceAll(b, "-", "_") + ".slice"
	server := s.pod("server", list, node.PodOptions{UID: b, NoCgroupPath: true, Cgroup: nested})
	s.wantLinks(client.cgroupID(t), server.cgroupID(t))
	s.wantAcceleratedIf(accepted(t), "pods found by UID", direct(client, server))
}

// nerdctl and podman know no pods: they run DEL before ADD, and pass the netns
// of the container's first process, which is in its cgroup by then.
func TestWithoutKubernetes(t *testing.T) {
	s := newSite(t, options{})
	list := s.network(node.Network{})
	start := func(name string) *pod {
		p := must.Get(s.NewPod(name, node.PodOptions{}))(t)
		// The engine's cgroup of the container; the pod-level one is not used.
		dir := must.Get(s.Cgroup("system.slice/nerdctl-" + p.ID + ".scope"))(t)
		first := exec.Command("/bin/sleep", "1000")
		proc := must.Get(p.Start(first, node.StartOptions{Cgroup: dir}))(t)
		t.Cleanup(func() { _ = proc.Kill() })
		rt := p.RuntimeConf(node.IfName)
		rt.Args, rt.CapabilityArgs = nil, nil
		rt.NetNS = "/proc/" + strconv.Itoa(proc.Pid()) + "/ns/net"
		cni := s.CNI()
		del := func() { must.Do(t, cni.DelNetworkList(t.Context(), list, rt)) }
		del()
		s.onTime(p.ID, func() error {
			_, err := cni.AddNetworkList(t.Context(), list, rt)
			return err
		}, del)
		t.Cleanup(func() {
			// Once more when the process is gone, and its pid with it.
			must.Do(t, cni.DelNetworkList(context.Background(), list, rt))
			_ = proc.Kill()
			must.Do(t, cni.DelNetworkList(context.Background(), list, rt))
		})
		s.wantRecord(p.ID, "attached", "")
		if r := s.record(p.ID); r.CgroupID != inode(t, dir) {
			t.Errorf("cgroup %s, want %s", r.CgroupPath, dir)
		}
		return s.peopledIn(p, dir)
	}
	client, server := start("client"), start("server")
	r := route{client: client.host, server: server.host, listen: s.addrOf(server)}
	s.wantAcceleratedIf(accepted(t), "containers", r)
}

// DEL while a connection lives, as when a runtime does not wait for a container's
// end: no byte is lost, and the link goes when the last socket has.
func TestDelUnderTraffic(t *testing.T) {
	s := newSite(t, options{})
	list := s.network(node.Network{})
	client, server := s.twoPods(list, node.PodOptions{})
	a, b := s.connect(direct(client, server))
	s.wantRedirected(a, b)
	own := func(verb string, p *pod) outcome {
		return s.run(call{verb: verb, network: list.Name, pod: light{id: p.ID, uid: p.UID, dir: p.Cgroup}})
	}
	s.want(0, own("DEL", server))
	s.wantSwitchedOff(a, b)
	s.wantSwitchedOff(b, a)
	s.wantPlain("after DEL", direct(client, server))
	s.wantLinks(client.cgroupID(t), server.cgroupID(t)) // one of them parked
	if _, err := os.Stat(s.linkPin(server.cgroupID(t))); err == nil {
		t.Error("the link of the pod that is gone is not parked")
	}
	// The pod comes back, with the connection that it has.
	s.want(0, own("ADD", server))
	s.wantRedirected(a, b)
	s.wantRedirected(b, a)
	s.want(0, own("DEL", server))
	s.say(a, b)
	must.Do(t, a.Close())
	must.Do(t, b.Close())
	wait(t, "the parked link is swept", func() (string, bool) {
		s.want(0, own("ADD", client)) // any ADD does it
		links := s.links()
		return fmt.Sprint(links), len(links) == 1
	})
	s.wantLinks(client.cgroupID(t))
}

// The unread limit of the configuration is the one that holds.
func TestUnreadLimit(t *testing.T) {
	s := newSite(t, options{})
	for _, tc := range []struct {
		limit int
		full  bool
	}{{4096, true}, {16 << 20, false}} {
		list := s.network(node.Network{Skipstack: withAccepting("unreadLimit", tc.limit)})
		client, server := s.twoPods(list, node.PodOptions{})
		a, b := s.connect(direct(client, server))
		s.wantRedirected(a, b)
		before := s.counters()
		for range 64 {
			must.Get(a.Write(make([]byte, 1024)))(t)
		}
		if full := s.counters().Since(before).Messages["receiver_full"].Messages > 0; full != tc.full {
			t.Errorf("limit %d, 64 KiB unread: receiver full %v", tc.limit, full)
		}
		must.Get(io.ReadFull(b, make([]byte, 64<<10)))(t)
	}
}
