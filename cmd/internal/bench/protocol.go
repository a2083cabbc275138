package bench

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/skipstack/skipstack/plugin/attachment"
)

// A client and a server in pods of the user talk JSON, one object on a line, over a
// connection to the server's plain port: the client's greeting, the server's, then the
// orders that [run] sends to a worker, and their replies. The connections that are
// measured begin with the session's token.

// protocol is the version of what they say.
const protocol = 1

// The server's bounds: it serves whoever reaches it.
const (
	maxLine         = 4 << 10 // bytes of a greeting or an order
	maxGreeters     = 16      // connections that have not said who they are
	greetingTimeout = 5 * time.Second
	orderTimeout    = time.Minute // between two orders
	maxSession      = 15 * time.Minute
	maxMessage      = 1 << 20 // bytes
	maxRun          = 10 * time.Second
	maxWarmUp       = time.Second
)

// DefaultPort and DefaultPlainPort are where a server listens unless told otherwise.
const (
	DefaultPort      = 7411
	DefaultPlainPort = 7412
)

// greeting opens a session.
type greeting struct {
	Protocol int    `json:"skipstack_bench"`
	Error    string `json:"error,omitempty"` // the server's: there will be no session
	Busy     bool   `json:"busy,omitempty"`  // try again

	// The server's.
	BootID  string     `json:"boot_id,omitempty"`
	CPUs    []int      `json:"cpus,omitempty"`   // that it may use
	Address netip.Addr `json:"address,omitzero"` // that the connection arrived at
	Token   string     `json:"token,omitempty"`
}

// writeLine writes v as one line.
func writeLine(w interface{ Write([]byte) (int, error) }, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// readLine reads one line into v. The reader's buffer bounds its length.
func readLine(r *bufio.Reader, v any) error {
	line, err := r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return fmt.Errorf("a line of more than %d bytes", maxLine)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(line, v)
}

// bootID identifies the running kernel, and so the node: pods see the node's.
func bootID() (string, error) {
	id, err := attachment.BootID()
	if err != nil {
		return "", fmt.Errorf("tell which node this is: %w", err)
	}
	return id, nil
}

// checkOrder returns what a server passes on to its worker of a client's order, for
// listen; what the worker must not be told by a stranger is not in it.
func checkOrder(o order, cpus []int) (order, error) {
	clean := order{
		Verb: listen, NonBlocking: true, Verify: o.Verify, WarmUp: o.WarmUp, Length: o.Length, CPU: o.CPU,
		Point: Point{
			Test: o.Point.Test, RequestBytes: o.Point.RequestBytes, ResponseBytes: o.Point.ResponseBytes,
			NoDelay: o.Point.NoDelay, Connections: o.Point.Connections,
		},
	}
	p := clean.Point
	least := 1
	if p.Test == ConnectRequestResponse {
		least = tokenBytes
	}
	switch {
	case o.Verb != listen:
		return clean, fmt.Errorf("order %q, want %q", o.Verb, listen)
	case !slices.Contains(cpus, o.CPU):
		return clean, fmt.Errorf("CPU %d may not be used", o.CPU)
	case o.WarmUp < 0 || o.WarmUp > maxWarmUp || o.Length <= 0 || o.Length > maxRun:
		return clean, fmt.Errorf("a run of %v after %v is too long", o.Length, o.WarmUp)
	case p.Connections != 1:
		return clean, fmt.Errorf("%d connections at a time", p.Connections)
	case o.Verify:
		return clean, nil
	case p.Test != Stream && p.Test != RequestResponse && p.Test != ConnectRequestResponse:
		return clean, fmt.Errorf("unknown test %q", p.Test)
	case p.RequestBytes < least || p.RequestBytes > maxMessage:
		return clean, fmt.Errorf("requests of %d bytes", p.RequestBytes)
	case p.ResponseBytes < 0 || p.ResponseBytes > maxMessage || (p.ResponseBytes == 0) != (p.Test == Stream):
		return clean, fmt.Errorf("responses of %d bytes", p.ResponseBytes)
	}
	return clean, nil
}
