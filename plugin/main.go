package plugin

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// SupportedVersions are the versions of the CNI specification that are served.
// There is no 0.1.0 and 0.2.0: they know no conflist, hence no prevResult, and a
// plugin that has none to pass on cannot serve them. The upstream chained plugins
// bandwidth, firewall and vrf start late for the same reason.
func SupportedVersions() version.PluginInfo { return version.VersionsStartingFrom("0.3.0") }

// Main serves the CNI verb that the process's environment and standard input ask
// for, and returns the exit code.
//
// This is the one place of the program that uses the process's own environment
// and streams, because skel, the CNI library's front end, reads os.Getenv and
// os.Stdin and answers VERSION on os.Stdout, and cannot be told otherwise. The
// verbs themselves take what they need as arguments.
func Main(d Deps, stdout, stderr io.Writer) int {
	// skel compares CNI_NETNS with the netns of this process, after ADD and DEL,
	// and fails where they are the same: a safeguard for plugins that configure
	// interfaces. skipstack enters no netns, and a DEL must not fail because the
	// pid in CNI_NETNS belongs to a process of the host by now.
	os.Setenv("CNI_NETNS_OVERRIDE", "true")

	// The result is printed when nothing can fail any more, so that there is
	// never more than one JSON object.
	var result bytes.Buffer
	p := New(d, &result, slog.New(slog.NewTextHandler(stderr, nil)))
	var failure *types.Error
	err := safely(func() error {
		failure = skel.PluginMainFuncsWithError(skel.CNIFuncs{
			Add:    p.Add,
			Del:    p.Del,
			Check:  p.Check,
			GC:     p.GC,
			Status: p.Status,
		}, SupportedVersions(), "")
		return nil
	})
	if err != nil {
		failure = types.NewError(types.ErrInternal, "skipstack failed", err.Error())
	}
	if failure != nil {
		out, err := json.MarshalIndent(failure, "", "    ")
		if err != nil {
			panic(err) // two strings and a number always encode
		}
		stdout.Write(append(out, '\n'))
		return 1
	}
	if _, err := stdout.Write(result.Bytes()); err != nil {
		return 1
	}
	return 0
}
