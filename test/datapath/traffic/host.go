package traffic

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/node"
)

// WorkerName is what [Worker] is registered as in node.MainOptions.
const WorkerName = "traffic"

// request asks the worker for a socket, or, with a descriptor attached, to keep
// that descriptor open.
type request struct{ Domain, Type, Protocol int }

type reply struct{ Errno unix.Errno }

// controlFD is the worker's end of the socket pair.
const controlFD = 3

// Worker opens sockets on request until its control socket is closed.
func Worker([]string) int {
	for {
		var r request
		fd, err := receive(controlFD, &r)
		if err != nil {
			return 0 // the test is over
		}
		var answer reply
		if fd >= 0 { // kept open until the process ends
			fd = -1
		} else if fd, err = unix.Socket(r.Domain, r.Type|unix.SOCK_CLOEXEC, r.Protocol); err != nil {
			fd = -1
			if !errors.As(err, &answer.Errno) {
				return 1
			}
		}
		if err := send(controlFD, answer, fd); err != nil {
			return 1
		}
		// What the test closes must be closed: it goes on when this process has no
		// descriptor of the socket any more.
		if fd >= 0 {
			unix.Close(fd)
			if err := send(controlFD, reply{}, -1); err != nil {
				return 1
			}
		}
	}
}

// A Host is a process in a pod that opens sockets for the test.
type Host struct {
	mu      sync.Mutex // one request at a time
	control *os.File
	process *node.Process
}

// NewHost starts a host in the pod. The pod's end is its end.
func NewHost(p *node.Pod, o node.StartOptions) (*Host, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start a traffic host: %w", err)
	}
	far := os.NewFile(uintptr(pair[1]), "control")
	defer far.Close()
	h := &Host{control: os.NewFile(uintptr(pair[0]), "control")}
	cmd := node.WorkerCommand(WorkerName)
	cmd.ExtraFiles = []*os.File{far}
	if h.process, err = p.Start(cmd, o); err != nil {
		h.control.Close()
		return nil, err
	}
	return h, nil
}

// Close ends the host. Sockets that it handed over stay open.
func (h *Host) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return errors.Join(h.control.Close(), h.process.Wait())
}

// Pid is the process id of the host.
func (h *Host) Pid() int { return h.process.Pid() }

// Kill kills the host with SIGKILL.
func (h *Host) Kill() error { return h.process.Kill() }

// Socket opens a socket in the pod; arguments and errors are those of socket(2).
// The caller closes it.
func (h *Host) Socket(domain, typ, protocol int) (int, error) {
	fd, err := h.call(request{domain, typ, protocol}, -1)
	if err != nil {
		return -1, fmt.Errorf("open a socket in the pod: %w", err)
	}
	return fd, nil
}

// Hold gives the host a descriptor of the same socket, which it keeps open until
// it ends.
func (h *Host) Hold(c *Conn) error {
	if _, err := h.call(request{}, c.FD); err != nil {
		return fmt.Errorf("hand a socket to the host: %w", err)
	}
	return nil
}

func (h *Host) call(r request, attach int) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	control := int(h.control.Fd())
	if err := send(control, r, attach); err != nil {
		return -1, err
	}
	var answer reply
	fd, err := receive(control, &answer)
	if err == nil && answer.Errno != 0 {
		err = answer.Errno
	}
	if err == nil && fd >= 0 {
		_, err = receive(control, &answer)
	}
	return fd, err
}

func send(to int, v any, attach int) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var rights []byte
	if attach >= 0 {
		rights = unix.UnixRights(attach)
	}
	return retry(func() error { return unix.Sendmsg(to, data, rights, nil, unix.MSG_NOSIGNAL) })
}

// receive decodes a message and returns the attached descriptor, -1 if there is none.
func receive(from int, v any) (fd int, err error) {
	data, rights := make([]byte, 512), make([]byte, unix.CmsgSpace(4))
	var n, oob int
	err = retry(func() (err error) {
		n, oob, _, _, err = unix.Recvmsg(from, data, rights, unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err != nil {
		return -1, err
	}
	if n == 0 {
		return -1, errors.New("the other side has gone")
	}
	fd = -1
	if oob > 0 {
		messages, err := unix.ParseSocketControlMessage(rights[:oob])
		if err != nil {
			return -1, err
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			return -1, err
		}
		fd = fds[0]
	}
	return fd, json.Unmarshal(data[:n], v)
}

// retry repeats f while a signal interrupts it.
func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
