package bench

import (
	"fmt"
	"strconv"
)

func (p Point) String() string {
	return fmt.Sprintf("%s %s %s %s", p.Test, p.Path, p.Placement, p.options())
}

// options describes the messages, and what else matters to people: TCP_NODELAY of a
// stream, and the number of connections.
func (p Point) options() string {
	s := p.message()
	if p.NoDelay && p.Test == Stream {
		s += " nodelay"
	}
	if p.Connections > 1 {
		s += fmt.Sprintf(" x%d", p.Connections)
	}
	return s
}

// message describes the messages' sizes.
func (p Point) message() string {
	request, unit := size(p.RequestBytes)
	if p.Test == Stream {
		return request + " " + unit
	}
	response, responseUnit := size(p.ResponseBytes)
	if unit != responseUnit {
		request += " " + unit
	}
	return request + "/" + response + " " + responseUnit
}

func size(bytes int) (number, unit string) {
	if bytes >= 1<<10 && bytes%(1<<10) == 0 {
		return strconv.Itoa(bytes >> 10), "KiB"
	}
	return strconv.Itoa(bytes), "B"
}
