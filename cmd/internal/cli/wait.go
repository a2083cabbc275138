package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

const (
	// waitPoll is how often enrolled sockets are counted: some thousand map entries.
	waitPoll = 500 * time.Millisecond
	// waitReport is how often progress is printed.
	waitReport = 5 * time.Second
)

// leftOpen is the error of a wait that has reached its deadline.
type leftOpen struct {
	sockets uint64
	timeout time.Duration
}

func (e *leftOpen) Error() string {
	return fmt.Sprintf("%s still open after %v: they go on by TCP; run it again, with a longer --timeout, or restart the pods", plural(e.sockets, "enrolled socket"), e.timeout)
}

// wait waits until no enrolled sockets are left, for timeout at the most unless that
// is 0. Progress goes to standard error.
func (c *cli) wait(ctx context.Context, timeout time.Duration, left func() (uint64, error)) error {
	waiting := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		waiting, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	start, reported, said := time.Now(), time.Time{}, uint64(0)
	for {
		sockets, err := left()
		if err != nil {
			return fmt.Errorf("count enrolled sockets: %w", err)
		}
		if sockets == 0 {
			return nil
		}
		if time.Since(reported) >= waitReport && sockets != said {
			fmt.Fprintf(c.streams.Err, "Enrolled sockets left: %d (after %v)\n", sockets, time.Since(start).Round(time.Second))
			reported, said = time.Now(), sockets
		}
		select {
		case <-time.After(waitPoll):
		case <-waiting.Done():
			if ctx.Err() != nil {
				return fmt.Errorf("interrupted with %s left: %w", plural(sockets, "enrolled socket"), ctx.Err())
			}
			return &leftOpen{sockets, timeout}
		}
	}
}

// checkTimeout refuses a --timeout that nobody can mean.
func checkTimeout(timeout time.Duration) error {
	if timeout < 0 {
		return fmt.Errorf("--timeout %v is negative; %w", timeout, errUsage)
	}
	return nil
}

// needs refuses a flag that has no effect without another one.
func needs(cmd *cobra.Command, flag, other string) error {
	if cmd.Flags().Changed(flag) && !cmd.Flags().Changed(other) {
		return fmt.Errorf("--%s is of no use without --%s; %w", flag, other, errUsage)
	}
	return nil
}
