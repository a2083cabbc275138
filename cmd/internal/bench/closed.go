package bench

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// untilClosed returns a context that also ends when nobody reads the standard output
// or error any more, and a configuration whose writers notice that. Processes get the
// streams of the original, as these are files.
//
// SIGPIPE, which would end the process before it has cleaned up, is taken until the
// process ends, so that its last words cannot change its exit code.
func untilClosed(ctx context.Context, c Config) (context.Context, Config, context.CancelFunc) {
	// Ignoring it instead would be inherited by the CNI plugins.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	ctx, cancel := context.WithCancel(ctx)
	c.Out, c.ErrOut = &pipeWriter{c.Out, cancel}, &pipeWriter{c.ErrOut, cancel}
	return ctx, c, cancel
}

// A pipeWriter calls closed when a write finds that nobody reads.
type pipeWriter struct {
	io.Writer
	closed func()
}

func (w *pipeWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	if errors.Is(err, unix.EPIPE) {
		w.closed()
	}
	return n, err
}
