package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A door is a listening port. This process accepts connections at it while it is open;
// while it is closed they wait for whoever else has the file.
type door struct {
	file   *os.File // the Go runtime does not poll it: its connections wake nobody
	accept func(*net.TCPConn)

	mu       sync.Mutex
	listener net.Listener // nil: closed
	done     chan struct{}
	removed  bool
}

// newDoor makes a door, closed, for IPv4 and IPv6, and returns its port; 0 is one of the
// kernel's choice. Remove the door after use.
func newDoor(ctx context.Context, port uint16, accept func(*net.TCPConn)) (*door, uint16, error) {
	// Listeners of MPTCP are not accelerated on every kernel.
	var conf net.ListenConfig
	conf.SetMultipathTCP(false)
	l, err := conf.Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(int(port))))
	if err != nil {
		return nil, 0, err
	}
	defer l.Close()
	port = uint16(l.Addr().(*net.TCPAddr).Port)
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	var file *os.File
	var dupErr error
	err = raw.Control(func(fd uintptr) {
		var dup int
		if dup, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); dupErr != nil {
			return
		}
		// What is not in non-blocking mode is not given to the runtime's poller.
		// open puts the socket back into it.
		if dupErr = unix.SetNonblock(dup, false); dupErr != nil {
			unix.Close(dup)
			return
		}
		file = os.NewFile(uintptr(dup), "listener")
	})
	if err = errors.Join(err, dupErr); err != nil {
		return nil, 0, fmt.Errorf("listen on port %d: %w", port, err)
	}
	return &door{file: file, accept: accept}, port, nil
}

// open does nothing if the door is open or has been removed.
func (d *door) open() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.listener != nil || d.removed {
		return nil
	}
	l, err := net.FileListener(d.file)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	d.listener, d.done = l, make(chan struct{})
	go d.acceptAll(l, d.done)
	return nil
}

// acceptPause keeps a server that cannot accept from trying all the time.
const acceptPause = 50 * time.Millisecond

func (d *door) acceptAll(l net.Listener, done chan<- struct{}) {
	defer close(done)
	for {
		c, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // of one connection, or no descriptors are left for now
			time.Sleep(acceptPause)
		default:
			d.accept(c.(*net.TCPConn))
		}
	}
}

// close returns when this process accepts no more.
func (d *door) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.listener == nil {
		return nil
	}
	err := d.listener.Close()
	<-d.done
	d.listener = nil
	return err
}

// remove closes the door for good.
func (d *door) remove() {
	_ = d.close()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.removed = true
	d.file.Close()
}
