// Package audience reads who a record is for out of its body, without decoding the rest, and bounds what a body may
// unfold to. It knows the fields of the wire, and nothing of records.
package audience

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Max is how many clusters a record may name as those it is for.
const Max = 4096

// The fields of export_to.
const (
	OfService   protowire.Number = 4 // Service.export_to; a tombstone has the same
	OfEndpoints protowire.Number = 2 // Endpoints.export_to
)

// Set is who may see a record: nil is everyone, else sorted names.
type Set []string

// Everyone reports whether all may see it.
func (a Set) Everyone() bool { return a == nil }

// Has reports whether a cluster may.
func (a Set) Has(c mesh.ClusterID) bool {
	if a == nil {
		return true
	}
	_, ok := slices.BinarySearch(a, string(c))
	return ok
}

// Covers reports whether everyone in b is in a.
func (a Set) Covers(b Set) bool {
	if a == nil {
		return true
	}
	if b == nil {
		return false
	}
	for _, name := range b {
		if !a.Has(mesh.ClusterID(name)) {
			return false
		}
	}
	return true
}

// Union is everyone in either.
func (a Set) Union(b Set) Set {
	if a == nil || b == nil {
		return nil
	}
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// Body is the body of a tombstone for the set.
func (a Set) Body() []byte {
	var b []byte
	for _, name := range a {
		b = protowire.AppendString(protowire.AppendTag(b, OfService, protowire.BytesType), name)
	}
	return b
}

// Of reads the set out of the given field of a body.
func Of(field protowire.Number, body []byte) (Set, error) {
	var a Set
	for len(body) > 0 {
		num, typ, n := protowire.ConsumeTag(body)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		body = body[n:]
		if num == field && typ == protowire.BytesType {
			v, n := protowire.ConsumeBytes(body)
			if n < 0 {
				return nil, protowire.ParseError(n)
			}
			if len(a) >= Max || len(v) > 63 {
				return nil, fmt.Errorf("it is for more than %d clusters, or for one of more than 63 bytes", Max)
			}
			a, body = append(a, string(v)), body[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, body); n < 0 {
			return nil, protowire.ParseError(n)
		}
		body = body[n:]
	}
	slices.Sort(a)
	return slices.Compact(a), nil
}

// Fields counts the top-level fields of a message; less than zero: it is none.
func Fields(b []byte) int {
	n := 0
	for ; len(b) > 0; n++ {
		_, _, size := protowire.ConsumeField(b)
		if size < 0 {
			return -1
		}
		b = b[size:]
	}
	return n
}
