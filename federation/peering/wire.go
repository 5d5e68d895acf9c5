package peering

import (
	"errors"
	"fmt"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// Limits on one response of a peer. Servers cut theirs at 3 MiB, with one record more at most.
const (
	maxResponse  = 4<<20 + protocol.MaxRecordSize
	maxResources = 50_000
	maxName      = 1024
)

var errResponse = errors.New("not a response of the record stream")

// codec reads responses of peers. A field of two bytes unfolds to an object of hundreds when protobuf decodes it; codec
// reads only the fields that are used, and counts before it keeps anything.
type codec struct{}

var _ encoding.CodecV2 = codec{}

// Name implements encoding.CodecV2.
func (codec) Name() string { return "proto" }

// Marshal implements encoding.CodecV2.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is no protobuf message", v)
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

// Unmarshal implements encoding.CodecV2.
func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	out, ok := v.(*discoveryv3.DeltaDiscoveryResponse)
	if !ok {
		return fmt.Errorf("%w: %T", errResponse, v)
	}
	if n := data.Len(); n > maxResponse {
		return fmt.Errorf("%w: %d bytes, %d are allowed", errResponse, n, maxResponse)
	}
	return readResponse(data.Materialize(), out)
}

// readResponse reads a DeltaDiscoveryResponse. The strings and bytes in it are copies.
func readResponse(b []byte, out *discoveryv3.DeltaDiscoveryResponse) error {
	resources, removed := 0, 0
	err := fields(b, func(num protowire.Number, v []byte) error {
		switch num {
		case 2:
			if resources++; resources > maxResources {
				return fmt.Errorf("%w: over %d resources", errResponse, maxResources)
			}
			r, err := readResource(v)
			if err != nil {
				return err
			}
			out.Resources = append(out.Resources, r)
		case 4:
			return text(v, &out.TypeUrl)
		case 5:
			return text(v, &out.Nonce)
		case 6:
			if removed++; removed > maxResources {
				return fmt.Errorf("%w: over %d removed resources", errResponse, maxResources)
			}
			name := ""
			if err := text(v, &name); err != nil {
				return err
			}
			out.RemovedResources = append(out.RemovedResources, name)
		}
		return nil
	})
	return err
}

func readResource(b []byte) (*discoveryv3.Resource, error) {
	out := &discoveryv3.Resource{}
	err := fields(b, func(num protowire.Number, v []byte) error {
		switch num {
		case 1:
			return text(v, &out.Version)
		case 2:
			out.Resource = &anypb.Any{}
			return fields(v, func(num protowire.Number, v []byte) error {
				switch num {
				case 1:
					return text(v, &out.Resource.TypeUrl)
				case 2:
					// One that is too large stays so, and is refused and counted as a record; the others are taken.
					out.Resource.Value = append([]byte(nil), v[:min(len(v), protocol.MaxRecordSize+1)]...)
				}
				return nil
			})
		case 3:
			return text(v, &out.Name)
		}
		return nil
	})
	return out, err
}

// fields calls f with every field of a message that is a string, bytes or message; others are passed over.
func fields(b []byte, f func(num protowire.Number, v []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("%w: %w", errResponse, protowire.ParseError(n))
		}
		b = b[n:]
		if typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
				return fmt.Errorf("%w: %w", errResponse, protowire.ParseError(n))
			}
			b = b[n:]
			continue
		}
		v, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return fmt.Errorf("%w: %w", errResponse, protowire.ParseError(n))
		}
		if err := f(num, v); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// text cuts what is too long to be a name of ours: records carry their own.
func text(v []byte, to *string) error {
	*to = string(v[:min(len(v), maxName)])
	return nil
}
