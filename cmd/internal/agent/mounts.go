package agent

import (
	"os"
	"path/filepath"
	"strings"
)

// hiddenMounts says why other mount namespaces might not see a BPF file system that
// is about to be mounted on path; "" if they will, or if there is one already. A mount
// is passed on to others if the mount that it is made on is shared
// (mount_namespaces(7)), which a container's is with mountPropagation: Bidirectional.
// In a host's own mount namespace it does not matter, but that cannot be told from
// inside.
func hiddenMounts(mountInfo, path string) string {
	raw, err := os.ReadFile(mountInfo)
	if err != nil {
		return ""
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	best, kind, passed, found := "", "", false, false
	for line := range strings.Lines(string(raw)) {
		// proc_pid_mountinfo(5): id parent major:minor root mountpoint options optional... - type ...
		fields := strings.Fields(line)
		if len(fields) < 10 {
			continue
		}
		at := unescape(fields[4])
		if at != path && at != "/" && !strings.HasPrefix(path, at+"/") || len(at) < len(best) {
			continue
		}
		best, passed, found = at, false, true
		for i, f := range fields[6:] {
			if f == "-" {
				if rest := fields[6+i+1:]; len(rest) > 0 {
					kind = rest[0]
				}
				break
			}
			passed = passed || strings.HasPrefix(f, "shared:")
		}
	}
	if !found || passed || kind == "bpf" && best == path {
		return ""
	}
	return "no BPF file system is mounted there, and " + best + " is private to this mount namespace; if this is a container, mount it with mountPropagation Bidirectional"
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
