package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
)

// IfName is the name of a pod's interface unless told otherwise.
const IfName = "eth0"

// PodOptions describe a pod; the zero value will do.
type PodOptions struct {
	Namespace   string // default "default"
	UID         string // default random
	Annotations map[string]string
	// Cgroup is the pod's cgroup, relative to the node's root; default
	// kubepods/burstable/pod<UID>.
	Cgroup string
	// CgroupPath is what the runtime says about it (capability cgroupPath);
	// default "/" + Cgroup. NoCgroupPath: it says nothing, as containerd 1.6.
	CgroupPath   string
	NoCgroupPath bool
	Args         [][2]string    // further CNI_ARGS
	Capabilities map[string]any // further capability arguments
}

// A Pod is a network namespace, a cgroup with a cgroup for one container, and what
// CNI has attached. The node's Close closes its pods.
type Pod struct {
	Name, Namespace, UID string
	ID                   string // container id of the sandbox
	NetNS                string // path
	Cgroup               string // directory of the pod level
	ContainerCgroup      string // directory of its container

	node    *Node
	options PodOptions
	thread  *thread

	mu        sync.Mutex
	attached  []attached
	processes []*Process
	services  []*Service
	veths     []string // in the node's network namespace, made by Wire
}

type attached struct {
	list   *libcni.NetworkConfigList
	ifName string
	result *types100.Result // nil: ADD failed, and Close is to delete what it did
}

// NewPod makes a pod's network namespace and cgroups, as a kubelet and a container
// runtime do before they call CNI.
func (n *Node) NewPod(name string, o PodOptions) (p *Pod, err error) {
	if o.Namespace == "" {
		o.Namespace = "default"
	}
	if o.UID == "" {
		o.UID = randomUID()
	}
	if o.Cgroup == "" {
		o.Cgroup = "kubepods/burstable/pod" + o.UID
	}
	if o.CgroupPath == "" {
		o.CgroupPath = "/" + o.Cgroup
	}
	id := strings.ReplaceAll(randomUID()+randomUID(), "-", "")
	p = &Pod{
		Name: name, Namespace: o.Namespace, UID: o.UID, ID: id,
		NetNS: filepath.Join(n.Dir, "netns-"+id[:12]),
		node:  n, options: o,
	}
	n.mu.Lock()
	n.pods = append(n.pods, p)
	n.mu.Unlock()
	defer func() {
		if err != nil {
			ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
			defer cancel()
			err = errors.Join(fmt.Errorf("make pod %s: %w", name, err), p.Close(ctx))
			p = nil
		}
	}()
	if p.Cgroup, err = n.Cgroup(o.Cgroup); err != nil {
		return p, err
	}
	if p.ContainerCgroup, err = n.Cgroup(filepath.Join(o.Cgroup, id)); err != nil {
		return p, err
	}
	p.thread, err = newNetNS(p.NetNS)
	return p, err
}

// AddPod makes a pod and attaches it to a network as [IfName].
func (n *Node) AddPod(ctx context.Context, name string, list *libcni.NetworkConfigList, o PodOptions) (*Pod, error) {
	p, err := n.NewPod(name, o)
	if err != nil {
		return nil, err
	}
	if _, err := p.Add(ctx, list, IfName); err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		return nil, errors.Join(err, p.Close(clean))
	}
	return p, nil
}

// randomUID makes a version 4 UUID.
func randomUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// RuntimeConf is what a container runtime passes to CNI for the pod.
func (p *Pod) RuntimeConf(ifName string) *libcni.RuntimeConf {
	annotations := p.options.Annotations
	if annotations == nil {
		annotations = map[string]string{}
	}
	capabilities := map[string]any{"io.kubernetes.cri.pod-annotations": annotations}
	if !p.options.NoCgroupPath {
		capabilities["cgroupPath"] = p.options.CgroupPath
	}
	maps.Copy(capabilities, p.options.Capabilities)
	return &libcni.RuntimeConf{
		ContainerID: p.ID, NetNS: p.NetNS, IfName: ifName,
		Args: append([][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.Namespace},
			{"K8S_POD_NAME", p.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
			{"K8S_POD_UID", p.UID},
		}, p.options.Args...),
		CapabilityArgs: capabilities,
	}
}

// Add attaches the pod to a network (CNI ADD). What fails is deleted
// again, as runtimes do. On a node of [Here], Close does that where ctx has ended, and tries
// once more where DEL fails too.
// Errors of plugins are *types.Error.
func (p *Pod) Add(ctx context.Context, list *libcni.NetworkConfigList, ifName string) (*types100.Result, error) {
	if err := p.note(list, ifName); err != nil {
		return nil, err
	}
	cni, rt := p.node.CNI(), p.RuntimeConf(ifName)
	res, err := cni.AddNetworkList(ctx, list, rt)
	var result *types100.Result
	if err == nil {
		result, err = types100.NewResultFromResult(res)
	}
	if err != nil {
		err = fmt.Errorf("add pod %s to network %s: %w", p.Name, list.Name, err)
		if ctx.Err() != nil && p.node.journal { // Close is next: a DEL that hangs does so once
			p.keep(attached{list, ifName, nil})
			return nil, err
		}
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		delErr := p.Del(clean, list, ifName)
		if delErr != nil && p.node.journal { // the machine keeps what ADD did
			p.keep(attached{list, ifName, nil})
		}
		return nil, errors.Join(err, delErr)
	}
	p.keep(attached{list, ifName, result})
	return result, nil
}

func (p *Pod) keep(a attached) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.attached = append(p.attached, a)
}

// Del detaches the pod from a network (CNI DEL), attached or not.
func (p *Pod) Del(ctx context.Context, list *libcni.NetworkConfigList, ifName string) error {
	if err := p.node.CNI().DelNetworkList(ctx, list, p.RuntimeConf(ifName)); err != nil {
		return fmt.Errorf("delete pod %s from network %s: %w", p.Name, list.Name, err)
	}
	p.mu.Lock()
	p.attached = slices.DeleteFunc(p.attached, func(a attached) bool {
		return a.list.Name == list.Name && a.ifName == ifName
	})
	p.mu.Unlock()
	return p.forgetNote(ifName)
}

// Check is CNI CHECK.
func (p *Pod) Check(ctx context.Context, list *libcni.NetworkConfigList, ifName string) error {
	if err := p.node.CNI().CheckNetworkList(ctx, list, p.RuntimeConf(ifName)); err != nil {
		return fmt.Errorf("check pod %s on network %s: %w", p.Name, list.Name, err)
	}
	return nil
}

// GC is CNI GC with the attachments of the given pods as the valid ones.
func (n *Node) GC(ctx context.Context, list *libcni.NetworkConfigList, valid ...*Pod) error {
	var keep []types.GCAttachment
	for _, p := range valid {
		p.mu.Lock()
		for _, a := range p.attached {
			if a.list.Name == list.Name && a.result != nil {
				keep = append(keep, types.GCAttachment{ContainerID: p.ID, IfName: a.ifName})
			}
		}
		p.mu.Unlock()
	}
	if err := n.CNI().GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: keep}); err != nil {
		return fmt.Errorf("garbage-collect network %s: %w", list.Name, err)
	}
	return nil
}

// Addr returns the pod's first address of a family; ok is false if it has none.
func (p *Pod) Addr(ipv6 bool) (addr netip.Addr, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.attached {
		if a.result == nil {
			continue
		}
		for _, ip := range a.result.IPs {
			if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok && addr.Unmap().Is6() == ipv6 {
				return addr.Unmap(), true
			}
		}
	}
	return netip.Addr{}, false
}

// AddAddr gives the pod's interface one more address, for networks that are not
// dual-stack. IPv6 addresses are usable at once.
func (p *Pod) AddAddr(ifName string, prefix netip.Prefix) error {
	return p.Do(func() error { return addAddr(ifName, prefix) })
}

// Do is [Node.Do] for the pod's network namespace.
func (p *Pod) Do(f func() error) error { return p.thread.do(f) }

// Close removes the pod: processes, attachments (with DEL), network namespace,
// cgroups. It may be called again.
func (p *Pod) Close(ctx context.Context) error {
	p.mu.Lock()
	attached, processes, services, veths := p.attached, p.processes, p.services, p.veths
	p.attached, p.processes, p.services, p.veths = nil, nil, nil, nil
	p.mu.Unlock()
	var failed []error
	for _, s := range services {
		failed = append(failed, s.Close())
	}
	for _, proc := range processes {
		failed = append(failed, proc.stop())
	}
	for i := len(attached) - 1; i >= 0; i-- {
		failed = append(failed, p.Del(ctx, attached[i].list, attached[i].ifName))
	}
	failed = append(failed, p.unwire(veths))
	if p.thread != nil {
		failed = append(failed, p.thread.close())
		p.thread = nil
	}
	failed = append(failed, removeNetNS(p.NetNS))
	if p.Cgroup != "" {
		failed = append(failed, removeCgroup(ctx, p.Cgroup))
	}
	p.node.forget(p)
	return errors.Join(failed...)
}

func (n *Node) forget(p *Pod) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods = slices.DeleteFunc(n.pods, func(other *Pod) bool { return other == p })
}

// addAddr adds an address to a link of the calling thread's network namespace,
// without duplicate address detection.
func addAddr(ifName string, prefix netip.Prefix) error {
	link, err := netlink.LinkByName(ifName)
	if err != nil {
		return fmt.Errorf("find link %s: %w", ifName, err)
	}
	addr, err := netlink.ParseAddr(prefix.String())
	if err != nil {
		return err
	}
	if prefix.Addr().Is6() {
		addr.Flags |= ifaNoDAD
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add address %s to link %s: %w", prefix, ifName, err)
	}
	return nil
}
