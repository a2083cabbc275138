package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options say where a [Daemon] works.
type Options struct {
	*Programs
	Dir     string // for everything that it writes; it must be short, for the sockets' names
	CNIBin  string
	CNIConf string
	Enter   []string // cgroup.procs files of what are to be the roots of its cgroup namespace
}

// A Daemon is a running containerd. It may be stopped and started again; its
// containers live on meanwhile.
type Daemon struct {
	o      Options
	cmd    *exec.Cmd
	ended  chan struct{}
	output *os.File
}

// enter starts a program in new cgroups and a cgroup namespace with these as roots.
const enter = `for procs in $0; do echo $$ >$procs || exit; done; exec unshare --cgroup "$@"`

const ready = time.Minute

// config is containerd's configuration, in a version that 1.6 and 2 read. What is
// unusual here: the native snapshotter needs no overlay, and a container's OOM
// score stays what it is, as a process without CAP_SYS_RESOURCE may not lower it.
const config = `version = 2
root = %[1]q
state = %[2]q
imports = []
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
	"io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt",
	"io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]

[debug]
  level = "warn"

[grpc]
  address = %[3]q

[ttrpc]
  address = %[4]q

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %[5]q
  restrict_oom_score_adj = true
  disable_apparmor = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %[6]q
    conf_dir = %[7]q
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
`

// New writes the configuration. Nothing runs until [Daemon.Start].
func New(o Options) (*Daemon, error) {
	for _, dir := range []string{"root", "state"} {
		if err := os.MkdirAll(filepath.Join(o.Dir, dir), 0o711); err != nil {
			return nil, err
		}
	}
	text := fmt.Sprintf(config, filepath.Join(o.Dir, "root"), filepath.Join(o.Dir, "state"), filepath.Join(o.Dir, "c.sock"),
		filepath.Join(o.Dir, "c.sock.ttrpc"), Image, o.CNIBin, o.CNIConf)
	return &Daemon{o: o}, os.WriteFile(filepath.Join(o.Dir, "config.toml"), []byte(text), 0o600)
}

// Socket is where it serves CRI.
func (d *Daemon) Socket() string { return filepath.Join(d.o.Dir, "c.sock") }

func (d *Daemon) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("env", append([]string{name}, args...)...) // finds the program in the PATH below
	cmd.Env = []string{"PATH=" + d.o.Path, "HOME=/root", "TMPDIR=" + d.o.Dir}
	return cmd
}

// Start starts it and waits until it can be asked. The calling thread's network
// namespace is the node's.
func (d *Daemon) Start(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(d.o.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := d.command("sh", "-c", enter, strings.Join(d.o.Enter, " "), "containerd", "--config", filepath.Join(d.o.Dir, "config.toml"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	d.cmd, d.ended = cmd, make(chan struct{})
	go func() {
		cmd.Wait()
		close(d.ended)
	}()
	ctx, cancel := context.WithTimeout(ctx, ready)
	defer cancel()
	for {
		out, err := d.ctr(ctx, "version")
		if err == nil {
			return nil
		}
		select {
		case <-d.ended:
			return fmt.Errorf("containerd has ended:\n%s", d.Log())
		case <-ctx.Done():
			return fmt.Errorf("containerd does not answer: %w: %s\n%s", err, out, d.Log())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Log returns the end of what it wrote.
func (d *Daemon) Log() string {
	text, err := os.ReadFile(filepath.Join(d.o.Dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-8<<10):])
}

// Stop stops it; containers run on.
func (d *Daemon) Stop() error {
	if d.cmd == nil {
		return nil
	}
	err := d.cmd.Process.Signal(unix.SIGTERM)
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	select {
	case <-d.ended:
	case <-time.After(ready):
		err = errors.Join(err, errors.New("containerd does not end"), d.cmd.Process.Kill())
		<-d.ended
	}
	d.cmd = nil
	return err
}

// Import makes an image archive known to CRI.
func (d *Daemon) Import(ctx context.Context, archive string) error {
	_, err := d.ctr(ctx, "--namespace", "k8s.io", "images", "import", "--no-unpack", archive)
	return err
}

func (d *Daemon) ctr(ctx context.Context, args ...string) (string, error) {
	cmd := d.command("ctr", append([]string{"--address", d.Socket(), "--timeout", "20s"}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}
