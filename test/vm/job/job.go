// Package job is what the host and the virtual machine say to each other: a
// script in the initramfs, and a stream of events on the second serial port.
// (The first is the kernel's console, and is kept apart so that neither breaks
// the other's lines.)
package job

import (
	"runtime"
	"time"
)

// ScriptPath is where the initramfs has the [Script], in JSON, and the disk its own.
const ScriptPath = "/script.json"

// ResultPort is the serial port that carries events, one JSON object a line.
func ResultPort() string {
	if runtime.GOARCH == "arm64" {
		return "/dev/ttyAMA1"
	}
	return "/dev/ttyS1"
}

// A Script is what the virtual machine does before it powers off.
type Script struct {
	Modules []string // files, in the order to load them
	// Disk is the device to start a system from, which runs the script that it has
	// itself, if it is not empty.
	Disk string
	Runs []Run
}

// A Run is a program to run.
type Run struct {
	Name    string
	Path    string
	Args    []string
	Dir     string
	Env     []string // besides a small environment of the guest's own
	Timeout time.Duration
}

// Kinds of events.
const (
	Booted = "booted" // everything is mounted and loaded
	Output = "output" // of the run, standard output and error together
	Ended  = "ended"  // the run ended
	Done   = "done"   // the script ended; power off follows
	Failed = "failed" // the script could not go on
)

// An Event is something that happened in the virtual machine.
type Event struct {
	Kind     string
	Run      int           // index of the run, for Output and Ended
	Text     string        // Output: some of it; Failed: why; Booted: the kernel's release
	Version  string        // Booted: what uname -v says
	Exit     int           // Ended: the exit code, -1 if it was killed
	TimedOut bool          // Ended
	Took     time.Duration // Ended
}

// Loaded is what `guest load` prints in JSON.
type Loaded struct {
	Error       string // why the datapath does not load
	Unsupported bool   // the error is datapath.ErrUnsupported
}
