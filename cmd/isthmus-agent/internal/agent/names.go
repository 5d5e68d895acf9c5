package agent

import (
	"context"
	"fmt"
	"maps"
	"net"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/dns"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/upstream"
	"github.com/isthmus-mesh/isthmus/dns/zone"
	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

const hostType = "type.googleapis.com/isthmus.dns.v1.Host"

// xdsNode is the agent's own node: that of its proxy, and what extra says.
func (a *agent) xdsNode(extra map[string]any) (*corev3.Node, error) {
	meta := a.node.Metadata()
	maps.Copy(meta, extra)
	s, err := structpb.NewStruct(meta)
	if err != nil {
		return nil, fmt.Errorf("node metadata: %w", err)
	}
	return &corev3.Node{Id: a.node.ID(), Cluster: a.node.Name + "." + a.node.Namespace, Metadata: s}, nil
}

// addNames adds the DNS server and the stream that feeds it. On a machine that stream is its registration, too: it ends
// cleanly at a clean stop, and only then.
func (a *agent) addNames() error {
	servers, err := resolvers(a.c)
	if err != nil {
		return err
	}
	log := a.log.With("part", "dns")
	server := dns.New(dns.Config{
		Port: a.c.DNS.Port, Upstream: servers, Log: log,
		Dialer: func() net.Dialer { return *upstream.NetDialer(captures(a.c)) },
	})
	extra := map[string]any{}
	if a.c.Role == config.Machine {
		extra["ISTHMUS_MACHINE"] = "true"
	}
	node, err := a.xdsNode(extra)
	if err != nil {
		return err
	}
	end := &streamEnd{}
	names := zone.New(nil, zone.Options{Zones: dns.Zones, Recursive: true})
	client := xdsclient.New(xdsclient.Config{
		Node: node, Log: log, Subscribe: map[string][]string{hostType: nil},
		Dial: func(ctx context.Context) (*grpc.ClientConn, error) {
			return a.connect(ctx, grpc.WithChainStreamInterceptor(end.intercept))
		},
		OnUpdate: guarded(func(u xdsclient.Update) error {
			changed := make(map[string]*dnsv1.Host, len(u.Added))
			for _, r := range u.Added {
				h := new(dnsv1.Host)
				if err := r.GetResource().UnmarshalTo(h); err != nil {
					return fmt.Errorf("host %s: %w", r.GetName(), err)
				}
				changed[r.GetName()] = h
			}
			names = names.With(changed, u.Removed)
			server.Set(names)
			return nil
		}),
		OnState: func(connected bool, err error) {
			if connected {
				log.Info("names and registration connected")
			} else {
				log.Debug("names and registration not connected", "err", err)
			}
		},
	})
	a.parts = append(a.parts,
		part{"dns", server.Run},
		part{"names", func(ctx context.Context) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			end.stop(cancel)
			return client.Run(ctx)
		}})
	if a.c.Role == config.Machine {
		a.leave = end.leave
	}
	return nil
}

// guarded makes a panic over a response a refusal of it: the names that are there are answered on, and the proxy runs on.
func guarded(take func(xdsclient.Update) error) func(xdsclient.Update) error {
	return func(u xdsclient.Update) (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("panic: %v", p)
			}
		}()
		return take(u)
	}
}

// streamEnd half-closes the newest stream on demand, which tells the control plane that the end is meant.
type streamEnd struct {
	mu     sync.Mutex
	stream *endableStream
	cancel context.CancelFunc
	ended  bool
}

type endableStream struct {
	grpc.ClientStream
	mu   sync.Mutex // SendMsg and CloseSend exclude each other
	once sync.Once
	done chan struct{}
}

// SendMsg sends unless the stream is being half-closed.
func (s *endableStream) SendMsg(m any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ClientStream.SendMsg(m)
}

// RecvMsg notices the stream's end.
func (s *endableStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err != nil {
		s.once.Do(func() { close(s.done) })
	}
	return err
}

func (e *streamEnd) intercept(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	e.mu.Lock()
	ended := e.ended
	e.mu.Unlock()
	if ended {
		return nil, context.Canceled
	}
	inner, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	s := &endableStream{ClientStream: inner, done: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stream = s
	return s, nil
}

func (e *streamEnd) stop(cancel context.CancelFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cancel = cancel
}

// leave half-closes the stream, waits a little for the control plane to end it, and lets no other begin.
func (e *streamEnd) leave() {
	e.mu.Lock()
	s, cancel := e.stream, e.cancel
	e.ended = true
	e.mu.Unlock()
	if s != nil {
		s.mu.Lock()
		_ = s.CloseSend()
		s.mu.Unlock()
		select {
		case <-s.done:
		case <-time.After(2 * time.Second):
		}
	}
	if cancel != nil {
		cancel()
	}
}
