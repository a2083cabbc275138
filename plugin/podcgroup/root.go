package podcgroup

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// FindRoot returns the cgroup2 mount point: sysfsCgroup (normally
// /sys/fs/cgroup), else its child "unified", which systemd mounts on hybrid
// systems, else the first cgroup2 mount that proc's self/mountinfo lists, one
// that shows the whole hierarchy before one that does not.
//
// It returns an error wrapping [ErrNoCgroup2] if there is none.
func FindRoot(sysfsCgroup, proc string) (string, error) {
	return findRoot(sysfsCgroup, proc, fstatfsType)
}

func findRoot(sysfsCgroup, proc string, fsType func(fd int) (int64, error)) (string, error) {
	isCgroup2 := func(path string) bool {
		fd, err := openDir(path)
		if err != nil {
			return false
		}
		defer unix.Close(fd)
		typ, err := fsType(fd)
		return err == nil && typ == unix.CGROUP2_SUPER_MAGIC
	}
	unified := filepath.Join(sysfsCgroup, "unified")
	for _, path := range []string{sysfsCgroup, unified} {
		if isCgroup2(path) {
			return path, nil
		}
	}
	mounts, err := cgroup2Mounts(proc)
	if err != nil {
		return "", fmt.Errorf("%w: none at %s nor %s, and %w", ErrNoCgroup2, sysfsCgroup, unified, err)
	}
	part := ""
	for _, m := range mounts {
		if !isCgroup2(m.point) {
			continue // mounted over, or out of reach
		}
		if m.root == "/" {
			return m.point, nil
		}
		if part == "" {
			part = m.point
		}
	}
	if part != "" {
		return part, nil
	}
	return "", fmt.Errorf("%w: looked at %s, at %s and for cgroup2 in %s; boot with systemd.unified_cgroup_hierarchy=1, or mount it: mount -t cgroup2 none /sys/fs/cgroup/unified",
		ErrNoCgroup2, sysfsCgroup, unified, filepath.Join(proc, "self/mountinfo"))
}

// CheckRoot returns an error if path is not a directory of a cgroup2 file system.
// The error wraps [ErrNoCgroup2] where that is certain.
func CheckRoot(path string) error {
	fd, err := openRoot(path, fstatfsType)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func openRoot(path string, fsType func(fd int) (int64, error)) (fd int, err error) {
	if fd, err = openDir(path); err != nil {
		return -1, fmt.Errorf("%w: open cgroup root: %w", ErrNoCgroup2, err)
	}
	typ, err := fsType(fd)
	if err != nil {
		err = fmt.Errorf("statfs cgroup root %s: %w", path, err)
	} else if typ != unix.CGROUP2_SUPER_MAGIC {
		err = fmt.Errorf("%w at %s (file system type %#x); name the cgroup2 mount point as the cgroup root", ErrNoCgroup2, path, typ)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

type mount struct {
	root  string // directory of the hierarchy that is mounted, in this cgroup namespace's terms
	point string
}

// cgroup2Mounts returns the cgroup2 mounts of this process's mount namespace, in
// the order of mountinfo.
func cgroup2Mounts(proc string) ([]mount, error) {
	file, err := os.Open(filepath.Join(proc, "self/mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	defer file.Close()
	var mounts []mount
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20) // an overlay mount's options exceed the default
	for lines.Scan() {
		if m, ok := parseMount(lines.Text()); ok {
			mounts = append(mounts, m)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", file.Name(), err)
	}
	return mounts, nil
}

// parseMount reads one line of mountinfo (proc_pid_mountinfo(5)) and reports
// whether it is a cgroup2 mount.
func parseMount(line string) (mount, bool) {
	mounted, super, ok := strings.Cut(line, " - ")
	if !ok {
		return mount{}, false
	}
	fields := strings.Fields(mounted)
	fsType, _, _ := strings.Cut(super, " ")
	if len(fields) < 6 || fsType != "cgroup2" {
		return mount{}, false
	}
	m := mount{root: unescape(fields[3]), point: unescape(fields[4])}
	return m, filepath.IsAbs(m.root) && filepath.IsAbs(m.point)
}

// unescape undoes the octal escapes that the kernel uses for space, tab,
// newline and backslash in mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountBase returns which directory of the hierarchy root is, as a path in the
// terms of /proc/PID/cgroup. It is "/" for an ordinary mount; it is not where
// root is a bind mount of a part of the hierarchy, or a directory below the
// mount point.
func mountBase(proc, root string) ([]string, error) {
	mounts, err := cgroup2Mounts(proc)
	if err != nil {
		return nil, err
	}
	if root, err = filepath.Abs(root); err != nil {
		return nil, fmt.Errorf("find mount of cgroup root: %w", err)
	}
	if resolved, err := filepath.EvalSymlinks(root); err == nil {
		root = resolved
	}
	best, rest := mount{}, ""
	for _, m := range mounts {
		below, ok := strings.CutPrefix(root, strings.TrimSuffix(m.point, "/"))
		if !ok || below != "" && below[0] != '/' || len(m.point) < len(best.point) {
			continue
		}
		best, rest = m, below // the last of several on one point is on top
	}
	if best.point == "" {
		return nil, fmt.Errorf("%s lists no cgroup2 mount that holds %s", filepath.Join(proc, "self/mountinfo"), root)
	}
	base, err := splitPath(best.root + rest)
	if err != nil {
		// cgroup_namespaces(7): "/.." stands for a parent of the namespace's root.
		return nil, fmt.Errorf("the cgroup2 mount at %s belongs to another cgroup namespace (its root is %s here)", best.point, best.root)
	}
	return base, nil
}
