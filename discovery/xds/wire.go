package xds

import (
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	encodingproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// A response is put together from bytes that all streams share: each resource is encoded once, as the field of a response
// that it is. In both protocols that field has the number 2; the resource of a delta response ends with its body, which is
// the same field, number 2, as a state-of-the-world response has it.
const (
	resourcesField = 2 // of DiscoveryResponse, DeltaDiscoveryResponse; and the body in Resource
	versionField   = 1 // of Resource
	nameField      = 3 // of Resource
	typeURLField   = 1 // of Any
	valueField     = 2 // of Any
)

// lay encodes the resource for both protocols. The body's value is moved into those bytes.
func (r *Resource) lay() {
	value := r.Body.GetValue()
	inner := protowire.SizeTag(typeURLField) + protowire.SizeBytes(len(r.Body.GetTypeUrl())) + protowire.SizeTag(valueField) + protowire.SizeBytes(len(value))
	own := protowire.SizeTag(nameField) + protowire.SizeBytes(len(r.Name)) + protowire.SizeTag(versionField) + protowire.SizeBytes(len(r.Version))
	outer := own + protowire.SizeTag(resourcesField) + protowire.SizeBytes(inner)
	b := make([]byte, 0, protowire.SizeTag(resourcesField)+protowire.SizeBytes(outer))
	open := func(field protowire.Number, n int) {
		b = protowire.AppendVarint(protowire.AppendTag(b, field, protowire.BytesType), uint64(n))
	}
	text := func(field protowire.Number, s string) {
		open(field, len(s))
		b = append(b, s...)
	}
	open(resourcesField, outer)
	text(nameField, r.Name)
	text(versionField, r.Version)
	body := len(b)
	open(resourcesField, inner)
	text(typeURLField, r.Body.GetTypeUrl())
	open(valueField, len(value))
	at := len(b)
	b = append(b, value...)
	r.Body.Value = b[at:len(b):len(b)]
	r.piece, r.body, r.size = mem.SliceBuffer(b), mem.SliceBuffer(b[body:]), len(b)
}

// laid returns a resource that is encoded.
func (r *Resource) laid() *Resource {
	if r.piece != nil {
		return r
	}
	c := &Resource{Name: r.Name, Version: r.Version, Body: &anypb.Any{TypeUrl: r.Body.GetTypeUrl(), Value: r.Body.GetValue()}}
	c.lay()
	return c
}

// response is a batch on its way. To a gRPC server without this package's codec it is the message that it stands for.
type response struct {
	delta bool
	batch batch
}

// head is the message without its resources.
func (r *response) head() proto.Message {
	b := r.batch
	if r.delta {
		return &discoveryv3.DeltaDiscoveryResponse{SystemVersionInfo: b.flight.version, TypeUrl: b.sub.typ, Nonce: b.flight.nonce, RemovedResources: b.removed}
	}
	return &discoveryv3.DiscoveryResponse{VersionInfo: b.flight.version, TypeUrl: b.sub.typ, Nonce: b.flight.nonce}
}

// buffers returns the encoding: the head, then the resources, which add to it as protobuf merges fields.
func (r *response) buffers() (mem.BufferSlice, error) {
	head, err := proto.Marshal(r.head())
	if err != nil {
		return nil, err
	}
	out := make(mem.BufferSlice, 1, len(r.batch.adds)+1)
	out[0] = mem.SliceBuffer(head)
	for _, x := range r.batch.adds {
		if x = x.laid(); r.delta {
			out = append(out, x.piece)
		} else {
			out = append(out, x.body)
		}
	}
	return out, nil
}

// size is that of the resources and names in the encoding.
func (r *response) size() (n int) {
	for _, x := range r.batch.adds {
		n += x.size
	}
	for _, name := range r.batch.removed {
		n += len(name) + 2
	}
	return n
}

// ProtoReflect makes the whole message.
func (r *response) ProtoReflect() protoreflect.Message {
	m := r.head()
	switch m := m.(type) {
	case *discoveryv3.DeltaDiscoveryResponse:
		for _, x := range r.batch.adds {
			m.Resources = append(m.Resources, &discoveryv3.Resource{Name: x.Name, Version: x.Version, Resource: x.Body})
		}
	case *discoveryv3.DiscoveryResponse:
		for _, x := range r.batch.adds {
			m.Resources = append(m.Resources, x.Body)
		}
	}
	return m.ProtoReflect()
}

// codec is gRPC's own for everything but responses, which it does not copy.
type codec struct{ encoding.CodecV2 }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if r, ok := v.(*response); ok {
		return r.buffers()
	}
	return c.CodecV2.Marshal(v)
}

// ServerOptions are what a gRPC server should be made with that serves many streams: requests are bounded, responses are
// sent from memory that the streams share, and buffers for reading and writing are small or shared. Other services of the
// server are not affected.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(MaxRequestBytes), grpc.ForceServerCodecV2(codec{encoding.GetCodecV2(encodingproto.Name)}),
		grpc.SharedWriteBuffer(true), grpc.ReadBufferSize(8 << 10),
	}
}
