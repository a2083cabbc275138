package podcgroup

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// inPod makes a process in namespace "pod" and passes it as CNI_NETNS in the
// form of its path in /proc.
func inPod(cgroup string) func(*node, *Request) {
	return func(n *node, r *Request) { r.NetNS = n.process("77", "pod", "0::"+cgroup) }
}

func TestFindByNetNS(t *testing.T) {
	podman := "/machine.slice/libpod-" + ctrID + ".scope"
	podmanPod := "/machine.slice/machine-libpod_pod_" + ctrID2 + ".slice"
	rootless := "/user.slice/user-1000.slice/user@1000.service/user.slice"
	for _, c := range []struct{ name, cgroup, want string }{
		{"nerdctl, systemd", "/system.slice/nerdctl-" + ctrID + ".scope", "/system.slice/nerdctl-" + ctrID + ".scope"},
		{"nerdctl, cgroupfs", "/default/" + ctrID, "/default/" + ctrID},
		{"docker, cgroupfs", "/docker/" + ctrID, "/docker/" + ctrID},
		{"podman", podman, podman},
		{"podman, crun", podman + "/container", podman},
		{"podman, crun with a subgroup of another name", podman + "/web", podman},
		{"podman, systemd inside", podman + "/init.scope", podman},
		{"podman, service of a systemd inside", podman + "/container/system.slice/nginx.service", podman},
		{"podman, split cgroups", "/system.slice/web.service/libpod-payload-" + ctrID, "/system.slice/web.service/libpod-payload-" + ctrID},
		{"podman, cgroupfs", "/libpod_parent/libpod-" + ctrID, "/libpod_parent/libpod-" + ctrID},
		{"podman, rootless", rootless + "/libpod-" + ctrID + ".scope/container", rootless + "/libpod-" + ctrID + ".scope"},
		{"podman pod", podmanPod + "/libpod-" + ctrID + ".scope/container", podmanPod},
		{"podman pod, cgroupfs", "/libpod_parent/" + ctrID2 + "/libpod-" + ctrID, "/libpod_parent/" + ctrID2},
		{"systemd-nspawn", "/machine.slice/machine-web.scope/payload/init.scope", "/machine.slice/machine-web.scope"},
		{"crun alone", "/system.slice/crun-web.scope/container", "/system.slice/crun-web.scope"},
		{"systemd in a cgroup without a telling name", "/lxc.payload.web/init.scope", "/lxc.payload.web"},
		{"container in a cgroup without a telling name", "/demo/web/container", "/demo/web"},
		{"a tool's own", "/demo/pod1", "/demo/pod1"},
		{"name with a colon", "/demo/a:b", "/demo/a:b"},
		{"kubelet, cgroupfs", cgroupfsPod + "/" + ctrID, cgroupfsPod},
		{"kubelet, cgroupfs, guaranteed", "/kubepods/pod" + uid + "/" + ctrID + "/sub/sub", "/kubepods/pod" + uid},
		{"kubelet, systemd", systemdPod + "/crio-" + ctrID + ".scope/container", systemdPod},
		{"kubelet, the pod itself", systemdPod, systemdPod},
		{"kind", kindPod + "/cri-containerd-" + ctrID + ".scope", kindPod},
		{"static pod", "/kubepods.slice/kubepods-pod" + staticUID + ".slice/x.scope", "/kubepods.slice/kubepods-pod" + staticUID + ".slice"},
		{"kubepods planted in a container", podman + "/kubepods/pod" + uid, podman},
		{"kubepods planted in a pod", cgroupfsPod + "/" + ctrID + "/kubepods/pod" + otherUID, cgroupfsPod},
		{"container of a node that is a container", "/docker/" + ctrID + kindPod + "/x.scope", "/docker/" + ctrID},
	} {
		run(t, "netns", []row{
			{name: c.name, cgroups: []string{c.cgroup}, prepare: inPod(c.cgroup), want: c.want},
			{name: c.name + ", bind mount", cgroups: []string{c.cgroup}, want: c.want, prepare: func(n *node, r *Request) {
				n.process("77", "pod", "0::"+c.cgroup)
				n.process("78", "elsewhere", "0::/demo")
				n.process("79", "host", "0::"+systemdPod)
				r.NetNS = n.netns("pod")
			}},
		})
	}
	run(t, "netns", []row{
		{name: "this node is that container", cgroups: []string{"/docker/" + ctrID + kindPod + "/x.scope", "/docker/" + ctrID + "/rt"},
			want: "/docker/" + ctrID + kindPod, prepare: func(n *node, r *Request) {
				n.process("self", "host", "0::/docker/"+ctrID+"/rt")
				r.NetNS = n.process("77", "pod", "0::/docker/"+ctrID+kindPod+"/x.scope")
			}},
		{name: "this node is a pod", cgroups: []string{cgroupfsPod + "/" + ctrID + kindfsPod, cgroupfsPod + "/" + ctrID + "/rt"},
			want: cgroupfsPod + "/" + ctrID + kindfsPod, prepare: func(n *node, r *Request) {
				n.process("self", "host", "0::"+cgroupfsPod+"/"+ctrID+"/rt")
				r.NetNS = n.process("77", "pod", "0::"+cgroupfsPod+"/"+ctrID+kindfsPod+"/"+ctrID2)
			}},
		{name: "bind mount of a part of the hierarchy", cgroups: []string{podman}, want: podman, prepare: func(n *node, r *Request) {
			n.mountinfo("/part", n.Root)
			r.NetNS = n.process("77", "pod", "0::/part"+podman)
		}},
		{name: "root below the mount point", cgroups: []string{"/pod1"}, want: "/pod1", prepare: func(n *node, r *Request) {
			n.mountinfo("/", filepath.Dir(n.Root))
			r.NetNS = n.process("77", "pod", "0::/cgroup/pod1")
		}},
		{name: "several containers of one pod", cgroups: []string{cgroupfsPod}, want: cgroupfsPod, prepare: func(n *node, r *Request) {
			n.process("77", "pod", "0::"+cgroupfsPod+"/"+ctrID)
			n.process("78", "pod", "0::"+cgroupfsPod+"/"+ctrID2)
			r.NetNS = n.netns("pod")
		}},
		{name: "agents and the runtime's helpers in the namespace do not count", cgroups: []string{cgroupfsPod}, want: cgroupfsPod, prepare: func(n *node, r *Request) {
			n.process("76", "pod", "0::/system.slice/containerd.service")
			n.process("77", "pod", "0::"+cgroupfsPod+"/"+ctrID)
			n.process("78", "pod", "0::/../../outside")
			n.process("79", "pod", "0::/system.slice/dhcp.service")
			r.NetNS = n.netns("pod")
		}},
		{name: "UID agrees, where the UID search does not look", cgroups: []string{"/a/b/c/d" + systemdPod}, req: Request{PodUID: uid},
			prepare: inPod("/a/b/c/d" + systemdPod + "/x.scope"), want: "/a/b/c/d" + systemdPod},
	})
	run(t, "", []row{
		{name: "process of another pod", cgroups: []string{cgroupfsPod}, req: Request{PodUID: otherUID}, prepare: inPod(cgroupfsPod), wantErr: ErrRefused, words: []string{otherUID, cgroupfsPod}},
		{name: "outside the cgroup namespace", prepare: inPod("/../../kubepods/x"), wantErr: ErrRefused, words: []string{"outside", "namespace", "77"}},
		{name: "parent of the cgroup namespace", prepare: inPod("/.."), wantErr: ErrRefused},
		{name: "dot dot inside", cgroups: []string{"/a"}, prepare: inPod("/a/../b"), wantErr: ErrRefused},
		{name: "root cgroup", prepare: inPod("/"), wantErr: ErrRefused, words: []string{"root"}},
		{name: "relative", cgroups: []string{"/a"}, prepare: inPod("a"), wantErr: ErrRefused},
		{name: "no v2 line", prepare: func(n *node, r *Request) { r.NetNS = n.process("77", "pod", "2:cpu:/a") }, wantErr: ErrRefused, words: []string{"0::"}},
		{name: "the runtime's own", cgroups: []string{"/rt"}, wantErr: ErrRefused, words: []string{"runtime"}, prepare: func(n *node, r *Request) {
			n.process("self", "host", "0::/rt")
			r.NetNS = n.process("77", "pod", "0::/rt")
		}},
		{name: "kubepods without a pod", cgroups: []string{"/kubepods/burstable"}, prepare: inPod("/kubepods/burstable"), wantErr: ErrRefused},
		{name: "below kubepods, not a pod", cgroups: []string{"/kubepods.slice/other.slice"}, prepare: inPod("/kubepods.slice/other.slice"), wantErr: ErrRefused},
		{name: "systemd itself", cgroups: []string{"/init.scope"}, prepare: inPod("/init.scope"), wantErr: ErrRefused},
		{name: "a login session", cgroups: []string{"/user.slice/user-0.slice/session-2.scope"}, prepare: inPod("/user.slice/user-0.slice/session-2.scope"), wantErr: ErrRefused},
		{name: "a user's systemd", cgroups: []string{"/user.slice/user-0.slice/user@0.service/init.scope"}, prepare: inPod("/user.slice/user-0.slice/user@0.service/init.scope"), wantErr: ErrRefused},
		{name: "only an agent is in the namespace", cgroups: []string{"/system.slice/dhcp.service"}, wantErr: ErrRefused, words: []string{"dhcp.service"}, prepare: func(n *node, r *Request) {
			n.process("77", "pod", "0::/system.slice/dhcp.service")
			r.NetNS = n.netns("pod")
		}},
		{name: "cgroup removed", prepare: inPod("/default/" + ctrID + " (deleted)"), wantErr: ErrNotFound},
		{name: "symbolic link", cgroups: []string{"/elsewhere"}, wantErr: ErrRefused, prepare: func(n *node, r *Request) {
			n.symlink("elsewhere", filepath.Join(n.Root, "demo"))
			inPod("/demo")(n, r)
		}},
		{name: "two containers share the namespace", cgroups: []string{"/docker/" + ctrID, "/docker/" + ctrID2}, wantErr: ErrAmbiguous, words: []string{ctrID, ctrID2}, prepare: func(n *node, r *Request) {
			n.process("77", "pod", "0::/docker/"+ctrID)
			n.process("78", "pod", "0::/docker/"+ctrID2)
			r.NetNS = n.netns("pod")
		}},
		{name: "no process", prepare: func(n *node, r *Request) { r.NetNS = n.netns("pod") }, wantErr: ErrNotFound, words: []string{"no process"}},
		{name: "no such namespace", prepare: func(n *node, r *Request) { r.NetNS = filepath.Join(n.ns, "gone") }, wantErr: ErrNotFound, words: []string{"gone", "does not exist"}},
		{name: "process has ended", prepare: func(n *node, r *Request) {
			inPod("/demo")(n, r)
			if err := os.RemoveAll(filepath.Join(n.Proc, "77")); err != nil {
				t.Fatal(err)
			}
		}, wantErr: ErrNotFound},
		{name: "not a namespace", prepare: func(n *node, r *Request) { r.NetNS = "/proc/self/status" }, wantErr: ErrRefused, words: []string{"not a network namespace"}},
		{name: "the host's", prepare: func(n *node, r *Request) { r.NetNS = n.process("77", "host", "0::/docker/"+ctrID) }, wantErr: ErrRefused, words: []string{"host's network namespace"}},
		{name: "process 1's", wantErr: ErrRefused, words: []string{"host's network namespace"}, prepare: func(n *node, r *Request) {
			n.process("1", "init", "0::/init.scope")
			r.NetNS = n.netns("init")
		}},
		{name: "own cgroup unknown", cgroups: []string{"/demo"}, wantErr: ErrRefused, prepare: func(n *node, r *Request) {
			n.process("self", "host", "3:cpu:/")
			inPod("/demo")(n, r)
		}},
		{name: "mount of another cgroup namespace", cgroups: []string{"/demo"}, wantErr: ErrRefused, words: []string{"another cgroup namespace"}, prepare: func(n *node, r *Request) {
			n.mountinfo("/../..", n.Root)
			inPod("/demo")(n, r)
		}},
		{name: "mount not listed", cgroups: []string{"/demo"}, wantErr: ErrRefused, words: []string{"mountinfo"}, prepare: func(n *node, r *Request) {
			n.mountinfo("/", "/elsewhere")
			inPod("/demo")(n, r)
		}},
		{name: "beside the part that is mounted", cgroups: []string{"/demo"}, wantErr: ErrRefused, words: []string{"not below"}, prepare: func(n *node, r *Request) {
			n.mountinfo("/part", n.Root)
			inPod("/demo")(n, r)
		}},
	})
}

func TestNetNSPID(t *testing.T) {
	for path, want := range map[string]string{
		"/proc/77/ns/net":            "77",
		"/hostproc/77/ns/net":        "77",
		"/proc/self/ns/net":          "",
		"/proc/thread-self/ns/net":   "",
		"/proc/77/task/78/ns/net":    "",
		"/proc/0/ns/net":             "",
		"/proc/-1/ns/net":            "",
		"/proc/77/ns/mnt":            "",
		"/proc/77/../78/ns/net":      "",
		"/proc/77x/ns/net":           "",
		"/proc/99999999999/ns/net":   "",
		"/run/netns/proc/77/ns/net":  "",
		"/var/run/netns/cni-0a1b2c3": "",
	} {
		if got := netnsPID(path, "/hostproc/"); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
}

// The process that holds a number when its cgroup is read is the one whose
// namespace was compared.
func TestProcessChecksNamespace(t *testing.T) {
	n := newNode(t).cgroups("/demo")
	n.process("77", "elsewhere", "0::/demo")
	tr, err := n.open()
	if err != nil {
		t.Fatal(err)
	}
	defer tr.close()
	ns, err := statNetNS(-1, n.netns("pod"))
	if err != nil {
		t.Fatal(err)
	}
	if comps, err := tr.process("77", ns); comps != nil || err != nil {
		t.Errorf("got %v, %v for a process of another namespace, want none", comps, err)
	}
}

func TestParseCgroup(t *testing.T) {
	for data, want := range map[string]string{
		"0::/\n":                         "/",
		"0::/a/b\n":                      "/a/b",
		"3:cpu:/x\n0::/a\n1:name=s:/y\n": "/a",
		"0::/a:b::c":                     "/a:b::c",
	} {
		if comps, err := parseCgroup(data); err != nil || slash(comps) != want {
			t.Errorf("%q: got %s, %v, want %s", data, slash(comps), err, want)
		}
	}
	for _, data := range []string{"", "\n", "0:/a", "1:cpu:/a\n", "0::", "0::a", "0::/..", "0::/../a", "0::/a/..", "0::/" + strings.Repeat("a/", 4096)} {
		if comps, err := parseCgroup(data); err == nil {
			t.Errorf("%q: got %s, want an error", data, slash(comps))
		}
	}
	if _, err := readCgroup(-1, "/nonexistent/cgroup"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: got %v", err)
	}
}
