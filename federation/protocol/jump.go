package protocol

import (
	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/federation/protocol/audience"
)

// How far a record may be ahead of what is known of its origin. A cluster begins an epoch when it lost its state or
// another of its replicas leads, and skips up to 2^24 numbers with each start. Numbers beyond that come from a fault, or
// from somebody who wants that the origin is never heard again.
const (
	maxEpochJump = 1 << 16
	maxSeqJump   = 1 << 40
)

// jumps reports whether a record is too far ahead of its origin.
func (o *origin) jumps(r *federationv1.Record) bool {
	seq := o.mark.Seq
	if r.Epoch > o.mark.Epoch {
		seq = 0
	}
	return !o.leap && (r.Epoch > o.mark.Epoch+maxEpochJump || r.Epoch >= o.mark.Epoch && r.Seq > seq+maxSeqJump)
}

// MaxFields is how many fields a body may have, the endpoints of one service mostly: a field of two bytes may become an
// object of two hundred.
const MaxFields = 50_000

// audienceOf reads export_to out of a body without decoding the rest.
func audienceOf(kind string, body []byte) (audience.Set, error) {
	switch kind {
	case KindMember, KindCluster:
		return nil, nil
	case KindDrain:
		return audience.Set{}, nil
	case KindEndpoints:
		return audience.Of(audience.OfEndpoints, body)
	}
	return audience.Of(audience.OfService, body)
}

// checkUnfolded refuses a body that would be much larger in memory, before it is decoded.
func checkUnfolded(r *federationv1.Record) *Refusal {
	switch n := audience.Fields(r.GetBody()); {
	case n < 0:
		return refuse(ReasonMalformed, "body of %s %s does not decode", r.Kind, quote(r.Key))
	case n > MaxFields:
		return refuse(ReasonTooLarge, "body of %s %s has %d fields, %d are allowed", r.Kind, quote(r.Key), n, MaxFields)
	}
	return nil
}
