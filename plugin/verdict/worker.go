package verdict

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// WorkerArg is the hidden first argument with which [Run] starts the running
// program again. The program then has to call [Worker] and exit with its result.
const WorkerArg = "probe-worker"

// request asks the worker for one experiment.
type request struct {
	Experiment string        `json:"experiment"`
	Within     time.Duration `json:"within"`
	// Settle is how long bytes that have arrived may take to be counted.
	Settle time.Duration `json:"settle"`
}

// reply is what came of it. The worker's first reply, to no request, says that
// its network is up.
type reply struct {
	Error   string  `json:"error,omitempty"` // why the experiment could not be made
	Finding finding `json:"finding"`
}

// finding is what an experiment saw. Which bytes were redirected only the
// datapath's counters know; those are the parent's.
type finding struct {
	Connections uint64 `json:"connections"`     // made
	Sent        uint64 `json:"sent"`            // bytes written by the application
	ByTCP       uint64 `json:"byTCP"`           // bytes that TCP carried, by TCP_INFO
	Fault       string `json:"fault,omitempty"` // what an application would have seen go wrong
	Counted     int    `json:"counted"`         // FIONREAD of Waiting bytes
	Waiting     int    `json:"waiting"`
	Charged     int    `json:"charged"`  // receiver's memory for Unread bytes
	Unread      int    `json:"unread"`   // bytes redirected and not read
	Accepted    int    `json:"accepted"` // bytes a sender got rid of while nobody read
	Stopped     bool   `json:"stopped"`  // the sender was stopped in the end
	Released    bool   `json:"released"` // the charge was given back when all was read
	Storage     uint64 `json:"storage"`  // memory charged to the sockets for storage
	Spliced     string `json:"spliced"`  // what calls that splice from the socket did
	// NotRefused are the calls that were not refused, whatever they did.
	NotRefused []string `json:"notRefused,omitempty"`
	NoRing     string   `json:"noRing,omitempty"` // why io_uring's splice was not tried
}

// workerLife ends a worker whatever happens.
const workerLife = time.Minute

// Worker makes experiments with sockets on the loopback interface of its network
// namespace, as requested on in, and reports on out. It returns the exit code,
// at the latest when in ends or after a fixed time, whatever the kernel does.
func Worker(args []string, in io.Reader, out io.Writer) int {
	if len(args) > 0 {
		fmt.Fprintf(os.Stderr, "%s takes no arguments\n", WorkerArg)
		return 2
	}
	return serve(in, out, experiments)
}

func serve(in io.Reader, out io.Writer, table map[string]experiment) int {
	requests := make(chan request)
	go func() {
		defer close(requests)
		for d := json.NewDecoder(in); ; {
			var r request
			if d.Decode(&r) != nil {
				return
			}
			requests <- r
		}
	}()
	replies := make(chan reply)
	respond := func(do func() (finding, error)) {
		found, err := do()
		r := reply{Finding: found}
		if err != nil {
			r.Error = err.Error()
		}
		replies <- r
	}
	life := time.NewTimer(workerLife)
	defer life.Stop()
	e := json.NewEncoder(out)
	go respond(func() (finding, error) { return finding{}, loopbackUp() })
	for {
		select {
		case r, ok := <-requests:
			if !ok {
				return 0
			}
			f, ok := table[r.Experiment]
			if !ok {
				f = func(lab) (finding, error) { return finding{}, fmt.Errorf("no experiment %q", r.Experiment) }
			}
			go respond(func() (finding, error) {
				return f(lab{deadline: time.Now().Add(r.Within), settle: r.Settle})
			})
		case r := <-replies:
			if e.Encode(r) != nil {
				return 1
			}
		case <-life.C:
			return 1
		}
	}
}

// loopbackUp brings up lo in the process's network namespace.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// worker is the parent's side.
type worker struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	replies chan reply // closed when the worker's output ends
	stderr  *limited
	ended   chan struct{}
}

// startWorker starts exe in the cgroup and in a new network namespace. The
// goroutine is locked to its thread and must stay so while the worker lives: the
// parent-death signal comes when that thread ends.
func startWorker(exe string, args []string, cgroup *os.File) (*worker, error) {
	w := &worker{
		cmd:     exec.Command(exe, args...),
		replies: make(chan reply, 1),
		stderr:  &limited{},
		ended:   make(chan struct{}),
	}
	w.cmd.Env = []string{} // not the caller's: CNI_COMMAND would make a plugin of it
	w.cmd.Dir = "/"
	w.cmd.Stderr = w.stderr
	w.cmd.WaitDelay = 100 * time.Millisecond
	w.cmd.SysProcAttr = &syscall.SysProcAttr{
		// Sockets belong to the cgroup that their process was in.
		UseCgroupFD: true,
		CgroupFD:    int(cgroup.Fd()),
		Cloneflags:  syscall.CLONE_NEWNET,
		Pdeathsig:   syscall.SIGKILL,
		Setpgid:     true, // a terminal's signals are the caller's to handle
	}
	in, err := w.cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start the probes' worker: %w", err)
	}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the probes' worker: %w", err), in.Close())
	}
	w.in = in
	if err := w.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the probes' worker: %w", err)
	}
	go func() {
		for d := json.NewDecoder(out); ; {
			var r reply
			if d.Decode(&r) != nil {
				break
			}
			w.replies <- r
		}
		close(w.replies)
		_ = w.cmd.Wait()
		close(w.ended)
	}()
	return w, nil
}

// kill ends the worker and waits for its end no longer than that.
func (w *worker) kill(within time.Duration) error {
	_ = w.cmd.Process.Kill() // says only that it has ended already
	_ = w.in.Close()
	go func() {
		for range w.replies { // nobody else reads them now
		}
	}()
	end := time.NewTimer(within)
	defer end.Stop()
	select {
	case <-w.ended:
		return nil
	case <-end.C:
		return fmt.Errorf("the probes' worker (process %d) does not end", w.cmd.Process.Pid)
	}
}

// lastWords is what the worker said when it failed, or how it ended.
func (w *worker) lastWords() string {
	select {
	case <-w.ended:
	case <-time.After(grace):
		return "closed its output"
	}
	if line := w.stderr.firstLine(); line != "" {
		return line
	}
	return w.cmd.ProcessState.String()
}

// limited keeps the beginning of what is written to it.
type limited struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *limited) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf.Write(p[:min(len(p), max(0, 4096-l.buf.Len()))])
	return len(p), nil
}

func (l *limited) firstLine() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	line, _, _ := bytes.Cut(l.buf.Bytes(), []byte("\n"))
	return string(line)
}
