package plugin

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"
)

// input is what a runtime sends on standard input.
type input struct {
	name       string
	cniVersion string
	members    []member
}

// maxInput is many times what a runtime sends. That much is parsed in well under
// a second; more would keep the pod waiting beyond a verb's time limit.
const maxInput = 1 << 20 // bytes

// decodeInput fails with code 6 only where the runtime and the CNI library could
// not read the configuration either, or where it is longer than maxInput.
func decodeInput(stdin []byte) (*input, error) {
	if len(stdin) > maxInput {
		return nil, types.NewError(types.ErrDecodingFailure, "the network configuration is too long",
			fmt.Sprintf("standard input has %d bytes, at most %d are read", len(stdin), maxInput))
	}
	members, err := splitObject(stdin)
	if err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "decode the network configuration", err.Error())
	}
	// The CNI library matches these two regardless of case and has already
	// judged them; read them as it does.
	var common struct {
		Name       string `json:"name"`
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(stdin, &common); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "decode the network configuration", err.Error())
	}
	return &input{name: common.Name, cniVersion: common.CNIVersion, members: members}, nil
}

// result returns what ADD prints: the previous plugin's result as it came, byte
// for byte, where it is of the configuration's version, as the specification has
// it. Decoding and encoding it again would drop what this build of the library
// does not know. A result of another version is converted.
func (in *input) result() ([]byte, error) {
	prev := lookup(in.members, "prevResult")
	if prev == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "prevResult is missing",
			"skipstack creates no interface: put it after the plugin that does, in the same conflist")
	}
	bad := func(err error) error {
		return types.NewError(types.ErrInvalidNetworkConfig, "prevResult cannot be read", err.Error())
	}
	if prev[0] != '{' {
		return nil, bad(fmt.Errorf("%s is not an object", shorten(string(prev))))
	}
	var version struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(prev, &version); err != nil {
		return nil, bad(err)
	}
	if version.CNIVersion == "" {
		// Before 1.0.0 a result need not name its version: it is the request's.
		version.CNIVersion = in.cniVersion
		prev = withVersion(prev, in.cniVersion)
	}
	res, err := create.Create(version.CNIVersion, prev)
	if err != nil {
		return nil, bad(err)
	}
	if version.CNIVersion == in.cniVersion {
		return prev, nil
	}
	converted, err := res.GetAsVersion(in.cniVersion)
	if err != nil {
		return nil, bad(err)
	}
	var out bytes.Buffer
	if err := converted.PrintTo(&out); err != nil {
		return nil, bad(err)
	}
	// The library prints some things that it does not read, such as an address
	// that was missing.
	if _, err := create.Create(in.cniVersion, out.Bytes()); err != nil {
		return nil, bad(err)
	}
	return out.Bytes(), nil
}

// withVersion appends the version to an object that has none or an empty one;
// of two equal keys readers take the last.
func withVersion(object []byte, version string) []byte {
	v, err := json.Marshal(version)
	if err != nil {
		panic(err) // a string always encodes
	}
	body := bytes.TrimRight(object[:len(object)-1], " \t\r\n")
	out := bytes.Clone(body)
	if len(body) > 1 { // more than the brace
		out = append(out, ',')
	}
	out = append(out, `"cniVersion":`...)
	out = append(out, v...)
	return append(out, '}')
}

// runtimeConfig returns the capability arguments of the request.
func (in *input) runtimeConfig() (runtimeConfig, error) {
	return parseRuntimeConfig(lookup(in.members, "runtimeConfig"))
}

// config returns skipstack's own part; with an error it is still usable.
func (in *input) config() (conf Config, err error) {
	if p := safely(func() error { conf, err = parseMembers(in.members); return nil }); p != nil {
		return DefaultConfig(), p
	}
	return conf, err
}
