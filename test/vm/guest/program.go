package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
	"github.com/skipstack/skipstack/test/vm/job"
)

// program is what the host runs in the virtual machine besides test binaries.
func program(args []string, in io.Reader, out io.Writer) int {
	var answer any
	switch {
	case len(args) > 0 && args[0] == verdict.WorkerArg:
		return verdict.Worker(args[1:], in, out)
	case len(args) == 1 && args[0] == "load":
		answer = load()
	case len(args) == 1 && args[0] == "verdict":
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		begin := time.Now()
		v, err := verdict.Run(ctx, verdict.Env{CgroupRoot: cgroupRoot})
		if err != nil {
			fmt.Fprintln(out, err)
			return 1
		}
		a := job.Verdict{Level: string(v.Level), Risks: v.Risks.String(), Took: time.Since(begin)}
		for _, p := range v.Probes {
			a.Probes = append(a.Probes, fmt.Sprintf("%s: %s: %s", p.Name, p.Result, p.Detail))
		}
		answer = a
	default:
		fmt.Fprintln(out, "usage: guest load|verdict")
		return 2
	}
	if err := json.NewEncoder(out).Encode(answer); err != nil {
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
