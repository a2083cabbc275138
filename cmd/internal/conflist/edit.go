// Package conflist puts skipstack into a node's CNI configuration and takes it out
// again: it edits network configuration lists (conflists), finds the one that the
// container runtime uses, installs the plugin's binary, and keeps the entry there
// while the primary plugin rewrites its file.
//
// Edits are made in the text. Every byte that is not skipstack's stays as it is:
// unknown keys, order, number formats, indentation, line ends.
package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/plugin"
)

// ErrRefused is wrapped by errors that say why a configuration is left alone: with
// the entry in it, or without, pods could not be right.
var ErrRefused = errors.New("refused")

// ErrEdited is wrapped, with [ErrRefused], where a list has an entry of skipstack
// that is not the one to install.
var ErrEdited = errors.New("skipstack's entry there has other settings")

// errNotLoadable is wrapped where a runtime could not load the file either. It may
// be half written.
var errNotLoadable = errors.New("the container runtime cannot load it")

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrRefused, fmt.Errorf(format, args...))
}

// span is a value's place in a text.
type span struct{ start, end int }

func (s span) of(text []byte) []byte { return text[s.start:s.end] }

// list is a conflist and where its plugins are.
type list struct {
	text    []byte
	array   span // the value of "plugins"
	plugins []span
	types   []string
	served  error // why skipstack cannot be in it, for its version
}

// parseList reads a conflist as runtimes do, through libcni.
func parseList(text []byte) (list, error) {
	members, err := object(text)
	if err != nil {
		return list{}, err
	}
	l := list{text: text}
	n := 0
	for _, m := range members {
		if m.key == "plugins" {
			l.array = m.value
			n++
		}
	}
	switch {
	case n == 0:
		return list{}, refuse("%w: it has no \"plugins\"", errNotLoadable)
	case n > 1:
		return list{}, refuse("it has \"plugins\" %d times, and readers of JSON differ on which counts", n)
	}
	conf, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		return list{}, refuse("%w: %w", errNotLoadable, err)
	}
	for _, p := range conf.Plugins {
		l.types = append(l.types, p.Network.Type)
	}
	if l.plugins, err = elements(text, l.array); err != nil {
		return list{}, err
	}
	if len(l.plugins) != len(l.types) {
		return list{}, refuse("\"plugins\" could not be told apart: %d, %d", len(l.plugins), len(l.types))
	}
	l.served = served(conf.CNIVersion, members, text)
	return l, nil
}

// served checks that skipstack serves the version of CNI that runtimes will ask it
// for: if not, no pod would start. A runtime that does not know the key cniVersions,
// which libcni prefers since 1.3, takes cniVersion.
func served(version string, members []member, text []byte) error {
	known := plugin.SupportedVersions().SupportedVersions()
	asked := []string{version}
	for _, m := range members {
		var s string
		if m.key == "cniVersion" && json.Unmarshal(m.value.of(text), &s) == nil {
			asked = append(asked, s)
		}
	}
	for _, v := range asked {
		if v == "" {
			return refuse("it has no cniVersion, which is version 0.1.0; skipstack serves %s", strings.Join(known, ", "))
		}
		if !slices.Contains(known, v) {
			return refuse("its cniVersion is %q; skipstack serves %s", v, strings.Join(known, ", "))
		}
	}
	return nil
}

// ours are the indexes of skipstack's entries.
func (l list) ours() []int {
	var at []int
	for i, t := range l.types {
		if t == plugin.Type {
			at = append(at, i)
		}
	}
	return at
}

// Has says whether a conflist has an entry of skipstack.
func Has(text []byte) bool {
	l, err := parseList(text)
	return err == nil && len(l.ours()) > 0
}

// Add returns the conflist with the entry appended to its plugins; the same bytes if
// the entry is there already. entry is a JSON object of type skipstack.
//
// The error wraps [ErrRefused] for a conflist that is to be left alone, and
// [ErrEdited] too where it has another entry of skipstack, unless replace is set:
// then that one is replaced.
func Add(text, entry []byte, replace bool) ([]byte, error) {
	if err := checkEntry(entry); err != nil {
		return nil, err
	}
	l, err := parseList(text)
	if err != nil {
		return nil, err
	}
	if l.served != nil {
		return nil, l.served
	}
	at := l.ours()
	switch {
	case len(at) > 1:
		return nil, refuse("skipstack is in it %d times: leave one", len(at))
	case len(at) == 1 && at[0] == 0:
		return nil, refuse("skipstack is its first plugin: it has to come after the one that makes the interface")
	case len(at) == 1:
		there := l.plugins[at[0]]
		if sameJSON(there.of(text), entry) {
			return text, nil
		}
		if !replace {
			return nil, fmt.Errorf("%w: %w", ErrRefused, ErrEdited)
		}
		l.plugins, l.types = l.plugins[:at[0]], l.types[:at[0]]
		return l.verified(splice(text, there, l.render(entry, l.style())), len(l.plugins)+1)
	}
	for i, t := range l.types {
		if nested(l.plugins[i].of(text)) {
			return nil, refuse("its plugin %q delegates to a network that has skipstack already", t)
		}
	}
	s := l.style()
	end := l.plugins[len(l.plugins)-1].end
	out, err := l.verified(splice(text, span{end, end}, append([]byte(","+s.gap), l.render(entry, s)...)), len(l.plugins)+1)
	if err != nil {
		return nil, err
	}
	if back, err := Remove(out); err != nil || !bytes.Equal(back, text) {
		return nil, refuse("the edit could not be undone exactly")
	}
	return out, nil
}

// verified checks an edited list before anybody else reads it.
func (l list) verified(text []byte, plugins int) ([]byte, error) {
	got, err := parseList(text)
	if err != nil {
		return nil, fmt.Errorf("after the edit: %w", err)
	}
	if len(got.plugins) < plugins || len(got.ours()) != 1 {
		return nil, refuse("the edit went wrong")
	}
	return text, nil
}

// Remove returns the conflist without skipstack's entries, which are the bytes that
// Add was given; the same bytes if there are none. The error wraps [ErrRefused].
func Remove(text []byte) ([]byte, error) {
	for {
		l, err := parseList(text)
		if err != nil {
			return nil, err
		}
		at := l.ours()
		if len(at) == 0 {
			return text, nil
		}
		i := at[len(at)-1]
		cut := l.plugins[i]
		switch {
		case len(l.plugins) == 1:
			return nil, refuse("skipstack is its only plugin: remove the file")
		case i > 0:
			cut.start = l.plugins[i-1].end
		default:
			cut.end = l.plugins[1].start
		}
		text = splice(text, cut, nil)
	}
}

// Convert returns a conflist that has the one plugin of a configuration (.conf or
// .json), with its name and cniVersion, and the entry.
//
// The error wraps [ErrRefused].
func Convert(text, entry []byte) ([]byte, error) {
	if err := checkEntry(entry); err != nil {
		return nil, err
	}
	members, err := object(text)
	if err != nil {
		return nil, err
	}
	found := map[string]span{}
	for _, m := range members {
		switch m.key {
		case "plugins":
			return nil, refuse("%w: it is a list of plugins, but its name does not end in .conflist", errNotLoadable)
		case "name", "cniVersion", "type":
			if _, twice := found[m.key]; twice {
				return nil, refuse("it has %q twice", m.key)
			}
			found[m.key] = m.value
		}
	}
	conf, err := libcni.NetworkPluginConfFromBytes(text)
	if err != nil {
		return nil, refuse("%w: %w", errNotLoadable, err)
	}
	switch {
	case conf.Network.Type == plugin.Type || nested(text):
		return nil, refuse("its plugin is, or delegates to, skipstack")
	case conf.Network.Name == "" || found["name"].end == 0:
		return nil, refuse("it has no name, which a list must have")
	case found["cniVersion"].end == 0:
		return nil, served("", nil, text)
	}
	body := bytes.TrimSpace(text)
	nl := newline(text)
	unit := "  "
	if i := bytes.IndexByte(body, '\n'); i >= 0 {
		if u := leading(body[i+1:]); u != "" {
			unit = u
		}
		var indented bytes.Buffer
		if err := json.Indent(&indented, body, unit+unit, unit); err != nil {
			return nil, refuse("%w: %w", errNotLoadable, err)
		}
		body = bytes.ReplaceAll(indented.Bytes(), []byte("\n"), []byte(nl))
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "{%[1]s%[2]s\"cniVersion\": %[3]s,%[1]s%[2]s\"name\": %[4]s,%[1]s%[2]s\"plugins\": [%[1]s%[2]s%[2]s%[5]s%[1]s%[2]s]%[1]s}%[1]s",
		nl, unit, found["cniVersion"].of(text), found["name"].of(text), body)
	return Add(b.Bytes(), entry, false)
}

// checkEntry checks what is to be installed as strictly as can be: the plugin
// itself is lenient for the sake of pods.
func checkEntry(entry []byte) error {
	if err := plugin.Validate(entry); err != nil {
		return fmt.Errorf("the entry: %w", err)
	}
	conf, err := libcni.NetworkPluginConfFromBytes(entry)
	if err != nil {
		return fmt.Errorf("the entry: %w", err)
	}
	if conf.Network.Type != plugin.Type {
		return fmt.Errorf("the entry: %w: its type is %q, not %q", plugin.ErrConfig, conf.Network.Type, plugin.Type)
	}
	return nil
}

// style is how a list is laid out.
type style struct {
	gap    string // between the comma and the next plugin
	lines  bool   // a plugin takes several lines
	base   string // indentation of the lines of a plugin
	unit   string // one more level
	nl     string // end of a line
	spaced bool   // of a plugin on one line: a space after colon and comma
}

// style is that of the last plugin.
func (l list) style() style {
	last := l.plugins[len(l.plugins)-1]
	before := l.array.start + 1
	if n := len(l.plugins); n > 1 {
		// After the comma, which may have space before it.
		before = l.plugins[n-2].end
		before += bytes.IndexByte(l.text[before:], ',') + 1
	}
	body := last.of(l.text)
	s := style{
		gap:    string(l.text[before:last.start]),
		lines:  bytes.IndexByte(body, '\n') >= 0,
		unit:   "  ",
		nl:     newline(l.text),
		spaced: bytes.Contains(body, []byte(`": `)),
	}
	if i := strings.LastIndexByte(s.gap, '\n'); i >= 0 {
		s.base = s.gap[i+1:]
	} else if i := bytes.LastIndexByte(l.text[:last.end], '\n'); i >= 0 {
		s.base = leading(l.text[i+1:])
		if s.gap == "" {
			s.gap = " "
		}
	} else if s.gap == "" && s.spaced {
		s.gap = " "
	}
	switch {
	case s.lines:
		i := bytes.IndexByte(body, '\n')
		if inner, ok := strings.CutPrefix(leading(body[i+1:]), s.base); ok && inner != "" {
			s.unit = inner
		}
	case strings.HasSuffix(s.base, "\t"):
		s.unit = "\t"
	}
	return s
}

func (l list) render(entry []byte, s style) []byte {
	var b bytes.Buffer
	if s.lines {
		_ = json.Indent(&b, bytes.TrimSpace(entry), s.base, s.unit) // it has been checked
		return bytes.ReplaceAll(b.Bytes(), []byte("\n"), []byte(s.nl))
	}
	_ = json.Compact(&b, entry)
	if !s.spaced {
		return b.Bytes()
	}
	var out []byte
	inString, escaped := false, false
	for _, c := range b.Bytes() {
		out = append(out, c)
		switch {
		case escaped:
			escaped = false
		case inString && c == '\\':
			escaped = true
		case c == '"':
			inString = !inString
		case !inString && (c == ':' || c == ','):
			out = append(out, ' ')
		}
	}
	return out
}

// newline is how lines of the text end.
func newline(text []byte) string {
	if i := bytes.IndexByte(text, '\n'); i > 0 && text[i-1] == '\r' {
		return "\r\n"
	}
	return "\n"
}

// leading is the space that a line begins with.
func leading(line []byte) string {
	return string(line[:len(line)-len(bytes.TrimLeft(line, " \t"))])
}

// splice replaces a part of the text by another; it leaves text as it is.
func splice(text []byte, at span, with []byte) []byte {
	return slices.Concat(text[:at.start], with, text[at.end:])
}

// member is one key of an object, and its value's place.
type member struct {
	key   string
	value span
}

// object returns the members of the one object in text, in order and with
// duplicates.
func object(text []byte) ([]member, error) {
	switch {
	case len(text) > plugin.MaxConflist:
		return nil, refuse("it is larger than %d bytes", plugin.MaxConflist)
	case len(bytes.TrimSpace(text)) == 0:
		return nil, refuse("%w: it is empty", errNotLoadable)
	case bytes.HasPrefix(text, []byte("\xef\xbb\xbf")):
		return nil, refuse("%w: it begins with a byte order mark", errNotLoadable)
	}
	// Unlike a Decoder, Unmarshal looks at all of text.
	var whole json.RawMessage
	if err := json.Unmarshal(text, &whole); err != nil {
		return nil, refuse("%w: it is not JSON: %w", errNotLoadable, err)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, refuse("%w: it is no JSON object", errNotLoadable)
	}
	var members []member
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, refuse("%w: %w", errNotLoadable, err)
		}
		value, err := next(dec, 0)
		if err != nil {
			return nil, err
		}
		members = append(members, member{key.(string), value})
	}
	return members, nil
}

// elements returns the places of an array's elements.
func elements(text []byte, array span) ([]span, error) {
	dec := json.NewDecoder(bytes.NewReader(array.of(text)))
	if t, err := dec.Token(); err != nil || t != json.Delim('[') {
		return nil, refuse("%w: \"plugins\" is no array", errNotLoadable)
	}
	var all []span
	for dec.More() {
		e, err := next(dec, array.start)
		if err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	return all, nil
}

// next reads a value; offset is where the decoder's text begins.
func next(dec *json.Decoder, offset int) (span, error) {
	var value json.RawMessage
	if err := dec.Decode(&value); err != nil {
		return span{}, refuse("%w: %w", errNotLoadable, err)
	}
	end := offset + int(dec.InputOffset())
	return span{end - len(value), end}, nil
}

// nested says whether a plugin's configuration has one of type skipstack inside, as
// that of Multus has in its delegates.
func nested(text []byte) bool {
	dec := json.NewDecoder(bytes.NewReader(text))
	isKey, depth := []bool{}, 0 // isKey: for each open object; arrays have none
	inObject := []bool{}
	wasType := false
	for {
		t, err := dec.Token()
		if errors.Is(err, io.EOF) || err != nil {
			return false
		}
		switch d, ok := t.(json.Delim); {
		case ok && (d == '{' || d == '['):
			depth++
			inObject, isKey = append(inObject, d == '{'), append(isKey, true)
			wasType = false
			continue
		case ok:
			depth--
			inObject, isKey = inObject[:depth], isKey[:depth]
			if depth == 0 {
				return false
			}
		case inObject[depth-1] && isKey[depth-1]:
			s, _ := t.(string)
			wasType, isKey[depth-1] = s == "type", false
			continue
		default:
			if s, ok := t.(string); ok && wasType && s == plugin.Type && depth > 1 {
				return true
			}
		}
		wasType, isKey[depth-1] = false, true
	}
}

// sameJSON says whether two texts are the same but for layout and the order of keys.
func sameJSON(a, b []byte) bool {
	decode := func(text []byte) (v any) {
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		if dec.Decode(&v) != nil {
			return nil
		}
		return v
	}
	x, y := decode(a), decode(b)
	return x != nil && reflect.DeepEqual(x, y)
}

// Set returns a JSON object with a member added or replaced; the rest stays as it is.
func Set(text []byte, key string, value any) ([]byte, error) {
	members, err := object(text)
	if err != nil {
		return nil, err
	}
	raw, err := json.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", key, err)
	}
	for _, m := range slices.Backward(members) { // the last is the one that counts
		if m.key == key {
			return splice(text, m.value, raw), nil
		}
	}
	if len(members) == 0 {
		return fmt.Appendf(nil, "{%q: %s}", key, raw), nil
	}
	end := members[len(members)-1].value.end
	return splice(text, span{end, end}, fmt.Appendf(nil, ", %q: %s", key, raw)), nil
}
