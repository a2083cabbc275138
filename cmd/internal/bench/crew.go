package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// A role says what a worker is for and where it lives: in which pod, and whether in the
// pod's cgroup or outside it. Nothing else differs between plain and
// accelerated workers.
type role struct {
	side        side
	pod         podName
	accelerated bool
}

type (
	side    string
	podName string
)

const (
	clientSide side = "client"
	serverSide side = "server"

	clientPod podName = "client"
	serverPod podName = "server"
)

func (r role) String() string {
	kind := "plain"
	if r.accelerated {
		kind = "accelerated"
	}
	return fmt.Sprintf("%s in pod %s (%s)", r.side, r.pod, kind)
}

// A remote is a worker process seen from the bench.
type remote struct {
	role   role
	orders *json.Encoder
	in     io.Closer
	out    replies
	reply  *json.Decoder
	wait   func() error
	stamp  func(*order) // completes an order with what only the site knows; may be nil
}

// replies is where a worker's replies come from.
type replies interface {
	io.Closer
	SetReadDeadline(time.Time) error
}

// newRemote starts a worker by start, which gets the command with its streams set.
func newRemote(r role, cmd *exec.Cmd, start func(*exec.Cmd) (wait func() error, err error)) (*remote, error) {
	ordersRead, ordersWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start a worker: %w", err)
	}
	defer ordersRead.Close()
	replyRead, replyWrite, err := os.Pipe()
	if err != nil {
		ordersWrite.Close()
		return nil, fmt.Errorf("start a worker: %w", err)
	}
	defer replyWrite.Close()
	cmd.Stdin, cmd.Stdout = ordersRead, replyWrite
	wait, err := start(cmd)
	if err != nil {
		ordersWrite.Close()
		replyRead.Close()
		return nil, err
	}
	return &remote{
		role: r, orders: json.NewEncoder(ordersWrite), in: ordersWrite,
		out: replyRead, reply: json.NewDecoder(replyRead), wait: wait,
	}, nil
}

func (r *remote) send(o order) error {
	if r.stamp != nil {
		r.stamp(&o)
	}
	err := r.orders.Encode(o)
	if errors.Is(err, unix.EPIPE) {
		return fmt.Errorf("worker %s ended: %w", r.role, errors.Join(r.wait(), errors.New("it takes no orders")))
	}
	if err != nil {
		return fmt.Errorf("worker %s: %w", r.role, err)
	}
	return nil
}

// receive waits for a reply until ctx is done.
func (r *remote) receive(ctx context.Context) (reply, error) {
	stop := context.AfterFunc(ctx, func() { _ = r.out.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var answer reply
	switch err := r.reply.Decode(&answer); {
	case ctx.Err() != nil:
		return reply{}, fmt.Errorf("worker %s: no reply: %w", r.role, context.Cause(ctx))
	case errors.Is(err, io.EOF):
		return reply{}, fmt.Errorf("worker %s ended: %w", r.role, errors.Join(r.wait(), errEnded))
	case err != nil:
		return reply{}, fmt.Errorf("worker %s: %w", r.role, err)
	case answer.Error != "":
		return reply{}, fmt.Errorf("worker %s: %s", r.role, answer.Error)
	}
	return answer, nil
}

// errEnded is returned for a worker that ended where a reply was expected.
var errEnded = errors.New("no reply")

// endTimeout is how long to wait for the end of a worker that may have ended.
const endTimeout = 3 * time.Second

// ended returns an error if the worker has ended, or ends now. It gets no more orders
// after that.
func (r *remote) ended(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	if _, err := r.receive(ctx); errors.Is(err, errEnded) {
		return err
	}
	return nil
}

// close tells the worker to end; its pod waits for it.
func (r *remote) close() error { return errors.Join(r.in.Close(), r.out.Close()) }

// A measured is what both sides of one run did.
type measured struct{ client, server tally }

// payload is the application's bytes, both directions, warm-up included.
func (m measured) payload() uint64 { return m.client.Sent + m.server.Sent }

// byTCP is how many of them went by TCP. Where only some connections were asked, it
// is scaled up.
func (m measured) byTCP() uint64 { return scale(m.client) + scale(m.server) }

func scale(t tally) uint64 {
	if t.Asked == 0 || t.Asked == t.Sent {
		return t.TCPSent
	}
	return uint64(float64(t.TCPSent) * float64(t.Sent) / float64(t.Asked))
}

// rate is transactions or bytes per second.
func (m measured) rate(test Test) float64 {
	n := m.client.Transactions
	if test == Stream {
		n = m.server.Read
	}
	if elapsed := m.elapsed(test); elapsed > 0 {
		return float64(n) / elapsed.Seconds()
	}
	return 0
}

// cpu is the CPU time of both sides in their windows. Interrupts of a CPU that they
// share are counted once.
func (m measured) cpu(p Placement) time.Duration {
	ns := m.client.CPU.Thread + m.server.CPU.Thread + m.client.CPU.Interrupts
	if p == CrossCPU {
		ns += m.server.CPU.Interrupts
	}
	return time.Duration(ns)
}

// moved is the payload bytes of what makes the rate.
func (m measured) moved(p Point) uint64 {
	if p.Test == Stream {
		return m.server.Read
	}
	return m.client.Transactions * uint64(p.RequestBytes+p.ResponseBytes)
}

// elapsed is the time in which what makes the rate was counted.
func (m measured) elapsed(test Test) time.Duration {
	if test == Stream {
		return time.Duration(m.server.Elapsed)
	}
	return time.Duration(m.client.Elapsed)
}

// A placed is a CPU for each side.
type placed struct{ client, server int }

// runTimeout is how long a run may take longer than it was told to.
const runTimeout = 10 * time.Second

// run lets two workers do one run of a point; the order says which.
func run(ctx context.Context, client, server *remote, o order, cpus placed, target endpoint) (m measured, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.WarmUp+o.Length+runTimeout, errors.New("the run does not end"))
	defer cancel()
	o.Verb, o.CPU, o.At = listen, cpus.server, target.any()
	if err := server.send(o); err != nil {
		return m, err
	}
	listening, err := server.receive(ctx)
	if err != nil {
		return m, err
	}
	o.Verb = serve
	if err := server.send(o); err != nil {
		return m, err
	}
	o.Verb, o.CPU, o.At = drive, cpus.client, target.withPort(listening.Port)
	if err := client.send(o); err != nil {
		return m, err
	}
	driven, err := client.receive(ctx)
	if err != nil {
		// Where a server is killed, its client is the first to say that something is wrong.
		return m, errors.Join(server.ended(ctx), err)
	}
	if err := server.send(order{Verb: stop}); err != nil {
		return m, err
	}
	served, err := server.receive(ctx)
	return measured{driven.Tally, served.Tally}, err
}
