// Package ads carries Envoy's aggregated discovery streams to the control plane and back, byte for byte. It reads none
// of the messages; somebody else may.
package ads

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/upstream"
)

const service = "/envoy.service.discovery.v3.AggregatedDiscoveryService/"

// Config is what a Proxy needs.
type Config struct {
	// Connect gives an authenticated connection to the control plane; the Proxy closes it.
	Connect func(ctx context.Context) (*grpc.ClientConn, error)
	// Peek is shown each response of the control plane before Envoy gets it. It must not keep it. Nil: nobody looks.
	Peek func(delta bool, response []byte)
	Log  *slog.Logger
}

// Proxy forwards streams.
type Proxy struct {
	c      Config
	active atomic.Int64
}

// New returns a Proxy; it starts nothing.
func New(c Config) *Proxy { return &Proxy{c: c} }

// Connected returns how many streams lead to the control plane now.
func (p *Proxy) Connected() int { return int(p.active.Load()) }

// ServerOptions makes a gRPC server forward the discovery streams. Every other method is
// refused, so the server is for this alone.
func (p *Proxy) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(rawCodec{}),
		grpc.UnknownServiceHandler(p.handle),
		grpc.MaxRecvMsgSize(upstream.MaxMessage), grpc.MaxSendMsgSize(upstream.MaxMessage),
	}
}

func (p *Proxy) handle(_ any, down grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(down)
	switch method {
	case service + "StreamAggregatedResources", service + "DeltaAggregatedResources":
	default:
		return status.Errorf(codes.Unimplemented, "the agent forwards aggregated discovery only, not %s", method)
	}
	ctx, cancel := context.WithCancel(down.Context())
	defer cancel()
	conn, err := p.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	up, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method, grpc.ForceCodecV2(rawCodec{}))
	if err != nil {
		p.c.Log.Warn("control plane refused the stream", "address", upstream.Address(conn), "err", err)
		return lost(err)
	}
	p.active.Add(1)
	defer p.active.Add(-1)
	p.c.Log.Info("stream to the control plane open", "address", upstream.Address(conn))

	go func() { // Envoy -> control plane; ends when this handler has returned, as RecvMsg then fails
		for {
			var f frame
			if err := down.RecvMsg(&f); err != nil {
				if errors.Is(err, io.EOF) {
					_ = up.CloseSend() // its own error comes out of RecvMsg below
				} else {
					cancel()
				}
				return
			}
			if up.SendMsg(&f) != nil {
				return // RecvMsg below gives the reason
			}
		}
	}()
	for { // control plane -> Envoy
		var f frame
		if err := up.RecvMsg(&f); err != nil {
			if down.Context().Err() != nil {
				return nil
			}
			p.c.Log.Warn("stream to the control plane ended", "address", upstream.Address(conn), "err", err)
			return lost(err)
		}
		if p.c.Peek != nil {
			p.c.Peek(method == service+"DeltaAggregatedResources", f.data)
		}
		if err := down.SendMsg(&f); err != nil {
			return err
		}
	}
}

// connect tries until it has a connection or Envoy's stream ends: an empty stream tells Envoy nothing, so it keeps what
// it has, and it is served the moment a control plane is back.
func (p *Proxy) connect(ctx context.Context) (*grpc.ClientConn, error) {
	for attempt := 0; ; attempt++ {
		conn, err := p.c.Connect(ctx)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		if attempt%10 == 0 {
			p.c.Log.Warn("control plane not reached", "attempt", attempt+1, "err", err)
		}
		timer := time.NewTimer(upstream.Backoff(attempt, 100*time.Millisecond, time.Second, rand.Float64()))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, status.FromContextError(ctx.Err()).Err()
		case <-timer.C:
		}
	}
}

// lost turns the end of the upstream stream into what makes Envoy come back with the versions it has.
func lost(err error) error {
	if errors.Is(err, io.EOF) {
		return status.Error(codes.Unavailable, "the control plane ended the stream")
	}
	return status.Errorf(codes.Unavailable, "control plane: %s", status.Convert(err).Message())
}

// frame is one message as it came.
type frame struct{ data []byte }

type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return nil, status.Errorf(codes.Internal, "cannot forward a %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(f.data)}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return status.Errorf(codes.Internal, "cannot forward a %T", v)
	}
	f.data = data.Materialize()
	return nil
}
