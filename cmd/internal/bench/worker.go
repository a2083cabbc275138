package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// An order is what the bench asks of a worker process, one JSON object each on its
// standard input. A worker answers every order but stop with a reply.
type order struct {
	Verb        verb          `json:"verb"`
	Point       Point         `json:"point"`
	NonBlocking bool          `json:"non_blocking"`
	Congestion  string        `json:"tcp_congestion_control,omitempty"` // empty: the default
	Verify      bool          `json:"verify"`
	WarmUp      time.Duration `json:"warm_up_ns"`
	Length      time.Duration `json:"length_ns"`
	CPU         int           `json:"cpu"`
	At          endpoint      `json:"at"`             // where to listen, or the server to drive
	Port        uint16        `json:"port,omitempty"` // listen with an inherited listener: its port
	// Interrupts: their time is to be taken from /proc/stat; see interruptsApart.
	Interrupts bool `json:"interrupts"`
	// Token is what a client's connections begin with where strangers can reach the
	// server; empty: nothing.
	Token string `json:"token,omitempty"`
	// Inherited is the descriptor of a listener that the worker was born with; 0:
	// it opens its own.
	Inherited int `json:"inherited,omitempty"`
}

type verb string

const (
	listen verb = "listen" // open a listener; the reply has its port
	serve  verb = "serve"  // serve until stop, then reply with a tally
	stop   verb = "stop"
	drive  verb = "drive" // run the client, then reply with a tally
)

type reply struct {
	Port  uint16 `json:"port,omitempty"`
	Tally tally  `json:"tally"`
	Error string `json:"error,omitempty"`
}

// workerEnv is what the environment of a worker needs; see socket. The second and
// third scheduler slots are for the orders and the timer of a stream.
func workerEnv(env []string) []string {
	return append(env[:len(env):len(env)], "GOGC=off", "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=3")
}

// selfWorker is a worker as the hidden command of the running program.
func selfWorker(env []string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "bench", workerCommand)
	cmd.Env = env
	return cmd
}

const workerCommand = "worker"

// runWorker is a worker process: it serves orders until its input ends.
func runWorker(in io.Reader, out, stderr io.Writer) int {
	w := &worker{out: json.NewEncoder(out)}
	orders := json.NewDecoder(in)
	for {
		var o order
		err := orders.Decode(&o)
		if errors.Is(err, io.EOF) {
			return 0
		}
		if err == nil {
			err = w.obey(o)
		}
		if err != nil {
			fmt.Fprintln(stderr, "bench worker:", err)
			return 1
		}
	}
}

type worker struct {
	out      *json.Encoder
	listener *socket
	at       endpoint     // of the listener
	busy     chan error   // of the generator that runs, if any
	stopping *atomic.Bool // set: accept no more from an inherited listener
}

func (w *worker) obey(o order) error {
	switch o.Verb {
	case listen:
		if o.Inherited != 0 {
			w.listener = &socket{fd: o.Inherited, nonBlocking: true}
			w.stopping = new(atomic.Bool)
			return w.reply(reply{}, nil)
		}
		port, err := w.listen(o)
		return w.reply(reply{Port: port}, err)
	case serve:
		// Taken now: a stop that follows at once forgets them before the generator runs.
		listener, stopping := w.listener, w.stopping
		if listener == nil {
			return errors.New("serve: nothing listens")
		}
		if stopping != nil {
			return w.start(o, func(g *generator) error { return g.admit(listener, stopping) })
		}
		return w.start(o, func(g *generator) error { return g.server(listener) })
	case drive:
		return w.start(o, func(g *generator) error { return g.client(o.At) })
	case stop:
		if w.listener == nil {
			return errors.New("stop: nothing listens")
		}
		if w.stopping != nil { // the listener lives on
			w.stopping.Store(true)
			w.listener, w.stopping = nil, nil
			return <-w.busy
		}
		removed := w.at.remove() // before the reply
		// Wakes accept, which cannot be interrupted otherwise.
		if err := unix.Shutdown(w.listener.fd, unix.SHUT_RD); err != nil {
			return fmt.Errorf("stop: %w", err)
		}
		err := <-w.busy
		w.listener.close()
		w.listener = nil
		return errors.Join(err, removed)
	}
	return fmt.Errorf("unknown order %q", o.Verb)
}

func (w *worker) reply(r reply, err error) error {
	if err != nil {
		r.Error = err.Error()
	}
	return w.out.Encode(r)
}

func (w *worker) listen(o order) (uint16, error) {
	s, err := newSocket(o.At.domain(), o.NonBlocking)
	if err != nil {
		return 0, err
	}
	if err := o.At.remove(); err != nil { // of a run that was broken off
		return 0, err
	}
	if o.Point.NoDelay { // accepted sockets inherit it
		err = s.setNoDelay()
	}
	if err == nil {
		err = s.setCongestionControl(o.Congestion)
	}
	var port uint16
	if err == nil {
		port, err = s.listen(o.At)
	}
	if err != nil {
		s.close()
		return 0, err
	}
	w.listener, w.at = s, o.At
	return port, nil
}

// start runs a generator on a thread of its own, pinned to the order's CPU, and
// replies when it has ended.
func (w *worker) start(o order, run func(*generator) error) error {
	runtime.GC() // it does not run by itself; see workerEnv
	opened := make(chan window, 1)
	g := &generator{
		point: o.Point, nonBlocking: o.NonBlocking, congestion: o.Congestion, verify: o.Verify, warmUp: o.WarmUp, length: o.Length,
		token: []byte(o.Token), opened: opened, base: time.Now(),
	}
	busy := make(chan error, 1)
	w.busy = busy
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its affinity
		done, cpu := make(chan struct{}), make(chan cpuTime, 1)
		go sampleCPU(unix.Gettid(), o, g.base, opened, done, cpu)
		err := pin(o.CPU)
		if err == nil {
			err = run(g)
		}
		close(done)
		g.tally.CPU = <-cpu
		if g.tally.Latency != nil {
			g.tally.Latency.trim()
		}
		busy <- w.reply(reply{Tally: g.tally}, err)
	}()
	return nil
}

func pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", cpu, err)
	}
	return nil
}
