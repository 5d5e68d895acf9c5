// Package xds serves resources over delta and state-of-the-world ADS.
//
// It knows sets of named, versioned resources, and which streams watch which names. It does not know what the resources
// mean, apart from the order in which Envoy wants some types. A stream costs little memory: what it holds is the set that it
// was sent last, the names that it asks for are one list with those who ask for the same, and what is sent are bytes that
// all streams share.
// Each stream has a sender of its own that takes the newest resource when it gets to it: a slow reader skips revisions
// and never delays another.
package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// Caps on what a client may ask for. A stream that goes over one is ended with InvalidArgument.
const (
	// MaxRequestBytes is the receive limit to give the gRPC server (grpc.MaxRecvMsgSize): a client that resumes with
	// 100,000 resources sends about 10 MB.
	MaxRequestBytes = 16 << 20
	// MaxNames is how many resources of one type a stream may name.
	MaxNames = 100_000
	// MaxHeld is how many resources of one type a stream may say it has when it resumes.
	MaxHeld = 1_000_000
	// MaxNameBytes is the longest resource name, version or type URL.
	MaxNameBytes = 4096
	// MaxTypes is how many resource types a stream may subscribe to.
	MaxTypes = 64

	maxNackBytes  = 4096
	maxBatchBytes = 3 << 20 // a delta response is cut here, below the receive limit that gRPC clients have by default
	maxInFlight   = 16      // delta responses of one type without an answer
)

// Feed is one growing view of the mesh, as equal clients see it.
type Feed interface {
	// Latest returns the newest set and a channel that is closed when it is outdated. A nil set means that nothing is
	// known yet: clients wait, they are not told that there is nothing. A nil set after one with data is ignored.
	Latest() (Set, <-chan struct{})
}

// Judge is a Feed that is told what its clients say to what they were sent.
type Judge interface {
	// Answered reports that a client took resources of a type, or refused some of them with a text. It is called with
	// locks held: it must not block, and must not call back.
	Answered(typ string, sent []*Resource, refusal *string)
}

// Client is who opened a stream.
type Client struct {
	Node     *corev3.Node
	Identity string // SPIFFE id of the authenticated caller; empty on a plaintext port
	Addr     string
}

// Config is what a Server needs. Only Feed is required.
type Config struct {
	// Feed returns the view that the client gets, and what to call when its stream has ended. Clients that get the same
	// Feed (the same pointer) share the comparison of its sets; those whose sets have the same resources, their memory. An error
	// refuses the stream with its text; a gRPC status is passed on as it is.
	Feed func(c Client) (Feed, func(), error)
	// Identify returns who the caller is, from its certificate or its token. An error refuses the stream.
	Identify func(ctx context.Context) (string, error)
	// Connected is called when a client's node is known and its stream is accepted; what it returns, when the stream has
	// ended, clean if the client closed it rather than vanished. Either may be nil.
	Connected func(Client) func(clean bool)
	Log       *slog.Logger
	Reg       prometheus.Registerer
}

// Server is an ADS server. It has no goroutine while it has no stream.
type Server struct {
	cfg      Config
	log      *slog.Logger
	metrics  *metrics
	warmTime time.Duration
	sets     nameSets

	mu      sync.Mutex
	views   map[Feed]*view
	streams map[*stream]struct{}
}

// New returns a Server that starts nothing.
func New(cfg Config) *Server {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{
		cfg: cfg, log: log, metrics: newMetrics(cfg.Reg), warmTime: warmTime,
		views: map[Feed]*view{}, streams: map[*stream]struct{}{},
	}
}

// Register adds the aggregated discovery service to a gRPC server. Make that server with ServerOptions, and
// with keep-alive, so that streams of dead machines end.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(r, ads{s: s})
}

// ads keeps the methods of the gRPC service off the Server.
type ads struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	s *Server
}

// DeltaAggregatedResources serves one delta stream.
func (a ads) DeltaAggregatedResources(g discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return serve(a.s, g, g.Recv, protocol[*discoveryv3.DeltaDiscoveryRequest]{
		delta:  true,
		handle: (*stream).deltaRequest,
		send:   func(b batch) error { return a.s.send(g, &response{true, b}) },
	})
}

// StreamAggregatedResources serves one state-of-the-world stream.
func (a ads) StreamAggregatedResources(g discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return serve(a.s, g, g.Recv, protocol[*discoveryv3.DiscoveryRequest]{
		handle: (*stream).sotwRequest,
		send:   func(b batch) error { return a.s.send(g, &response{false, b}) },
	})
}

func (s *Server) send(g grpc.ServerStream, r *response) error {
	r.batch.sub.count(s.metrics, r)
	return g.SendMsg(r)
}

// protocol is what differs between delta and state of the world.
type protocol[Req any] struct {
	delta  bool
	handle func(*stream, Req) error
	send   func(batch) error
}

// serve runs one stream: requests are taken in by a goroutine of their own, responses are sent by this one.
func serve[Req interface{ GetNode() *corev3.Node }](s *Server, g grpc.ServerStream, recv func() (Req, error), p protocol[Req]) error {
	req, err := recv()
	if err != nil {
		return err
	}
	st, err := s.open(g.Context(), req.GetNode(), p.delta)
	if err != nil {
		return err
	}
	defer s.close(st)
	if err := g.SendHeader(nil); err != nil { // tells the client at once that it is accepted, even if it has all there is
		return err
	}
	ended := make(chan error, 1)
	go func() { // ends with the stream: recv fails once serve has returned
		for {
			if err := p.handle(st, req); err != nil {
				ended <- status.Error(codes.InvalidArgument, err.Error())
				return
			}
			var err error
			if req, err = recv(); err != nil {
				st.clean.Store(errors.Is(err, io.EOF))
				ended <- nil // the client is gone; there is nobody to tell
				return
			}
		}
	}()
	for {
		select {
		case err := <-ended:
			return err
		case <-g.Context().Done():
			return g.Context().Err()
		case <-st.wake:
			if err := st.push(p.send); err != nil {
				return err
			}
		}
	}
}

// open admits a client.
func (s *Server) open(ctx context.Context, node *corev3.Node, delta bool) (*stream, error) {
	if node.GetId() == "" {
		return nil, status.Error(codes.InvalidArgument, "the first request has no node id; set node.id")
	}
	c := Client{Node: node}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		c.Addr = p.Addr.String()
	}
	if s.cfg.Identify != nil {
		id, err := s.cfg.Identify(ctx)
		if err != nil {
			return nil, s.refuse(c, codes.Unauthenticated, err)
		}
		c.Identity = id
	}
	feed, release, err := s.cfg.Feed(c)
	if err == nil && (feed == nil || !reflect.TypeOf(feed).Comparable()) {
		err = errors.New("no resources are served to this node")
	}
	if err != nil {
		if release != nil {
			release()
		}
		return nil, s.refuse(c, codes.PermissionDenied, err)
	}
	st := &stream{client: c, delta: delta, since: time.Now(), log: s.log, metrics: s.metrics,
		wake: make(chan struct{}, 1), subs: map[string]*sub{}, sets: &s.sets,
		warmTime: s.warmTime, cold: map[string]cold{}, ignored: map[string]bool{}}
	st.judge, _ = feed.(Judge)
	st.release = func() {
		if release != nil {
			release()
		}
	}
	s.mu.Lock()
	v := s.views[feed]
	if v == nil {
		v = newView(feed)
		s.views[feed] = v
	}
	st.view, st.slot = v, v.join(st)
	s.streams[st] = struct{}{}
	s.mu.Unlock()
	s.metrics.clients.Inc()
	if s.cfg.Connected != nil {
		st.disconnected = s.cfg.Connected(c)
	}
	s.log.Debug("xds client connected", "node", node.GetId(), "identity", c.Identity, "addr", c.Addr, "delta", delta)
	return st, nil
}

func (s *Server) refuse(c Client, code codes.Code, err error) error {
	s.metrics.refused.Inc()
	s.log.Warn("xds client refused", "node", c.Node.GetId(), "identity", c.Identity, "addr", c.Addr, "err", err)
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	return status.Error(code, err.Error())
}

// close takes the stream out of its view, and ends the view with its last stream.
func (s *Server) close(st *stream) {
	s.mu.Lock()
	delete(s.streams, st)
	last := st.view.leave(st)
	if last {
		delete(s.views, st.view.feed)
	}
	s.mu.Unlock()
	if last {
		st.view.stop()
	}
	s.metrics.clients.Dec()
	st.release()
	if st.disconnected != nil {
		st.disconnected(st.clean.Load())
	}
	s.log.Debug("xds client disconnected", "node", st.client.Node.GetId(), "addr", st.client.Addr)
}

// ClientStatus is one connected client as an operator sees it.
type ClientStatus struct {
	Client
	Delta bool
	Since time.Time
	Types []TypeStatus // in push order
}

// TypeStatus is the account of one resource type on one stream. Versions here are content hashes over all resources of
// the type that the client was sent: equal hashes, equal resources.
type TypeStatus struct {
	TypeURL   string
	Sent      string // version last sent; empty when nothing was
	Acked     string // version last accepted; the client is in sync when it equals Sent
	Nack      string // why the client refused the last version it answered; empty when it accepted it
	Wildcard  bool   // subscribed to everything
	Names     int    // subscribed by name
	Held      int    // resources the client has
	Pending   int    // changes not yet sent
	Responses uint64
	Acks      uint64
	Nacks     uint64
}

// Clients returns the account of every connected client, sorted by node id and address.
func (s *Server) Clients() []ClientStatus {
	s.mu.Lock()
	streams := make([]*stream, 0, len(s.streams))
	for st := range s.streams {
		streams = append(streams, st)
	}
	s.mu.Unlock()
	out := make([]ClientStatus, 0, len(streams))
	for _, st := range streams {
		out = append(out, st.status())
	}
	slices.SortFunc(out, func(a, b ClientStatus) int {
		if d := strings.Compare(a.Node.GetId(), b.Node.GetId()); d != 0 {
			return d
		}
		return strings.Compare(a.Addr, b.Addr)
	})
	return out
}

// Accepted says of each connected client, by node id, that asks for the resource of that type and name whether it has
// accepted this version of it.
func (s *Server) Accepted(typeURL, name, version string) map[string]bool {
	s.mu.Lock()
	streams := slices.Collect(maps.Keys(s.streams))
	s.mu.Unlock()
	out := map[string]bool{}
	for _, st := range streams {
		if asks, has := st.accepted(typeURL, name, version); asks {
			id := st.client.Node.GetId()
			before, twice := out[id]
			out[id] = has && (before || !twice)
		}
	}
	return out
}

func limitError(typ, what string, got, limit int) error {
	return fmt.Errorf("%s: %s: %d is over the limit of %d", typ, what, got, limit)
}
