// Package conf holds the samples of configuration that programs use.
package conf

import _ "embed"

// Entry is skipstack's entry in a conflist, as `skipstack install` appends it.
//
//go:embed entry.json
var Entry []byte
