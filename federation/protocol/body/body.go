// Package body reads and writes the bodies of records that are no message of the wire: the mark of a departure, and the
// ramp of a drain.
package body

import (
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Fields. None of them is one of a Service or of an Endpoints, and whoever does not know one skips it.
const (
	fieldLeft  protowire.Number = 15 // the tombstone of a member that left, or whom the origin left: it is not a ban
	fieldBegun protowire.Number = 16 // milliseconds since 1970
	fieldOver  protowire.Number = 17 // milliseconds
)

// Left is the body of a tombstone that is no ban.
var Left = protowire.AppendVarint(protowire.AppendTag(nil, fieldLeft, protowire.VarintType), 1)

// IsLeft reports whether a body has the mark.
func IsLeft(b []byte) bool {
	left := false
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return false
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return false
		}
		left = left || num == fieldLeft
		b = b[n:]
	}
	return left
}

// Ramp is how the traffic to a cluster is taken away.
type Ramp struct {
	Begun time.Time     // by the wall clock; zero: nothing is taken away
	Over  time.Duration // until all is
}

// Taken returns how much is taken away at a time: 0 to mesh.DrainSteps.
func (r Ramp) Taken(now time.Time) uint32 {
	elapsed := now.Sub(r.Begun)
	switch {
	case r.Begun.IsZero() || elapsed < 0:
		return 0
	case elapsed >= r.Over:
		return mesh.DrainSteps
	}
	return uint32(mesh.DrainSteps * float64(elapsed) / float64(r.Over))
}

// Body writes the ramp, to the millisecond.
func (r Ramp) Body() []byte {
	b := protowire.AppendVarint(protowire.AppendTag(nil, fieldBegun, protowire.VarintType), uint64(r.Begun.UnixMilli()))
	return protowire.AppendVarint(protowire.AppendTag(b, fieldOver, protowire.VarintType), uint64(r.Over.Milliseconds()))
}

// RampOf reads what Body wrote; anything else is no ramp.
func RampOf(b []byte) Ramp {
	var out Ramp
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 || typ != protowire.VarintType {
			return Ramp{}
		}
		v, m := protowire.ConsumeVarint(b[n:])
		if m < 0 {
			return Ramp{}
		}
		switch b = b[n+m:]; num {
		case fieldBegun:
			out.Begun = time.UnixMilli(int64(v))
		case fieldOver:
			out.Over = time.Duration(v) * time.Millisecond
		}
	}
	return out
}
