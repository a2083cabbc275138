package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"
)

// ports are where a server listens: one that is accelerated, one that is not.
type ports struct{ accelerated, plain uint16 }

func (p *ports) register(cmd *cobra.Command) {
	cmd.Flags().Uint16Var(&p.accelerated, "port", DefaultPort, "the `PORT` that is accelerated")
	cmd.Flags().Uint16Var(&p.plain, "plain-port", DefaultPlainPort, "the `PORT` that is not, by the pod's annotation skipstack/exclude-ports")
}

func (p ports) check() error {
	switch {
	case p.accelerated == 0 || p.plain == 0:
		return errors.New("--port and --plain-port are from 1 to 65535")
	case p.accelerated == p.plain:
		return fmt.Errorf("--port and --plain-port are both %d: the two kinds of run need one each", p.plain)
	}
	return nil
}

// serveOptions are what the command line of `bench serve` asks for.
type serveOptions struct {
	ports
	once bool
	wait time.Duration
}

func newServeCommand(c Config) *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Be the server of `bench client`, in a pod",
		Long: `Be the server of 'skipstack bench client', in a pod of the same node.

It needs no privileges. It listens on two ports, of which the pod's annotation
skipstack/exclude-ports has to name one, so that the same two pods have
accelerated and plain connections.

It serves one client at a time, of any kind: whoever can reach the ports can make
it use one CPU. Sessions, runs and messages are bounded, and what does not speak
its protocol is hung up on.

Exit codes: 0 done, 1 failed, or no client came in time, 2 wrong usage.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return &ExitError{ExitUsage, err}
			}
			s := &server{log: c.ErrOut, options: o, command: func() *exec.Cmd { return selfWorker(c.Env) }}
			if err := s.run(cmd.Context()); err != nil {
				return &ExitError{ExitNotProven, err}
			}
			return nil
		},
	}
	o.register(cmd)
	cmd.Flags().BoolVar(&o.once, "once", false, "end after the first client's session")
	cmd.Flags().DurationVar(&o.wait, "wait", 0, "end if no client has begun a session in this time; 0 is to wait for ever")
	return cmd
}

func (o *serveOptions) check() error {
	if o.wait < 0 {
		return fmt.Errorf("--wait %v is negative", o.wait)
	}
	return o.ports.check()
}

// A server serves one client after the other.
type server struct {
	log     io.Writer
	options serveOptions
	command func() *exec.Cmd // of a worker
	// listening gets the ports when they are open; may be nil.
	listening chan<- ports

	cpus     []int
	doors    [2]*door // accelerated, plain
	greeters chan struct{}
	session  chan struct{} // holds one value while there is none
	begun    chan struct{} // gets a value with each session; has room for one
	ended    chan struct{} // gets a value with each session that measured something
	group    sync.WaitGroup
}

// run serves until ctx is done, or until its options say so.
func (s *server) run(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer s.group.Wait() // no door is left to add to it by then
	defer cancel()
	if s.cpus, err = allowedCPUs(); err != nil {
		return err
	}
	s.greeters = make(chan struct{}, maxGreeters)
	s.session, s.begun, s.ended = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{}, 1)
	s.session <- struct{}{}
	for i, port := range []*uint16{&s.options.accelerated, &s.options.plain} {
		if s.doors[i], *port, err = newDoor(ctx, *port, func(c *net.TCPConn) { s.greet(ctx, c) }); err != nil {
			return err
		}
		defer s.doors[i].remove()
	}
	for _, d := range s.doors {
		if err := d.open(); err != nil {
			return err
		}
	}
	if s.listening != nil {
		s.listening <- s.options.ports
	}
	fmt.Fprintf(s.log, "bench: listening on ports %d and %d; %d has to be plain: annotate the pod with skipstack/exclude-ports: %q\n",
		s.options.accelerated, s.options.plain, s.options.plain, strconv.Itoa(int(s.options.plain)))
	var late <-chan time.Time
	if s.options.wait > 0 {
		timer := time.NewTimer(s.options.wait)
		defer timer.Stop()
		late = timer.C
	}
	for {
		select {
		case <-ctx.Done():
			if s.options.once {
				return errors.New("interrupted before a client's session was over")
			}
			return nil
		case <-late:
			return fmt.Errorf("no client came in %v", s.options.wait)
		case <-s.begun:
			late = nil
		case <-s.ended:
			if s.options.once {
				return nil
			}
		}
	}
}

// greet finds out what a connection is, and serves its session.
func (s *server) greet(ctx context.Context, c *net.TCPConn) {
	select {
	case s.greeters <- struct{}{}:
	default: // too many at once
		c.Close()
		return
	}
	s.group.Go(func() {
		defer c.Close()
		stop := context.AfterFunc(ctx, func() { c.Close() })
		defer stop()
		r := bufio.NewReaderSize(c, maxLine)
		var hello greeting
		_ = c.SetDeadline(time.Now().Add(greetingTimeout))
		err := readLine(r, &hello)
		<-s.greeters
		switch {
		case err != nil:
			return // a stranger, or a connection of a run that is over
		case hello.Protocol != protocol:
			_ = writeLine(c, greeting{Protocol: protocol, Error: fmt.Sprintf("the server speaks version %d of the protocol, the client %d: use one build of skipstack", protocol, hello.Protocol)})
			return
		}
		select {
		case <-s.session:
		default:
			_ = writeLine(c, greeting{Protocol: protocol, Error: "the server has a client", Busy: true})
			return
		}
		defer func() { s.session <- struct{}{} }()
		s.notify(s.begun)
		fmt.Fprintf(s.log, "bench: client %s: its session begins\n", c.RemoteAddr())
		runs, err := s.serve(ctx, c, r)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			fmt.Fprintf(s.log, "bench: client %s: after %d runs: %v\n", c.RemoteAddr(), runs, err)
		default:
			fmt.Fprintf(s.log, "bench: client %s: %d runs, done\n", c.RemoteAddr(), runs)
		}
		if runs > 0 && err == nil {
			s.notify(s.ended)
		}
	})
}

// notify never waits: a value that is there says the same.
func (s *server) notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// serve serves a session to its end and returns the number of runs.
func (s *server) serve(ctx context.Context, c *net.TCPConn, r *bufio.Reader) (runs int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, maxSession, fmt.Errorf("a session of more than %v", maxSession))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	welcome := greeting{Protocol: protocol, CPUs: s.cpus, Token: newToken()}
	if local, ok := netip.AddrFromSlice(c.LocalAddr().(*net.TCPAddr).IP); ok {
		welcome.Address = local.Unmap()
	}
	if welcome.BootID, err = bootID(); err != nil {
		return 0, errors.Join(err, writeLine(c, greeting{Protocol: protocol, Error: err.Error()}))
	}
	w, kill, err := s.worker()
	if err != nil {
		return 0, errors.Join(err, writeLine(c, greeting{Protocol: protocol, Error: err.Error()}))
	}
	defer kill()
	if err := writeLine(c, welcome); err != nil {
		return 0, err
	}
	for {
		var o order
		_ = c.SetDeadline(time.Now().Add(orderTimeout))
		switch err := readLine(r, &o); {
		case errors.Is(err, io.EOF):
			return runs, nil
		case ctx.Err() != nil:
			return runs, context.Cause(ctx)
		case err != nil:
			return runs, err
		}
		if err := s.serveRun(ctx, c, r, w, o, welcome.Token); err != nil {
			if ctx.Err() == nil {
				_ = writeLine(c, reply{Error: err.Error()})
			}
			return runs, err
		}
		runs++
	}
}

// worker starts the process that serves a session's runs. It has the listeners.
func (s *server) worker() (w *remote, kill func(), err error) {
	cmd := s.command()
	cmd.Env = workerEnv(cmd.Env)
	cmd.Stderr = s.log
	for _, d := range s.doors {
		cmd.ExtraFiles = append(cmd.ExtraFiles, d.file)
	}
	w, err = newRemote(role{serverSide, serverPod, true}, cmd, func(cmd *exec.Cmd) (func() error, error) { return cmd.Wait, cmd.Start() })
	if err != nil {
		return nil, nil, err
	}
	return w, func() {
		_ = w.close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}, nil
}

// serveRun serves one run: it is told to listen, to serve and to stop.
func (s *server) serveRun(ctx context.Context, c *net.TCPConn, r *bufio.Reader, w *remote, o order, token string) error {
	clean, err := checkOrder(o, s.cpus)
	if err != nil {
		return err
	}
	i := 0
	switch o.Port {
	case s.options.accelerated:
	case s.options.plain:
		i = 1
	default:
		return fmt.Errorf("port %d: the server has %d and %d", o.Port, s.options.accelerated, s.options.plain)
	}
	// The worker accepts at this port for the time of the run.
	if err := s.doors[i].close(); err != nil {
		return err
	}
	defer func() {
		if err := s.doors[i].open(); err != nil {
			fmt.Fprintln(s.log, "bench:", err)
		}
	}()
	const firstFD = 3 // of the worker's inherited files
	clean.Token, clean.Inherited = token, firstFD+i
	if err := w.send(clean); err != nil {
		return err
	}
	if _, err := w.receive(ctx); err != nil {
		return err
	}
	if err := writeLine(c, reply{Port: o.Port}); err != nil {
		return err
	}
	limit, cancel := context.WithTimeoutCause(ctx, clean.WarmUp+clean.Length+runTimeout, errors.New("the run does not end"))
	defer cancel()
	for _, verb := range []verb{serve, stop} {
		if deadline, ok := limit.Deadline(); ok {
			_ = c.SetDeadline(deadline)
		}
		var next order
		if err := readLine(r, &next); err != nil {
			return err
		}
		if next.Verb != verb {
			return fmt.Errorf("order %q, want %q", next.Verb, verb)
		}
		clean.Verb = verb
		if err := w.send(clean); err != nil {
			return err
		}
	}
	served, err := w.receive(limit)
	if err != nil {
		return err
	}
	return writeLine(c, served)
}
