package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/vm/job"
)

// program is what the host runs in the virtual machine besides test binaries.
func program(args []string, out io.Writer) int {
	if len(args) != 1 || args[0] != "load" {
		fmt.Fprintln(out, "usage: guest load")
		return 2
	}
	if err := json.NewEncoder(out).Encode(load()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func load() (a job.Loaded) {
	set, err := datapath.LoadPrivate(datapath.LoadOptions{})
	if err == nil {
		err = set.Close()
	}
	if err != nil {
		a.Error = err.Error()
		a.Unsupported = errors.Is(err, datapath.ErrUnsupported)
	}
	return a
}
