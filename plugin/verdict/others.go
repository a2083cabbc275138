package verdict

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Sharing says what else may be attached to the cgroups below a cgroup with a
// program, as the flags of its attachment ask for.
type Sharing string

const (
	// Multi: programs above and below all run (BPF_F_ALLOW_MULTI, all links).
	Multi Sharing = "multi"
	// Override: a program that is attached below runs in its place
	// (BPF_F_ALLOW_OVERRIDE).
	Override Sharing = "override"
	// Exclusive: nothing can be attached below; bpf(2) says EPERM.
	Exclusive Sharing = "exclusive"
)

// Other is an attachment of somebody else's BPF program to TCP sockets: of a
// sock_ops program to a cgroup, or of an sk_msg or sk_skb program to a sockmap.
type Other struct {
	Program   string   `json:"program"` // the kernel keeps 15 bytes of the name
	ProgramID uint32   `json:"programID"`
	Type      string   `json:"type"`                // sock_ops, sk_msg or sk_skb
	Cgroup    string   `json:"cgroup,omitempty"`    // of sock_ops: below the cgroup root, "/" for the root, "/.." above it
	Sharing   Sharing  `json:"sharing,omitempty"`   // of sock_ops
	Map       string   `json:"map,omitempty"`       // of sk_msg and sk_skb
	MapID     uint32   `json:"mapID,omitempty"`     //
	Processes []string `json:"processes,omitempty"` // that hold the program: name and PID
	Product   string   `json:"product,omitempty"`   // what usually has a program of this name
	// Conflict says in one line how it and skipstack get in each other's way,
	// "" where they do not.
	Conflict string `json:"conflict,omitempty"`
	// Blocks tells that skipstack is not attached to pods below Cgroup.
	Blocks bool `json:"blocks,omitempty"`
	// Everywhere tells that every pod is below Cgroup.
	Everywhere bool `json:"everywhere,omitempty"`
}

// products are known by the beginnings of their programs' names.
var products = []struct{ prefix, product string }{
	{"cil_", "Cilium"}, {"bpf_sockmap", "Cilium"}, {"bpf_redir_proxy", "Cilium"},
	{"beyla_", "Grafana Beyla"}, {"obi_", "OpenTelemetry eBPF Instrumentation"},
	{"mb_", "Merbridge"},
}

// Others lists the programs of other software that work on TCP sockets as
// skipstack's do. It needs CAP_SYS_ADMIN, else the error wraps [ErrPrivilege].
//
// Programs that are attached to cgroups which cgroupRoot does not show, as in a
// cgroup namespace, are found only where a link holds them. What ends meanwhile
// is passed over. When ctx ends, Others returns what it has found, and an error.
func Others(ctx context.Context, cgroupRoot, proc string) ([]Other, error) {
	o := &others{progs: map[ebpf.ProgramID]*program{}}
	err := errors.Join(o.sockMaps(ctx), o.cgroups(ctx, cgroupRoot), o.links(ctx))
	for i := range o.found {
		o.judge(&o.found[i])
	}
	if len(o.found) > 0 {
		o.holders(ctx, proc)
	}
	return o.found, privilege(err)
}

type program struct {
	name     string
	kind     string // "" for types that do not matter here
	ours     bool
	sockMaps bool // it uses a sockmap
}

type others struct {
	progs map[ebpf.ProgramID]*program
	maps  map[ebpf.MapID]bool // that are sockmaps
	found []Other
	seen  map[uint64]bool // ids of the cgroups that were looked at
}

// program looks a program up; nil if it is gone.
func (o *others) program(id ebpf.ProgramID) (*program, error) {
	if p, ok := o.progs[id]; ok {
		return p, nil
	}
	prog, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open BPF program %d: %w", id, err)
	}
	defer prog.Close()
	p := &program{}
	o.progs[id] = p
	switch prog.Type() {
	case ebpf.SockOps:
		p.kind = "sock_ops"
	case ebpf.SkMsg:
		p.kind = "sk_msg"
	case ebpf.SkSKB:
		p.kind = "sk_skb"
	default:
		return p, nil
	}
	info, err := prog.Info()
	if err != nil {
		return nil, fmt.Errorf("look at BPF program %d: %w", id, err)
	}
	p.name = info.Name
	ids, _ := info.MapIDs()
	for _, mapID := range ids {
		p.sockMaps = p.sockMaps || o.maps[mapID]
		m, err := ebpf.NewMapFromID(mapID)
		if err != nil {
			continue // it goes with its program
		}
		if mi, err := m.Info(); err == nil && strings.HasPrefix(mi.Name, "skipstack_") {
			p.ours = true
		}
		m.Close()
	}
	return p, nil
}

// add records an attachment, but for our own ones.
func (o *others) add(id ebpf.ProgramID, at Other) error {
	p, err := o.program(id)
	if err != nil || p == nil || p.ours || p.kind == "" {
		return err
	}
	at.Program, at.ProgramID, at.Type = p.name, uint32(id), p.kind
	o.found = append(o.found, at)
	return nil
}

// sockMaps looks for programs of sockmaps. Linux 5.18 is the first that tells.
func (o *others) sockMaps(ctx context.Context) error {
	o.maps = map[ebpf.MapID]bool{}
	for id := ebpf.MapID(0); ; {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var err error
		if id, err = ebpf.MapGetNextID(id); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return fmt.Errorf("list BPF maps: %w", err)
		}
		if err := o.sockMap(id); err != nil {
			return err
		}
	}
}

func (o *others) sockMap(id ebpf.MapID) error {
	m, err := ebpf.NewMapFromID(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open BPF map %d: %w", id, err)
	}
	defer m.Close()
	if t := m.Type(); t != ebpf.SockMap && t != ebpf.SockHash {
		return nil
	}
	o.maps[id] = true
	info, err := m.Info()
	if err != nil {
		return fmt.Errorf("look at BPF map %d: %w", id, err)
	}
	for _, attach := range []ebpf.AttachType{
		ebpf.AttachSkMsgVerdict, ebpf.AttachSkSKBStreamParser, ebpf.AttachSkSKBStreamVerdict, ebpf.AttachSkSKBVerdict,
	} {
		ids, _, err := queryPrograms(m.FD(), attach)
		if err != nil {
			continue // an old kernel, which cannot tell
		}
		for _, prog := range ids {
			if err := o.add(prog, Other{Map: info.Name, MapID: uint32(id)}); err != nil {
				return err
			}
		}
	}
	return nil
}

// cgroups looks for sock_ops programs at every cgroup below root.
func (o *others) cgroups(ctx context.Context, root string) error {
	o.seen = map[uint64]bool{}
	// What follows goes by names.
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return fmt.Errorf("list cgroups: %w", err)
	}
	for above := root; ; {
		above = filepath.Join(above, "..")
		if checkCgroup2(above) != nil {
			break
		}
		name, err := filepath.Rel(root, above)
		if err != nil {
			return fmt.Errorf("list cgroups: %w", err)
		}
		if err := o.cgroup(above, Other{Cgroup: "/" + name, Everywhere: true}); err != nil {
			return err
		}
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV):
			return nil // removed meanwhile
		case err != nil:
			return fmt.Errorf("list cgroups: %w", err)
		case !d.IsDir():
			return nil
		}
		below := strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		return o.cgroup(path, Other{Cgroup: "/" + below, Everywhere: below == ""})
	})
}

// cgroup looks at one cgroup, which at names.
func (o *others) cgroup(path string, at Other) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil // removed meanwhile
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("look at cgroup %s: %w", path, err)
	}
	o.seen[st.Ino] = true
	ids, flags, err := queryPrograms(fd, ebpf.AttachCGroupSockOps)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		// Removed since it was opened: css_tryget_online_from_dir(), kernel/cgroup/cgroup.c.
		return nil
	}
	if err != nil {
		return fmt.Errorf("list the sock_ops programs of cgroup %s: %w", path, err)
	}
	at.Sharing = Exclusive
	switch {
	case flags&unix.BPF_F_ALLOW_MULTI != 0:
		at.Sharing = Multi
	case flags&unix.BPF_F_ALLOW_OVERRIDE != 0:
		at.Sharing = Override
	}
	for _, id := range ids {
		if err := o.add(id, at); err != nil {
			return err
		}
	}
	return nil
}

// links looks for links to cgroups that were not seen.
func (o *others) links(ctx context.Context) error {
	var it link.Iterator
	defer it.Close()
	for it.Next() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		info, err := it.Link.Info()
		if err != nil || info.Type != link.CgroupType {
			continue
		}
		cg := info.Cgroup()
		// A link whose cgroup is gone says 0.
		if cg == nil || ebpf.AttachType(cg.AttachType) != ebpf.AttachCGroupSockOps || cg.CgroupId == 0 || o.seen[cg.CgroupId] {
			continue
		}
		at := Other{Cgroup: fmt.Sprintf("id %d, not below the cgroup root", cg.CgroupId), Sharing: Multi}
		if err := o.add(info.Program, at); err != nil {
			return err
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("list BPF links: %w", err)
	}
	return nil
}

// judge says what an attachment and skipstack mean to each other.
//
// __cgroup_bpf_attach() and compute_effective_progs(), kernel/bpf/cgroup.c, for
// what may be attached below what; sock_map_link(), net/core/sock_map.c, for
// sockets that are in two sockmaps.
func (o *others) judge(at *Other) {
	for _, p := range products {
		if strings.HasPrefix(at.Program, p.prefix) {
			at.Product = p.product
			break
		}
	}
	uses := o.progs[ebpf.ProgramID(at.ProgramID)].sockMaps
	switch {
	case at.Type != "sock_ops":
		at.Conflict = "a socket has room for one such program: connections that are in this sockmap stay plain " +
			"(counted as other_owner), and accelerated ones cannot be put into it"
	case at.Sharing == Exclusive:
		at.Blocks = true
		at.Conflict = "it was attached without BPF_F_ALLOW_MULTI, so the kernel refuses skipstack's (EPERM): pods below this cgroup stay plain"
	case at.Sharing == Override:
		at.Blocks = true
		at.Conflict = "it was attached with BPF_F_ALLOW_OVERRIDE, so it would not run for a pod that skipstack is attached to: pods below this cgroup stay plain"
	case uses:
		at.Conflict = "it puts sockets into a sockmap of its own: if that has an sk_msg program, a connection belongs to who comes first"
	}
}

// holders names the processes that hold a descriptor of the programs.
func (o *others) holders(ctx context.Context, proc string) {
	fds, _ := filepath.Glob(filepath.Join(proc, "[0-9]*/fd"))
	for _, dir := range fds {
		if ctx.Err() != nil {
			return // they are a convenience
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // it has ended
		}
		pid := filepath.Dir(dir)
		for _, e := range entries {
			if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && (to == "anon_inode:bpf-prog" || to == "anon_inode:bpf_link") {
				o.held(pid, filepath.Join(pid, "fdinfo", e.Name()))
			}
		}
	}
}

// held adds the process to what one of its descriptors refers to.
func (o *others) held(pid, fdinfo string) {
	info, err := os.ReadFile(fdinfo)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(info)) {
		value, ok := strings.CutPrefix(line, "prog_id:")
		if !ok {
			continue
		}
		id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32)
		if err != nil {
			continue
		}
		name, err := os.ReadFile(filepath.Join(pid, "comm"))
		if err != nil {
			return
		}
		who := fmt.Sprintf("%s (%s)", strings.TrimSpace(string(name)), filepath.Base(pid))
		for i := range o.found {
			if f := &o.found[i]; uint64(f.ProgramID) == id && !slices.Contains(f.Processes, who) {
				f.Processes = append(f.Processes, who)
			}
		}
	}
}

// queryPrograms is BPF_PROG_QUERY with the flags of the attachment, which the
// library keeps to itself.
func queryPrograms(target int, attach ebpf.AttachType) (ids []ebpf.ProgramID, flags uint32, err error) {
	const cmdProgQuery = 16 // enum bpf_cmd, include/uapi/linux/bpf.h
	buf := make([]ebpf.ProgramID, 64)
	// Whose address the kernel gets as a number, which keeps nothing in place.
	var pin runtime.Pinner
	defer pin.Unpin()
	for {
		pin.Pin(&buf[0])
		// The first members of union bpf_attr's query; the kernel takes what
		// is missing for zero.
		attr := struct {
			target, attach, queryFlags, attachFlags uint32
			ids                                     uint64
			count, _                                uint32
		}{target: uint32(target), attach: uint32(attach), ids: uint64(uintptr(unsafe.Pointer(&buf[0]))), count: uint32(len(buf))}
		_, _, errno := unix.Syscall(unix.SYS_BPF, cmdProgQuery, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		switch errno {
		case 0:
			return buf[:attr.count], attr.attachFlags, nil
		case unix.ENOSPC:
			buf = make([]ebpf.ProgramID, 2*len(buf))
		case unix.EINTR:
		default:
			return nil, 0, errno
		}
	}
}
