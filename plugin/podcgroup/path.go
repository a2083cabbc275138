package podcgroup

import (
	"context"
	"fmt"
	"regexp"
	"strings"
)

const (
	sliceSuffix = ".slice"
	scopeSuffix = ".scope"

	maxPath = 4096 // PATH_MAX
	maxName = 255  // NAME_MAX
)

// byPath opens what runtimeConfig.cgroupPath names.
func (t *tree) byPath(_ context.Context, req Request) (*Pod, error) {
	comps, err := parsePath(req.Path)
	if err != nil {
		return nil, fmt.Errorf("%w: cgroup path %.256q from the runtime: %w", ErrRefused, req.Path, err)
	}
	if isSystemdTriple(req.Path) {
		// No CRI runtime passes it, see parsePath; it names a container.
		if comps, err = t.podLevel(comps); err != nil {
			return nil, err
		}
	}
	if err := t.refuseShared(comps); err != nil {
		return nil, err
	}
	fd, err := t.openBelow(comps)
	if err != nil {
		// With systemd, containerd and CRI-O let systemd place containers by the
		// last component alone (containerd, podsandbox/helpers_linux.go,
		// getCgroupsPath), so /a-b.slice is a.slice/a-b.slice to them.
		placed, expandErr := expandSlice(comps[len(comps)-1])
		if !isNotFound(err) || expandErr != nil || slash(placed) == slash(comps) || t.refuseShared(placed) != nil {
			return nil, err
		}
		var placedErr error
		if fd, placedErr = t.openBelow(placed); placedErr != nil {
			return nil, err
		}
		comps = placed
	}
	return t.pod(fd, comps, sourcePath)
}

// parsePath turns a cgroupPath into components below the root.
//
// Beside paths it takes a slice's bare name, and "slice:prefix:name", which is
// how OCI runtimes are told a container's cgroup under systemd
// (opencontainers/cgroups, systemd/common.go). The containerd and CRI-O of today
// pass the latter to runc only, and never as a pod's cgroupPath.
func parsePath(path string) ([]string, error) {
	if err := checkText(path); err != nil {
		return nil, err
	}
	switch {
	case isSystemdTriple(path):
		part := strings.Split(path, ":")
		slice, prefix, name := part[0], part[1], part[2]
		if slice == "" {
			slice = "system.slice"
		}
		comps, err := expandSlice(slice)
		if err != nil {
			return nil, err
		}
		if name == "" {
			return nil, fmt.Errorf("no unit name after the last colon")
		}
		if !strings.HasSuffix(name, sliceSuffix) {
			if prefix != "" {
				name = prefix + "-" + name
			}
			name += scopeSuffix
		}
		return append(comps, name), checkNames([]string{name})
	case !strings.Contains(path, "/") && strings.HasSuffix(path, sliceSuffix):
		return expandSlice(path)
	}
	return splitPath(path)
}

func isSystemdTriple(path string) bool {
	if strings.Contains(path, "/") || strings.Count(path, ":") != 2 {
		return false
	}
	slice, _, _ := strings.Cut(path, ":")
	return slice == "" || strings.HasSuffix(slice, sliceSuffix)
}

// splitPath splits a path below the root into its components.
func splitPath(path string) ([]string, error) {
	if err := checkText(path); err != nil {
		return nil, err
	}
	var comps []string
	for comp := range strings.SplitSeq(path, "/") {
		if comp != "" {
			comps = append(comps, comp)
		}
	}
	return comps, checkNames(comps)
}

func checkText(path string) error {
	switch {
	case len(path) >= maxPath:
		return fmt.Errorf("longer than %d bytes", maxPath-1)
	case strings.ContainsAny(path, "\x00\n"):
		// The kernel allows no newline in a cgroup's name (cgroup_mkdir).
		return fmt.Errorf("contains a NUL byte or a newline")
	}
	return nil
}

func checkNames(comps []string) error {
	for _, comp := range comps {
		switch {
		case comp == "." || comp == "..":
			return fmt.Errorf("contains a %q component", comp)
		case len(comp) > maxName:
			return fmt.Errorf("a component is longer than %d bytes", maxName)
		}
	}
	return nil
}

// expandSlice returns where systemd places a slice: a-b-c.slice is
// a.slice/a-b.slice/a-b-c.slice, and "-.slice" is the root (systemd.slice(5);
// opencontainers/cgroups, systemd/common.go, ExpandSlice).
func expandSlice(name string) ([]string, error) {
	stem, ok := strings.CutSuffix(name, sliceSuffix)
	switch {
	case !ok || strings.Contains(name, "/") || len(name) > maxName:
		return nil, fmt.Errorf("%.256q is not a systemd slice name", name)
	case stem == "-":
		return nil, nil
	}
	var comps []string
	for i := 0; i <= len(stem); i++ {
		if i < len(stem) && stem[i] != '-' {
			continue
		}
		if i == 0 || stem[i-1] == '-' {
			return nil, fmt.Errorf("%q is not a systemd slice name: empty part between dashes", name)
		}
		comps = append(comps, stem[:i]+sliceSuffix)
	}
	return comps, nil
}

// The kubelet makes <cgroup root>/kubepods[/<qos>]/pod<uid>, where guaranteed
// pods have no QoS level (kubelet, cm/pod_container_manager_linux.go,
// GetPodContainerName). With the systemd driver each level becomes a slice that
// repeats the names above it, "-" in them turned into "_" (kubelet,
// cm/cgroup_manager_linux.go, CgroupName.ToSystemd). The cgroup root is "/"
// unless configured; kind sets /kubelet, which systemd's driver makes
// kubelet.slice/kubelet-kubepods.slice; k3s in a container sets /k3s.
var qosLevels = []string{"burstable", "besteffort"}

// isKubepods reports whether name, a child of parent, holds all pods of a
// kubelet. parent is "" below the root.
func isKubepods(parent, name string) bool {
	if name == "kubepods" || name == "kubepods.slice" {
		return true
	}
	prefix, ok := strings.CutSuffix(name, "-kubepods.slice")
	return ok && prefix != "" && parent == prefix+sliceSuffix
}

// kubepodsAt reports whether comps[:i+1] is a kubepods cgroup.
func kubepodsAt(comps []string, i int) bool {
	parent := ""
	if i > 0 {
		parent = comps[i-1]
	}
	return isKubepods(parent, comps[i])
}

// childName returns the name of a kubelet's cgroup below parent, which is a
// kubepods or QoS cgroup.
func childName(parent, child string) string {
	if stem, ok := strings.CutSuffix(parent, sliceSuffix); ok {
		return stem + "-" + child + sliceSuffix
	}
	return child
}

// isPodName reports whether name, below the kubepods or QoS cgroup parent, is
// a pod's cgroup, and returns the pod's UID as spelled there.
func isPodName(parent, name string) (uid string, ok bool) {
	if stem, isSlice := strings.CutSuffix(parent, sliceSuffix); isSlice {
		if name, ok = strings.CutSuffix(name, sliceSuffix); !ok {
			return "", false
		}
		if name, ok = strings.CutPrefix(name, stem+"-"); !ok {
			return "", false
		}
	}
	uid, ok = strings.CutPrefix(name, "pod")
	return uid, ok && uid != ""
}

// kubepodsDepth returns, for comps[i] a kubepods cgroup, how many components
// lead to the pod-level cgroup, 0 if comps does not reach a pod.
func kubepodsDepth(comps []string, i int) int {
	parent := comps[i]
	for _, qos := range qosLevels {
		if i+1 < len(comps) && comps[i+1] == childName(parent, qos) {
			i++
			parent = comps[i]
			break
		}
	}
	if i+1 < len(comps) {
		if _, ok := isPodName(parent, comps[i+1]); ok {
			return i + 2
		}
	}
	return 0
}

// sharedBy says what shares the cgroup if its name tells that it is not one
// pod's own. The top-level slices are those of systemd.special(7).
func sharedBy(comps []string) string {
	last := len(comps) - 1
	name := comps[last]
	if kubepodsAt(comps, last) {
		return "all pods of the node are in it"
	}
	if last > 0 && kubepodsAt(comps, last-1) {
		for _, qos := range qosLevels {
			if name == childName(comps[last-1], qos) {
				return "all pods of one QoS class are in it"
			}
		}
	}
	switch {
	case last == 0 && (name == "system.slice" || name == "user.slice" || name == "machine.slice" || name == "init.scope"):
		return "systemd keeps unrelated processes in it"
	case loginUnit.MatchString(name):
		return "a user's login session is in it"
	}
	return ""
}

var (
	// Units of systemd-logind: user-1000.slice, user@1000.service, session-2.scope.
	loginUnit = regexp.MustCompile(`^(user-[0-9]+\.slice|user@[0-9]+\.service|session-[^/]*\.scope)$`)

	// Cgroups that container engines name by a 64-digit id: ID (docker, containerd
	// and podman's pods with cgroupfs), docker-ID.scope, nerdctl-ID.scope,
	// cri-containerd-ID.scope, crio-ID.scope, libpod-ID.scope, libpod-ID,
	// libpod-payload-ID (podman, libpod/container_internal_linux.go,
	// getOCICgroupPath), machine-libpod_pod_ID.slice (podman's pods,
	// libpod/runtime_pod_linux.go).
	containerName = regexp.MustCompile(`^([A-Za-z0-9]+[A-Za-z0-9_-]*[-_])?[0-9a-f]{64}(\.scope|\.slice)?$`)
)

// isContainer reports whether a cgroup of this name is a container, or a podman
// pod. systemd's scopes are, except those of its own processes and of logins.
func isContainer(name string) bool {
	if containerName.MatchString(name) {
		return true
	}
	return strings.HasSuffix(name, scopeSuffix) && name != "init.scope" && !loginUnit.MatchString(name)
}

// podLevel goes up from the cgroup of a container, or of a process in it, to the
// pod's cgroup under Kubernetes, else to that of the podman pod or container.
//
// The outermost cgroup that looks like one is taken: what is below it may be
// named by the tenant. One that holds this process is not: there the whole node
// is inside a container.
func (t *tree) podLevel(comps []string) ([]string, error) {
	for i, name := range comps {
		depth := 0
		switch {
		case kubepodsAt(comps, i):
			if depth = kubepodsDepth(comps, i); depth == 0 {
				return nil, fmt.Errorf("%w: %s is under %s, but not in a pod's cgroup there", ErrRefused, slash(comps), slash(comps[:i+1]))
			}
		case isContainer(name):
			depth = i + 1
		}
		if depth > 0 && !t.holdsSelf(comps[:depth]) {
			return comps[:depth], nil
		}
	}
	// Sub-cgroups that crun (src/libcrun/cgroup-systemd.c, find_systemd_subgroup),
	// systemd-nspawn and a container's own systemd put their processes into.
	for len(comps) > 1 {
		switch comps[len(comps)-1] {
		case "container", "payload", "supervisor", "init.scope":
			comps = comps[:len(comps)-1]
			continue
		}
		break
	}
	return comps, nil
}
