package doctor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/verdict"
)

// logTail is how much of the end of an audit log is looked at, and logMost how many
// records of the kernel's own.
const (
	logTail = 1 << 20
	logMost = 100_000
)

// security tells whether SELinux or AppArmor has refused what skipstack does, as far
// as the kernel's log and the audit log tell, or may.
func (h *host) security() verdict.Probe {
	denied, looked := h.denials()
	if denied != "" {
		return notOK(checkSecurity, "refused by policy: %s", denied)
	}
	var modes []string
	switch enforce, err := h.read("/sys/fs/selinux/enforce"); {
	case err == nil && enforce == "1":
		modes = append(modes, "SELinux enforces")
	case err == nil:
		modes = append(modes, "SELinux is permissive")
	}
	if enabled, err := h.read("/sys/module/apparmor/parameters/enabled"); err == nil && enabled == "Y" {
		modes = append(modes, "AppArmor is on")
		if p, running := h.runtime(); running {
			profile := h.profile(p)
			if strings.HasSuffix(profile, "(enforce)") {
				return couldNotTell(checkSecurity, "%s runs under the AppArmor profile %s, and so does the plugin: if ADD logs \"not permitted\", allow it CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN",
					p.name, profile)
			}
		}
	}
	switch {
	case len(modes) == 0:
		return ok(checkSecurity, "neither SELinux nor AppArmor")
	case !looked:
		return couldNotTell(checkSecurity, "%s; the log of what they refuse cannot be read", strings.Join(modes, ", "))
	}
	return ok(checkSecurity, "%s; nothing of skipstack's was refused, as far as the log goes back", strings.Join(modes, ", "))
}

// profile is the AppArmor profile of a process, "" if it has none.
func (h *host) profile(p process) string {
	for _, file := range []string{"attr/apparmor/current", "attr/current"} {
		if s, err := h.read(filepath.Join("/proc", p.pid, file)); err == nil {
			return strings.Trim(s, "\x00\n ")
		}
	}
	return ""
}

// denials looks for the last refusal that is about skipstack, and tells whether any
// log could be read.
func (h *host) denials() (last string, looked bool) {
	for _, path := range []string{"/dev/kmsg", "/var/log/audit/audit.log"} {
		lines, err := logLines(h.path(path))
		if err != nil {
			continue
		}
		looked = true
		for _, line := range lines {
			if d, ok := denial(line); ok {
				last = d
			}
		}
	}
	return last, looked
}

// logLines reads a log: of a file the end, of the kernel's all that it still has,
// which it hands out one record a read(2). Nothing is waited for.
func logLines(path string) ([]string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		if _, err := unix.Seek(fd, max(0, st.Size-logTail), io.SeekStart); err != nil {
			return nil, err
		}
	}
	var text strings.Builder
	buf := make([]byte, 64<<10)
	for range logMost {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EINTR) {
			continue // EPIPE: the record was overwritten meanwhile
		}
		if errors.Is(err, unix.EAGAIN) || n == 0 && err == nil {
			break
		}
		if err != nil {
			return nil, os.NewSyscallError("read", err)
		}
		text.Write(buf[:n])
	}
	return strings.Split(text.String(), "\n"), nil
}

// denial picks the essence of a log line that says that SELinux, AppArmor or the
// kernel's lockdown refused skipstack something.
func denial(line string) (string, bool) {
	// The program, or its file: comm="skipstack", name="/opt/cni/bin/skipstack".
	ours := strings.Contains(line, `skipstack"`)
	var what []string
	add := func(keys ...string) {
		for _, key := range keys {
			if v := value(line, key); v != "" {
				what = append(what, key+"="+v)
			}
		}
	}
	switch {
	case strings.Contains(line, "avc:") && strings.Contains(line, "denied") && ours:
		_, after, _ := strings.Cut(line, "denied")
		perms, _, _ := strings.Cut(strings.TrimSpace(after), "}")
		what = append(what, "SELinux denied "+printable(strings.TrimSpace(strings.TrimPrefix(perms, "{"))))
		add("scontext", "tclass")
	case strings.Contains(line, `apparmor="DENIED"`) && ours:
		what = append(what, "AppArmor denied")
		add("operation", "profile", "capname", "name")
	case strings.Contains(line, "Lockdown: skipstack:"):
		_, after, _ := strings.Cut(line, "Lockdown: skipstack:")
		what = append(what, "lockdown: "+printable(strings.TrimSpace(after)))
	default:
		return "", false
	}
	return strings.Join(what, " "), true
}

// value is that of key=value in an audit record, quoted or not.
func value(line, key string) string {
	_, rest, found := strings.Cut(line, " "+key+"=")
	if !found {
		return ""
	}
	if quoted, isQuoted := strings.CutPrefix(rest, `"`); isQuoted {
		v, _, _ := strings.Cut(quoted, `"`)
		return printable(v)
	}
	v, _, _ := strings.Cut(rest, " ")
	return printable(v)
}

// printable makes what somebody else wrote fit for a line on a terminal.
func printable(s string) string {
	const most = 80 // bytes
	s = strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	if len(s) > most {
		return fmt.Sprintf("%s...", strings.ToValidUTF8(s[:most], ""))
	}
	return s
}
