package podcgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxNesting is how many levels above its kubepods cgroup a kubelet's cgroup
	// root is looked for. kind and k3s use one.
	maxNesting = 3
	// maxDirs bounds how many directories a search reads. A node has a few dozen.
	maxDirs = 1024
)

// A pod's UID is a UUID; a static pod's is the MD5 sum of its manifest in 32 hex
// digits, unless the manifest sets another (kubelet, config/common.go,
// applyDefaults).
var podUID = regexp.MustCompile(`^[A-Za-z0-9_-]{1,128}$`)

// errTooMany ends a search that has read maxDirs directories.
var errTooMany = errors.New("too many cgroups")

// byUID looks for the cgroup that a kubelet made for K8S_POD_UID.
//
// It reads the directories above the kubepods cgroups only. In these a pod's
// possible names are opened directly, so neither the number of pods nor what is
// below them matters.
func (t *tree) byUID(ctx context.Context, req Request) (*Pod, error) {
	if !podUID.MatchString(req.PodUID) {
		return nil, fmt.Errorf("%w: K8S_POD_UID %.256q is not a pod UID", ErrRefused, req.PodUID)
	}
	roots, err := t.kubepods(ctx)
	if errors.Is(err, errTooMany) {
		return nil, fmt.Errorf("%w: gave up on K8S_POD_UID %s after %d cgroups below %s", ErrNotFound, req.PodUID, maxDirs, t.Root)
	}
	if err != nil {
		return nil, fmt.Errorf("look for K8S_POD_UID %s below %s: %w", req.PodUID, t.Root, err)
	}
	var found []string
	fd, comps := -1, []string(nil)
	for _, root := range roots {
		for _, name := range podPaths(root, req.PodUID) {
			next, err := t.openBelow(name)
			if isNotFound(err) {
				continue
			}
			if fd >= 0 {
				unix.Close(fd)
			}
			if err != nil {
				return nil, err
			}
			fd, comps = next, name
			found = append(found, slash(name))
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("%w: no cgroup of K8S_POD_UID %s in %s", ErrNotFound, req.PodUID, t.describe(roots))
	case 1:
		if err := t.refuseShared(comps); err != nil {
			unix.Close(fd)
			return nil, err
		}
		return t.pod(fd, comps, sourceUID)
	}
	unix.Close(fd)
	slices.Sort(found)
	return nil, fmt.Errorf("%w: below %s, K8S_POD_UID %s has %s; remove the stale one", ErrAmbiguous, t.Root, req.PodUID, strings.Join(found, " and "))
}

func (t *tree) describe(roots [][]string) string {
	if len(roots) == 0 {
		return "any kubepods cgroup below " + t.Root + ", since there is none"
	}
	var paths []string
	for _, root := range roots {
		paths = append(paths, slash(root))
	}
	return strings.Join(paths, ", ") + " below " + t.Root
}

// podPaths returns where a pod's cgroup may be below the kubepods cgroup root.
func podPaths(root []string, uid string) [][]string {
	spellings := []string{"pod" + uid}
	if escaped := strings.ReplaceAll(uid, "-", "_"); escaped != uid {
		spellings = append(spellings, "pod"+escaped)
	}
	kubepods := root[len(root)-1]
	var paths [][]string
	add := func(parent string, dir ...string) {
		for _, pod := range spellings {
			path := append(append([]string(nil), root...), dir...)
			paths = append(paths, append(path, childName(parent, pod)))
		}
	}
	add(kubepods)
	for _, qos := range qosLevels {
		level := childName(kubepods, qos)
		add(level, level)
	}
	return paths
}

// kubepods returns the kubepods cgroups of all kubelets.
//
// A kubelet's cgroup root is the hierarchy's root, or nested in it. Where the
// node itself is a container that sees the whole hierarchy, the root is below an
// ancestor of this process's cgroup.
func (t *tree) kubepods(ctx context.Context) ([][]string, error) {
	fd, err := unix.Openat(t.fd, ".", openFlags, 0)
	if err != nil {
		return nil, fmt.Errorf("read cgroup root: %w", err)
	}
	var roots [][]string
	err = t.search(ctx, fd, nil, maxNesting, &roots)
	return roots, err
}

// search appends to roots the kubepods cgroups below comps and takes dirfd, the
// open comps, over. It goes down left levels.
func (t *tree) search(ctx context.Context, dirfd int, comps []string, left int, roots *[][]string) error {
	dir := os.NewFile(uintptr(dirfd), slash(comps))
	defer dir.Close()
	if err := ctx.Err(); err != nil {
		return err
	}
	if t.visited++; t.visited > maxDirs {
		return errTooMany
	}
	entries, err := dir.ReadDir(-1)
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) { // removed meanwhile
		return fmt.Errorf("read cgroup %s: %w", slash(comps), err)
	}
	parent := ""
	if len(comps) > 0 {
		parent = comps[len(comps)-1]
	}
	self := t.selfBelowRoot()
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		child := append(append([]string(nil), comps...), entry.Name())
		if isKubepods(parent, entry.Name()) {
			*roots = append(*roots, child)
			continue
		}
		holdsSelf := hasPrefix(self, child)
		if !holdsSelf && (left == 0 || isLeaf(entry.Name())) {
			continue
		}
		fd, err := t.openFrom(dirfd, []string{entry.Name()})
		if err != nil || !holdsSelf && delegated(fd) {
			if err == nil {
				unix.Close(fd)
			}
			continue
		}
		below := left - 1
		if holdsSelf {
			below = maxNesting
		}
		if err := t.search(ctx, fd, child, below, roots); err != nil {
			return err
		}
	}
	return nil
}

// isLeaf reports whether a cgroup belongs to one service, container or user.
// No kubelet keeps its pods there, but whoever runs in it may be able to make
// cgroups, so names below it prove nothing.
func isLeaf(name string) bool {
	for _, suffix := range []string{".service", scopeSuffix, ".mount", ".swap", ".socket"} {
		if strings.HasSuffix(name, suffix) {
			return true
		}
	}
	return name == "user.slice" || containerName.MatchString(name)
}

// delegated reports whether a cgroup was given to another user, who can make
// cgroups in it.
func delegated(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) != nil || st.Uid != 0 && int(st.Uid) != os.Geteuid()
}

func isNotFound(err error) bool { return errors.Is(err, ErrNotFound) }
