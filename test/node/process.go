package node

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const ifaNoDAD = unix.IFA_F_NODAD

// A Process runs in a pod. It is killed when the pod is closed or the program ends.
type Process struct {
	cmd    *exec.Cmd
	waited sync.Once
	err    error
}

// StartOptions say where in the pod a process starts.
type StartOptions struct {
	Cgroup string // directory; default the pod's ContainerCgroup
	CPU    int    // the only CPU it may use, counted from 1; 0: any
}

// Start starts cmd in the pod: born in its container's cgroup (sockets keep the
// cgroup they are born in) and in its network namespace. cmd.SysProcAttr is replaced.
func (p *Pod) Start(cmd *exec.Cmd, o StartOptions) (*Process, error) {
	if o.Cgroup == "" {
		o.Cgroup = p.ContainerCgroup
	}
	cgroup, err := os.Open(o.Cgroup)
	if err != nil {
		return nil, fmt.Errorf("start %s in pod %s: %w", cmd.Path, p.Name, err)
	}
	defer cgroup.Close()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(cgroup.Fd()),
		Pdeathsig: unix.SIGKILL,
		Setpgid:   true, // signals of the terminal are not meant for it
	}
	if err := p.Do(func() error { return startOn(cmd, o.CPU) }); err != nil {
		return nil, fmt.Errorf("start %s in pod %s: %w", cmd.Path, p.Name, err)
	}
	proc := &Process{cmd: cmd}
	p.mu.Lock()
	p.processes = append(p.processes, proc)
	p.mu.Unlock()
	return proc, nil
}

// startOn starts cmd with the calling thread's affinity narrowed to one CPU, which
// the child inherits before it runs.
func startOn(cmd *exec.Cmd, cpu int) (err error) {
	if cpu == 0 {
		return cmd.Start()
	}
	var before, only unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("get CPU affinity: %w", err)
	}
	only.Set(cpu - 1)
	if err := unix.SchedSetaffinity(0, &only); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", cpu-1, err)
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &before)) }()
	return cmd.Start()
}

// Pid is the process's id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Wait waits until the process has ended; like [exec.Cmd.Wait], but may be
// called more than once and from several goroutines.
func (p *Process) Wait() error {
	p.waited.Do(func() { p.err = p.cmd.Wait() })
	return p.err
}

// Kill kills the process and waits for its end.
func (p *Process) Kill() error { return p.stop() }

// Signal sends a signal.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// stop kills the process if it runs, and reaps it.
func (p *Process) stop() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill process %d: %w", p.Pid(), err)
	}
	_ = p.Wait() // says "signal: killed"
	return nil
}
