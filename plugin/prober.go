package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/attachment"
)

// lockPoll is how often a waiting process tries a lock again: flock(2) itself
// knows no time limit.
const lockPoll = 20 * time.Millisecond

// errProbing is returned by lockProbe when ctx ends first.
var errProbing = errors.New("another process is probing the kernel")

// lockProbe opens the probe lock and takes it, or returns errProbing when ctx
// ends first, which a context that has ended makes a single try of. Closing the
// file releases the lock.
func lockProbe(ctx context.Context, runDir string) (*os.File, error) {
	dir, err := attachment.OpenRunDir(runDir, true)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat(int(dir.Fd()), attachment.ProbeLock,
		unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", filepath.Join(runDir, attachment.ProbeLock), err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(runDir, attachment.ProbeLock))
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("%w (%s)", errProbing, f.Name())
		case <-time.After(lockPoll):
		}
	}
}

// ended is a context that waits for nothing.
func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// detached is the [Prober] that runs the hidden command "probe" of a binary.
type detached struct {
	exe string
	env []string
}

// probeLockFD is the descriptor on which the command "probe" inherits its lock,
// the first of exec.Cmd.ExtraFiles.
const probeLockFD = 3

// Start takes the probe lock and hands it to the child with the open file, so
// there is one child at most, and the lock ends with it however it ends.
func (d detached) Start(conf Config, load bool) error {
	lock, err := lockProbe(ended(), conf.RunDir)
	if errors.Is(err, errProbing) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()

	args, err := probeArgs(conf, load)
	if err != nil {
		return err
	}
	cmd := exec.Command(d.exe, args...)
	// The runtime waits for the end of the plugin's output, and a child that
	// had it would keep it open: with no files given these are /dev/null.
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, nil, nil
	cmd.ExtraFiles = []*os.File{lock}
	cmd.Dir = "/"
	cmd.Env = withoutCNI(d.env)
	// Signals for the runtime's session or group are not for the child.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := closeOnExec(); err != nil {
		return fmt.Errorf("start the prober: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the prober: %w", err)
	}
	return cmd.Process.Release()
}

func probeArgs(conf Config, load bool) ([]string, error) {
	entry, err := json.Marshal(struct {
		MaxConnections uint32      `json:"maxConnections"`
		SpliceGuard    SpliceGuard `json:"spliceGuard"`
		LogFile        string      `json:"logFile,omitempty"`
		LogLevel       string      `json:"logLevel"`
		BPFFS          string      `json:"bpffs"`
		RunDir         string      `json:"runDir"`
		CgroupRoot     string      `json:"cgroupRoot,omitempty"`
	}{conf.MaxConnections, conf.SpliceGuard, conf.LogFile, conf.LogLevel, conf.BPFFS, conf.RunDir, conf.CgroupRoot})
	if err != nil {
		return nil, err
	}
	args := []string{"probe", "--lock-fd=" + strconv.Itoa(probeLockFD), "--entry=" + string(entry)}
	if load {
		args = append(args, "--load")
	}
	return args, nil
}

// withoutCNI drops the variables that would make a plugin of the child.
func withoutCNI(env []string) []string {
	var out []string
	for _, kv := range env {
		if !strings.HasPrefix(kv, "CNI_") {
			out = append(out, kv)
		}
	}
	return out
}

// closeOnExec keeps descriptors that this process has inherited without the
// flag, from a careless runtime, from its children. Go's own have it.
func closeOnExec() error {
	// Since Linux 5.11.
	err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil || !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}
