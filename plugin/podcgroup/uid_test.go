package podcgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFindByUID(t *testing.T) {
	scope := "/cri-containerd-" + ctrID + ".scope"
	run(t, "podUID", []row{
		{name: "cgroupfs, guaranteed", cgroups: []string{"/kubepods/pod" + uid}, req: Request{PodUID: uid}, want: "/kubepods/pod" + uid},
		{name: "cgroupfs, burstable", cgroups: []string{cgroupfsPod + "/" + ctrID}, req: Request{PodUID: uid}, want: cgroupfsPod},
		{name: "cgroupfs, best effort", cgroups: []string{"/kubepods/besteffort/pod" + uid}, req: Request{PodUID: uid}, want: "/kubepods/besteffort/pod" + uid},
		{name: "cgroupfs, underscores", cgroups: []string{"/kubepods/pod" + uidSlice}, req: Request{PodUID: uid}, want: "/kubepods/pod" + uidSlice},
		{name: "systemd, guaranteed", cgroups: []string{systemdGuar + scope}, req: Request{PodUID: uid}, want: systemdGuar},
		{name: "systemd, burstable", cgroups: []string{systemdPod + scope}, req: Request{PodUID: uid}, want: systemdPod},
		{name: "systemd, dashes", cgroups: []string{"/kubepods.slice/kubepods-pod" + uid + ".slice"}, req: Request{PodUID: uid}, want: "/kubepods.slice/kubepods-pod" + uid + ".slice"},
		{name: "static pod, cgroupfs", cgroups: []string{"/kubepods/burstable/pod" + staticUID}, req: Request{PodUID: staticUID}, want: "/kubepods/burstable/pod" + staticUID},
		{name: "static pod, systemd", cgroups: []string{"/kubepods.slice/kubepods-pod" + staticUID + ".slice"}, req: Request{PodUID: staticUID}, want: "/kubepods.slice/kubepods-pod" + staticUID + ".slice"},
		{name: "kind, systemd", cgroups: []string{kindPod + scope}, req: Request{PodUID: uid}, want: kindPod},
		{name: "kind, systemd, guaranteed", cgroups: []string{"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + uidSlice + ".slice"}, req: Request{PodUID: uid},
			want: "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + uidSlice + ".slice"},
		{name: "kind, cgroupfs", cgroups: []string{kindfsPod}, req: Request{PodUID: uid}, want: kindfsPod},
		{name: "cgroupfs below a slice", cgroups: []string{"/kubelet.slice/kubepods/pod" + uid}, req: Request{PodUID: uid}, want: "/kubelet.slice/kubepods/pod" + uid},
		{name: "root nested three levels", cgroups: []string{"/a/b/c/kubepods/pod" + uid}, req: Request{PodUID: uid}, want: "/a/b/c/kubepods/pod" + uid},
		{name: "other pods and kubelets beside", cgroups: []string{cgroupfsPod, "/kubepods/pod" + otherUID, "/kubelet/kubepods/pod" + otherUID}, req: Request{PodUID: uid}, want: cgroupfsPod},
		{name: "node in a container that sees the host's hierarchy",
			cgroups: []string{"/docker/" + ctrID + kindPod, "/docker/" + ctrID2 + kindPod, "/docker/" + ctrID + "/system.slice/containerd.service"}, req: Request{PodUID: uid},
			prepare: func(n *node, _ *Request) {
				n.process("self", "host", "0::/docker/"+ctrID+"/system.slice/containerd.service")
			},
			want: "/docker/" + ctrID + kindPod},
		{name: "node in a scope that sees the host's hierarchy",
			cgroups: []string{"/system.slice/docker-" + ctrID + ".scope/init.scope", "/system.slice/docker-" + ctrID + ".scope" + systemdPod}, req: Request{PodUID: uid},
			prepare: func(n *node, _ *Request) {
				n.process("self", "host", "0::/system.slice/docker-"+ctrID+".scope/init.scope")
			},
			want: "/system.slice/docker-" + ctrID + ".scope" + systemdPod},
		{name: "node deep in the host's hierarchy",
			cgroups: []string{"/a.slice/a-b.slice/docker-" + ctrID + ".scope/rt", "/a.slice/a-b.slice/docker-" + ctrID + ".scope" + kindPod}, req: Request{PodUID: uid},
			prepare: func(n *node, _ *Request) {
				n.process("self", "host", "0::/a.slice/a-b.slice/docker-"+ctrID+".scope/rt")
			},
			want: "/a.slice/a-b.slice/docker-" + ctrID + ".scope" + kindPod},
	})
	run(t, "", []row{
		{name: "none", cgroups: []string{"/kubepods/pod" + otherUID, "/kubelet.slice/kubelet-kubepods.slice"}, req: Request{PodUID: uid}, wantErr: ErrNotFound,
			words: []string{uid, "/kubepods", "/kubelet.slice/kubelet-kubepods.slice", "ROOT", "capabilities"}},
		{name: "no kubelet", cgroups: []string{"/system.slice"}, req: Request{PodUID: uid}, wantErr: ErrNotFound, words: []string{"any kubepods cgroup below ROOT"}},
		{name: "two kubelets", cgroups: []string{cgroupfsPod, kindPod}, req: Request{PodUID: uid}, wantErr: ErrAmbiguous, words: []string{uid, cgroupfsPod, kindPod, "remove"}},
		{name: "two QoS classes", cgroups: []string{cgroupfsPod, "/kubepods/pod" + uid}, req: Request{PodUID: uid}, wantErr: ErrAmbiguous},
		{name: "two spellings", cgroups: []string{"/kubepods/pod" + uid, "/kubepods/pod" + uidSlice}, req: Request{PodUID: uid}, wantErr: ErrAmbiguous},
		{name: "root nested too deep", cgroups: []string{"/a/b/c/d/kubepods/pod" + uid}, req: Request{PodUID: uid}, wantErr: ErrNotFound},
		{name: "prefix of another UID", cgroups: []string{cgroupfsPod + "0"}, req: Request{PodUID: uid}, wantErr: ErrNotFound},
		{name: "dashed UID is not a static pod's", cgroups: []string{"/kubepods/pod" + strings.ReplaceAll(uid, "-", "")}, req: Request{PodUID: uid}, wantErr: ErrNotFound},
		{name: "slice of another parent", cgroups: []string{"/kubepods.slice/kubepods-burstable-pod" + uidSlice + ".slice", "/x.slice/y-kubepods.slice/y-kubepods-pod" + uidSlice + ".slice"}, req: Request{PodUID: uid}, wantErr: ErrNotFound},
		{name: "symbolic link", cgroups: []string{"/kubepods/burstable", "/elsewhere"}, req: Request{PodUID: uid}, wantErr: ErrRefused,
			prepare: func(n *node, _ *Request) { n.symlink("../../elsewhere", filepath.Join(n.Root, cgroupfsPod)) }},
		{name: "the runtime's own", cgroups: []string{cgroupfsPod + "/rt"}, req: Request{PodUID: uid}, wantErr: ErrRefused,
			prepare: func(n *node, _ *Request) { n.process("self", "host", "0::"+cgroupfsPod+"/rt") }},
	})
}

// What a tenant makes in a cgroup that was delegated to it must not be taken for
// the pod.
func TestFindByUIDIgnoresPlantedNames(t *testing.T) {
	planted := []string{
		"/kubepods/burstable/pod" + otherUID + "/" + ctrID + "/pod" + uid,
		"/kubepods/burstable/pod" + otherUID + "/" + ctrID + "/kubepods/pod" + uid,
		"/kubepods/burstable/pod" + otherUID + "/kubepods/pod" + uid,
		"/kubepods.slice/kubepods-pod" + otherUID + ".slice/cri-containerd-" + ctrID + ".scope/kubepods/pod" + uid,
		"/kubepods.slice/kubepods-pod" + otherUID + ".slice/kubepods.slice/kubepods-pod" + uidSlice + ".slice",
		"/kubepods/other/pod" + uid,
		"/machine.slice/libpod-" + ctrID + ".scope/container/kubepods/pod" + uid,
		"/machine.slice/machine-libpod_pod_" + ctrID + ".slice/kubepods/pod" + uid,
		"/docker/" + ctrID + "/kubepods/pod" + uid,
		"/default/" + ctrID + "/kubepods/pod" + uid,
		"/libpod_parent/libpod-" + ctrID + "/kubepods/pod" + uid,
		"/system.slice/ssh.service/kubepods/pod" + uid,
		"/user.slice/user-1000.slice/user@1000.service/kubepods/pod" + uid,
		"/user.slice/kubepods/pod" + uid,
	}
	for _, path := range planted {
		n := newNode(t).cgroups(path)
		if got, _, err := n.find(Request{PodUID: uid}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: got %s, %v, want %v", path, got, err, ErrNotFound)
		}
	}
	n := newNode(t).cgroups(planted...).cgroups(systemdPod)
	if path, _, err := n.find(Request{PodUID: uid}); err != nil || path != systemdPod {
		t.Errorf("all of them beside the pod: got %s, %v, want %s", path, err, systemdPod)
	}
}

func TestFindByUIDIgnoresForeignOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: chown")
	}
	n := newNode(t).cgroups("/lxc.payload.guest/kubepods/pod" + uid)
	if err := os.Chown(filepath.Join(n.Root, "lxc.payload.guest"), 100000, 100000); err != nil {
		t.Fatal(err)
	}
	if path, _, err := n.find(Request{PodUID: uid}); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %s, %v, want %v", path, err, ErrNotFound)
	}
}

func TestFindByUIDRefusesMalformed(t *testing.T) {
	n := newNode(t).cgroups(cgroupfsPod, "/kubepods/pod")
	for _, bad := range []string{"..", "../pod" + uid, "/" + uid, "a/b", "*", "a b", "a\x00", "a\n", ".slice", strings.Repeat("a", 129), uid + "/" + ctrID} {
		if path, _, err := n.find(Request{PodUID: bad}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "K8S_POD_UID") {
			t.Errorf("%q: got %s, %v, want %v", bad, path, err, ErrRefused)
		}
	}
}

// The search costs the same with 250 pods as with one, and is bounded.
func TestFindByUIDCost(t *testing.T) {
	visited := func(n *node) (int, error) {
		tr, err := n.open()
		if err != nil {
			t.Fatal(err)
		}
		defer tr.close()
		pod, err := tr.byUID(context.Background(), Request{PodUID: uid})
		n.check(pod, err)
		return tr.visited, err
	}
	n := newNode(t).cgroups(systemdPod, "/system.slice/containerd.service", "/system.slice/system-getty.slice/getty@tty1.service", "/init.scope")
	few, err := visited(n)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 250 {
		n.cgroups(fmt.Sprintf("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod%032x.slice/cri-containerd-%064x.scope/nested", i, i),
			fmt.Sprintf("/system.slice/some%d.service/sub", i))
	}
	many, err := visited(n)
	if err != nil {
		t.Fatal(err)
	}
	if many != few || many > 5 {
		t.Errorf("%d directories read with 1 pod, %d with 251, want the same few", few, many)
	}
	for i := range maxDirs + 1 {
		n.cgroups(fmt.Sprintf("/many%d", i))
	}
	total, err := visited(n)
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "gave up") || total > maxDirs+1 {
		t.Errorf("read %d directories, then %v; want to give up after %d", total, err, maxDirs)
	}
}

func BenchmarkFindByUID250Pods(b *testing.B) {
	n := newNode(b).cgroups(systemdPod)
	for i := range 250 {
		n.cgroups(fmt.Sprintf("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod%032x.slice/cri-containerd-%064x.scope", i, i))
	}
	for i := range 100 {
		n.cgroups(fmt.Sprintf("/system.slice/some%d.service", i))
	}
	for b.Loop() {
		pod, err := n.Find(context.Background(), Request{PodUID: uid})
		if err != nil {
			b.Fatal(err)
		}
		pod.Dir.Close()
	}
}
