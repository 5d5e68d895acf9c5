// Package xdsclient subscribes to resources over delta ADS and keeps the subscription alive.
//
// It knows the protocol: subscribing, answering, resuming by version, reconnecting. It does not know what the resources
// mean, and it keeps their versions, never the resources themselves.
package xdsclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

const (
	wildcard = "*"
	// maxResponseBytes is the receive limit; a server that sends more in one message is cut off.
	maxResponseBytes = 64 << 20
	maxNackBytes     = 4096
)

// ErrSilent is the cause of a reconnect when nothing was received for Config.HeartbeatTimeout.
var ErrSilent = errors.New("nothing was received for the heartbeat timeout")

// Backoff says how long to wait between connections: a random time up to Base, doubled with each failure up to Max.
// Smaller values find a server that is back sooner, larger ones spare it when many clients come back at once.
type Backoff struct {
	Base time.Duration // 100 ms when zero
	Max  time.Duration // 1 s when zero
}

// Update is one response of the server.
type Update struct {
	TypeURL string
	Added   []*discoveryv3.Resource // new or changed
	Removed []string
	First   bool // the first response for this type on this connection
}

// Config is what a Client needs: Node, OnUpdate, and either Targets or Dial.
type Config struct {
	// Targets are gRPC targets (host:port, unix:///path), tried in turn.
	Targets []string
	// DialOptions apply to each of them: credentials, keep-alive, a larger receive limit than 64 MiB.
	DialOptions []grpc.DialOption
	// Dial replaces Targets and DialOptions. The Client closes the connection.
	Dial func(ctx context.Context) (*grpc.ClientConn, error)
	// Node is sent with the first request of a stream.
	Node *corev3.Node
	// Subscribe is type URL -> resource names; no names means all resources of the type.
	Subscribe map[string][]string
	// OnUpdate takes a response. An error refuses it: the server is told the text, and the old versions stay. It is
	// called by one goroutine at a time; nothing more is received while it runs.
	OnUpdate func(Update) error
	// OnState is told when a server has accepted the stream (true, nil), and why it ended or was not had (false, err). It
	// may be nil. Calls do not overlap.
	OnState func(connected bool, err error)
	// Resume is what the caller already has, type URL -> name -> version: see Client.Versions.
	Resume map[string]map[string]string
	// Backoff between connections.
	Backoff Backoff
	// ConnectTimeout ends an attempt to open a stream; 5 s when zero. Lower values reach the next target sooner.
	ConnectTimeout time.Duration
	// HeartbeatTimeout ends a connection on which no response came for that long; 0 is never. Set it where the server
	// is known to send something regularly; elsewhere use gRPC keep-alive in DialOptions.
	HeartbeatTimeout time.Duration
	Log              *slog.Logger
}

// Client is a delta ADS client.
type Client struct {
	cfg     Config
	changed chan struct{} // holds one: wanted has changed

	mu       sync.Mutex
	wanted   map[string]names             // what the caller wants; the slices are not written to
	versions map[string]map[string]string // what OnUpdate has accepted
}

// names is one subscription: sorted names, or the wildcard alone.
type names []string

func (n names) all() bool { return len(n) == 1 && n[0] == wildcard }

func (n names) has(name string) bool {
	if n.all() {
		return true
	}
	_, ok := slices.BinarySearch(n, name)
	return ok
}

func newNames(list []string) names {
	if len(list) == 0 || slices.Contains(list, wildcard) {
		return names{wildcard}
	}
	return slices.Compact(slices.Sorted(slices.Values(list)))
}

// New returns a Client that starts nothing.
func New(cfg Config) *Client {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Backoff.Base <= 0 {
		cfg.Backoff.Base = 100 * time.Millisecond
	}
	if cfg.Backoff.Max <= 0 {
		cfg.Backoff.Max = time.Second
	}
	if cfg.ConnectTimeout <= 0 {
		cfg.ConnectTimeout = 5 * time.Second
	}
	if cfg.OnState == nil {
		cfg.OnState = func(bool, error) {}
	}
	c := &Client{cfg: cfg, changed: make(chan struct{}, 1), wanted: map[string]names{}, versions: map[string]map[string]string{}}
	for typ, list := range cfg.Subscribe {
		c.wanted[typ] = newNames(list)
	}
	for typ, versions := range cfg.Resume {
		c.versions[typ] = maps.Clone(versions)
	}
	return c
}

// Subscribe replaces the names of a type; no names means all resources of the type. Resources that are no longer
// subscribed are removed by an Update of the Client's own, at once or with the next connection. It may be called at any
// time.
func (c *Client) Subscribe(typ string, list ...string) {
	wanted := newNames(list)
	c.mu.Lock()
	c.wanted[typ] = wanted
	c.mu.Unlock()
	c.notify()
}

// Unsubscribe ends the subscription to a type.
func (c *Client) Unsubscribe(typ string) {
	c.mu.Lock()
	delete(c.wanted, typ)
	c.mu.Unlock()
	c.notify()
}

func (c *Client) notify() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// Versions returns type URL -> name -> version of everything that OnUpdate has accepted and that was not removed since:
// the Resume of a later Client.
func (c *Client) Versions() map[string]map[string]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]map[string]string, len(c.versions))
	for typ, versions := range c.versions {
		out[typ] = maps.Clone(versions)
	}
	return out
}

// Run connects, again and again. It returns nil only when ctx ends.
func (c *Client) Run(ctx context.Context) error {
	if c.cfg.Dial == nil && len(c.cfg.Targets) == 0 {
		return errors.New("xds client: no server to connect to; set Targets or Dial")
	}
	if c.cfg.OnUpdate == nil {
		return errors.New("xds client: no OnUpdate")
	}
	failures := 0
	for attempt := 0; ; attempt++ {
		served, err := c.connect(ctx, attempt)
		if ctx.Err() != nil {
			c.cfg.OnState(false, ctx.Err())
			return nil
		}
		c.cfg.OnState(false, err)
		if served {
			failures = 0
		}
		wait := c.cfg.Backoff.next(failures)
		failures++
		c.cfg.Log.Debug("xds stream ended", "err", err, "retry", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// next is the full-jitter wait after so many failures in a row.
func (b Backoff) next(failures int) time.Duration {
	ceiling := b.Max
	if failures < 30 && b.Base<<failures < b.Max && b.Base<<failures > 0 {
		ceiling = b.Base << failures
	}
	return rand.N(ceiling)
}

func (c *Client) dial(ctx context.Context, attempt int) (*grpc.ClientConn, error) {
	if c.cfg.Dial != nil {
		return c.cfg.Dial(ctx)
	}
	target := c.cfg.Targets[attempt%len(c.cfg.Targets)]
	opts := append([]grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponseBytes))}, c.cfg.DialOptions...)
	conn, err := grpc.NewClient(target, opts...)
	if err != nil {
		return nil, fmt.Errorf("xds server %s: %w", target, err)
	}
	return conn, nil
}

// connect runs one stream to its end. It says whether the server had been of use.
func (c *Client) connect(ctx context.Context, attempt int) (served bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	connecting := time.AfterFunc(c.cfg.ConnectTimeout, func() {
		cancel(fmt.Errorf("no answer within %v", c.cfg.ConnectTimeout))
	})
	defer connecting.Stop()
	conn, err := c.dial(ctx, attempt)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	target := conn.Target()
	grpcStream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return false, because(ctx, target, err)
	}
	connecting.Stop()
	s := &session{c: c, ads: grpcStream, asked: map[string]names{}, first: map[string]bool{}}
	err = s.run(ctx, cancel)
	return s.served, because(ctx, target, err)
}

// because names the server, and says why we ended a stream ourselves.
func because(ctx context.Context, target string, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	return fmt.Errorf("xds server %s: %w", target, err)
}

// session is one stream.
type session struct {
	c      *Client
	ads    discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	asked  map[string]names // what the server knows that we want
	first  map[string]bool  // types that have had a response
	noded  bool             // the node has been sent
	served bool
}

// received is what the receiving goroutine hands over.
type received struct {
	response *discoveryv3.DeltaDiscoveryResponse // nil: the server has accepted the stream
	err      error
}

func (s *session) run(ctx context.Context, cancel context.CancelCauseFunc) error {
	silence := func() *time.Timer { return nil }
	if d := s.c.cfg.HeartbeatTimeout; d > 0 {
		silence = func() *time.Timer { return time.AfterFunc(d, func() { cancel(ErrSilent) }) }
	}
	timer := silence()
	stop := func() {
		if timer != nil {
			timer.Stop()
		}
	}
	defer func() { stop() }()

	in := make(chan received)
	var receiving sync.WaitGroup
	defer receiving.Wait()
	defer cancel(nil)
	receiving.Go(func() { s.receive(ctx, in) })
	if err := s.subscribe(); err != nil {
		return s.sendError(ctx, in, err)
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.c.changed:
			if err := s.subscribe(); err != nil {
				return s.sendError(ctx, in, err)
			}
		case r := <-in:
			stop()
			if r.err != nil {
				return r.err
			}
			if r.response == nil {
				s.c.cfg.OnState(true, nil)
			} else {
				s.served = true
				if err := s.take(r.response); err != nil {
					return s.sendError(ctx, in, err)
				}
			}
			timer = silence()
		}
	}
}

// receive hands over what the server sends until the stream ends.
func (s *session) receive(ctx context.Context, in chan<- received) {
	hand := func(r received) bool {
		select {
		case in <- r:
			return true
		case <-ctx.Done():
			return false
		}
	}
	if header, _ := s.ads.Header(); header != nil && !hand(received{}) {
		return
	}
	for {
		response, err := s.ads.Recv()
		if !hand(received{response, err}) || err != nil {
			return
		}
	}
}

// sendError returns why the stream has ended: a failed Send only says that it has, the receiver knows the reason.
func (s *session) sendError(ctx context.Context, in <-chan received, err error) error {
	for {
		select {
		case r := <-in:
			if r.err != nil {
				return r.err
			}
		case <-ctx.Done():
			return err
		}
	}
}

// subscribe tells the server what is wanted now and was not before, and the other way round.
func (s *session) subscribe() error {
	var requests []*discoveryv3.DeltaDiscoveryRequest
	var forgotten []Update
	s.c.mu.Lock()
	for typ, versions := range s.c.versions {
		u := Update{TypeURL: typ}
		for name := range versions {
			if !s.c.wanted[typ].has(name) {
				u.Removed = append(u.Removed, name)
				delete(versions, name)
			}
		}
		if len(u.Removed) > 0 {
			slices.Sort(u.Removed)
			forgotten = append(forgotten, u)
		}
	}
	for _, typ := range slices.Sorted(maps.Keys(s.c.wanted)) {
		wanted, asked := s.c.wanted[typ], s.asked[typ]
		req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ}
		if asked == nil {
			req.ResourceNamesSubscribe = wanted
			req.InitialResourceVersions = maps.Clone(s.c.versions[typ])
		} else if req.ResourceNamesSubscribe, req.ResourceNamesUnsubscribe = without(wanted, asked), without(asked, wanted); len(req.ResourceNamesSubscribe)+len(req.ResourceNamesUnsubscribe) == 0 {
			continue
		}
		s.asked[typ] = wanted
		requests = append(requests, req)
	}
	for typ, asked := range s.asked {
		if _, ok := s.c.wanted[typ]; !ok && len(asked) > 0 {
			requests = append(requests, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, ResourceNamesUnsubscribe: asked})
			s.asked[typ] = names{}
		}
	}
	s.c.mu.Unlock()
	for _, u := range forgotten {
		if err := s.c.cfg.OnUpdate(u); err != nil {
			s.c.cfg.Log.Warn("removal of resources that are no longer subscribed was refused", "type", u.TypeURL, "err", err)
		}
	}
	for _, req := range requests {
		if err := s.send(req); err != nil {
			return err
		}
	}
	return nil
}

// without returns the names of a that are not in b. Both are sorted.
func without(a, b names) []string {
	var out []string
	for _, name := range a {
		if _, ok := slices.BinarySearch(b, name); !ok {
			out = append(out, name)
		}
	}
	return out
}

func (s *session) send(req *discoveryv3.DeltaDiscoveryRequest) error {
	if !s.noded {
		s.noded, req.Node = true, s.c.cfg.Node
	}
	return s.ads.Send(req)
}

// take passes a response to OnUpdate and answers it.
func (s *session) take(r *discoveryv3.DeltaDiscoveryResponse) error {
	typ := r.GetTypeUrl()
	u := Update{TypeURL: typ, First: !s.first[typ]}
	if wanted := s.asked[typ]; len(wanted) > 0 {
		for _, a := range r.GetResources() {
			if wanted.has(a.GetName()) { // otherwise it was on its way when it was unsubscribed
				u.Added = append(u.Added, a)
			}
		}
		for _, name := range r.GetRemovedResources() {
			if wanted.has(name) {
				u.Removed = append(u.Removed, name)
			}
		}
		s.first[typ] = true
		if err := s.c.cfg.OnUpdate(u); err != nil {
			s.c.cfg.Log.Warn("xds response refused", "type", typ, "version", r.GetSystemVersionInfo(), "err", err)
			return s.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, ResponseNonce: r.GetNonce(),
				ErrorDetail: &status.Status{Code: int32(codes.InvalidArgument), Message: cut(err.Error())}})
		}
		s.c.accept(u)
	}
	return s.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, ResponseNonce: r.GetNonce()})
}

// accept remembers the versions of an update.
func (c *Client) accept(u Update) {
	c.mu.Lock()
	defer c.mu.Unlock()
	versions := c.versions[u.TypeURL]
	if versions == nil {
		versions = map[string]string{}
		c.versions[u.TypeURL] = versions
	}
	for _, a := range u.Added {
		versions[a.GetName()] = a.GetVersion()
	}
	for _, name := range u.Removed {
		delete(versions, name)
	}
}

// cut shortens text to what a server has to keep.
func cut(text string) string {
	if len(text) <= maxNackBytes {
		return text
	}
	n := maxNackBytes
	for n > 0 && text[n]&0xc0 == 0x80 {
		n--
	}
	return text[:n]
}
