package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Type is the name of the plugin's binary, and so its type in a conflist.
const Type = "skipstack"

// MaxConflist is the largest file, in bytes, that is read as a network configuration
// list or a single plugin's configuration. containerd loads no larger (go-cni, opts.go).
const MaxConflist = 2 << 20

// ErrNoEntry is returned by [ParseConflist] for a conflist without skipstack.
var ErrNoEntry = errors.New("no plugin of type \"" + Type + "\"")

// ParseConflist reads the configuration of skipstack's entry in a network
// configuration list, or in a single plugin's configuration. It is as strict as
// [ParseConfig], and returns an error wrapping [ErrNoEntry] where skipstack is not
// in the list, and one wrapping [ErrConfig] where it is twice.
func ParseConflist(raw []byte) (Config, error) {
	entry, err := FindEntry(raw)
	if err != nil {
		return DefaultConfig(), err
	}
	return ParseConfig(entry)
}

// FindEntry returns skipstack's entry in a list, or raw itself where that is a single
// plugin's configuration. Errors are those of [ParseConflist], but the entry is not
// looked into.
func FindEntry(raw []byte) (json.RawMessage, error) {
	members, err := splitObject(raw)
	if err != nil {
		return nil, err
	}
	list := lookup(members, "plugins")
	if list == nil {
		if typeOf(raw) != Type {
			return nil, ErrNoEntry
		}
		return raw, nil
	}
	plugins, err := decodeArray(list)
	if err != nil {
		return nil, fmt.Errorf("plugins: %w", err)
	}
	var entry json.RawMessage
	for _, p := range plugins {
		if typeOf(p) != Type {
			continue
		}
		if entry != nil {
			return nil, fmt.Errorf("%w: skipstack is in the list twice", ErrConfig)
		}
		entry = p
	}
	if entry == nil {
		return nil, ErrNoEntry
	}
	return entry, nil
}

func typeOf(plugin json.RawMessage) string {
	members, err := splitObject(plugin)
	if err != nil {
		return ""
	}
	s, _ := decodeString(lookup(members, "type"))
	return s
}
