package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"

	"github.com/skipstack/skipstack/test/node"
)

// A scene is where one run of a case takes place.
type scene struct {
	*lab
	ctx   context.Context
	list  *libcni.NetworkConfigList
	dir   string // for files; everybody may write there
	pods  map[string]*pod
	procs []*process
}

type pod struct {
	*node.Pod
	scene *scene
	ip    netip.Addr
	// What the interface had sent when the pod was new.
	bytes, packets uint64
}

// pod returns the pod of that name; a new one if there is none.
func (s *scene) pod(name string) (*pod, error) {
	if p := s.pods[name]; p != nil {
		return p, nil
	}
	made, err := s.node.AddPod(s.ctx, name, s.list, node.PodOptions{})
	if err != nil {
		return nil, err
	}
	p := &pod{Pod: made, scene: s}
	s.pods[name] = p
	p.ip, _ = p.Addr(false)
	p.bytes, p.packets, err = p.statistics()
	return p, err
}

// twoPods returns the pods that most cases need.
func (s *scene) twoPods() (client, server *pod, err error) {
	if client, err = s.pod("client"); err != nil {
		return nil, nil, err
	}
	server, err = s.pod("server")
	return client, server, err
}

func (p *pod) at(port int) string { return netip.AddrPortFrom(p.ip, uint16(port)).String() }

func (p *pod) statistics() (bytes, packets uint64, err error) {
	err = p.Do(func() error {
		link, err := netlink.LinkByName(node.IfName)
		if err != nil {
			return fmt.Errorf("read the statistics of %s: %w", node.IfName, err)
		}
		st := link.Attrs().Statistics
		bytes, packets = st.TxBytes, st.TxPackets
		return nil
	})
	return bytes, packets, err
}

// headers are those of Ethernet, IPv4 and TCP with timestamps.
const headers = 14 + 20 + 32

// sent is what the pod has sent over its interface without headers. Segments that
// are not cut yet count as one packet there.
func (p *pod) sent() (uint64, error) {
	bytes, packets, err := p.statistics()
	if n, h := bytes-p.bytes, headers*(packets-p.packets); err == nil && n > h {
		return n - h, nil
	}
	return 0, err
}

// A process runs in a pod; its output goes to a file.
type process struct {
	*node.Process
	name    string
	log     string // file
	err     error  // once done is closed
	done    chan struct{}
	stopped bool
}

// cmd makes the command that runs a program of the software, as it would be
// found by its name.
func (s *scene) cmd(name string, args ...string) (*exec.Cmd, error) {
	path, err := s.program(name)
	if err != nil {
		return nil, err
	}
	env, err := s.environ()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(env, "HOME="+s.dir)
	cmd.Dir = s.dir
	return cmd, nil
}

// spawn starts a command in the pod.
func (p *pod) spawn(name string, cmd *exec.Cmd) (*process, error) {
	s := p.scene
	proc := &process{
		name: name, done: make(chan struct{}),
		log: filepath.Join(s.dir, fmt.Sprintf("log-%02d", len(s.procs))),
	}
	log, err := os.Create(proc.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = log
	}
	cmd.Stderr = log
	if proc.Process, err = p.Start(cmd, node.StartOptions{}); err != nil {
		return nil, err
	}
	go func() {
		proc.err = proc.Wait()
		close(proc.done)
	}()
	s.procs = append(s.procs, proc)
	return proc, nil
}

// start starts a program of the software in the pod.
func (p *pod) start(name string, args ...string) (*process, error) {
	cmd, err := p.scene.cmd(name, args...)
	if err != nil {
		return nil, err
	}
	return p.spawn(name, cmd)
}

// startWorker starts one of this program's workers in the pod.
func (p *pod) startWorker(name string, args ...string) (*process, error) {
	return p.spawn(name, node.WorkerCommand(name, args...))
}

// finish waits for the end of a process.
func (s *scene) finish(proc *process) error {
	select {
	case <-proc.done:
	case <-s.ctx.Done():
		return fmt.Errorf("%s: %w", proc.name, s.ctx.Err())
	}
	if proc.err != nil {
		return fmt.Errorf("%s: %w", proc.name, proc.err)
	}
	proc.stopped = true
	return nil
}

// output runs a command in the pod to its end and returns what it printed.
func (p *pod) output(name string, cmd *exec.Cmd) (string, error) {
	out, err := os.Create(filepath.Join(p.scene.dir, fmt.Sprintf("out-%02d", len(p.scene.procs))))
	if err != nil {
		return "", err
	}
	defer out.Close()
	cmd.Stdout = out
	proc, err := p.spawn(name, cmd)
	if err != nil {
		return "", err
	}
	err = p.scene.finish(proc)
	text, readErr := os.ReadFile(out.Name())
	if err != nil {
		return string(text), fmt.Errorf("%w; it printed %q", err, tail(text, excerpt))
	}
	return string(text), readErr
}

// run runs a program of the software in the pod and returns what it printed.
func (p *pod) run(name string, args ...string) (string, error) {
	cmd, err := p.scene.cmd(name, args...)
	if err != nil {
		return "", err
	}
	return p.output(name, cmd)
}

// work runs one of this program's workers in the pod and returns what it printed.
func (p *pod) work(name string, args ...string) (string, error) {
	return p.output(name, node.WorkerCommand(name, args...))
}

// listens waits until somebody in the pod listens on the port.
func (p *pod) listens(port int) error {
	return p.scene.wait(fmt.Sprintf("pod %s listens on port %d", p.Name, port), func() (bool, error) {
		found := false
		err := p.Do(func() error {
			for _, file := range []string{"tcp", "tcp6"} {
				table, err := os.ReadFile("/proc/thread-self/net/" + file)
				if err != nil {
					return err
				}
				for line := range strings.Lines(string(table)) {
					const listen = "0A" // TCP_LISTEN, include/net/tcp_states.h
					f := strings.Fields(line)
					found = found || len(f) > 3 && f[3] == listen && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port))
				}
			}
			return nil
		})
		return found, err
	})
}

// wait waits until the condition holds. A process that ends with an error in the
// meantime ends the wait.
func (s *scene) wait(what string, condition func() (bool, error)) error {
	for {
		ok, err := condition()
		if err != nil {
			return fmt.Errorf("wait until %s: %w", what, err)
		}
		if ok {
			return nil
		}
		for _, proc := range s.procs {
			select {
			case <-proc.done:
				if proc.err != nil && !proc.stopped {
					return fmt.Errorf("wait until %s: %s: %w", what, proc.name, proc.err)
				}
			default:
			}
		}
		select {
		case <-s.ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, s.ctx.Err())
		case <-time.After(tick):
		}
	}
}

// printed waits until the process has printed a text so many times.
func (s *scene) printed(proc *process, text string, times int) error {
	return s.wait(fmt.Sprintf("%s has printed %q", proc.name, text), func() (bool, error) {
		log, err := os.ReadFile(proc.log)
		return bytes.Count(log, []byte(text)) >= times, err
	})
}

// file writes a file for the processes.
func (s *scene) file(name, content string) (string, error) {
	path := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, []byte(content), 0o644)
}

// stop ends all processes.
func (s *scene) stop() error {
	var errs []error
	for i := len(s.procs) - 1; i >= 0; i-- {
		s.procs[i].stopped = true
		errs = append(errs, s.procs[i].Kill())
	}
	for _, p := range s.pods {
		// Children that are nobody's any more.
		errs = append(errs, os.WriteFile(filepath.Join(p.Cgroup, "cgroup.kill"), []byte("1"), 0))
	}
	return errors.Join(errs...)
}

// close removes the pods and checks that they leave nothing behind.
func (s *scene) close() error {
	errs := []error{s.stop()}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, p := range s.pods {
		errs = append(errs, p.Close(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	left, err := s.node.Leftovers()
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("%w: %v", node.ErrLeftover, left)
	}
	return err
}

// logs is what the processes said, as an error.
func (s *scene) logs() error {
	var errs []error
	for _, proc := range s.procs {
		if text, err := os.ReadFile(proc.log); err == nil && len(text) > 0 {
			errs = append(errs, fmt.Errorf("%s said: %s", proc.name, tail(text, excerpt)))
		}
	}
	return errors.Join(errs...)
}

// excerpt is how many bytes of what a process said are shown.
const excerpt = 2000

func tail(text []byte, most int) []byte {
	return bytes.TrimSpace(text[max(0, len(text)-most):])
}
