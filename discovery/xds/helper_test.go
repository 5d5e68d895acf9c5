package xds

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	thingType = "type.googleapis.com/test.Thing"
	otherType = "type.googleapis.com/test.Other"
	patience  = 20 * time.Second
)

// memory is a Feed that a test writes.
type memory struct {
	mu       sync.Mutex
	set      Set
	outdated chan struct{}
}

func newMemory(set Set) *memory { return &memory{set: set, outdated: make(chan struct{})} }

func (m *memory) Latest() (Set, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.set, m.outdated
}

func (m *memory) publish(set Set) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set = set.Sharing(m.set)
	close(m.outdated)
	m.outdated = make(chan struct{})
}

// thing makes a resource of any type from text.
func thing(typ, name, text string) *Resource {
	value, err := proto.Marshal(wrapperspb.String(text))
	if err != nil {
		panic(err)
	}
	return newResource(name, typ, value)
}

// things makes a set: {type: {name: text}}.
func things(texts map[string]map[string]string) Set {
	set := Set{}
	for typ, named := range texts {
		all := map[string]*Resource{}
		for name, text := range named {
			all[name] = thing(typ, name, text)
		}
		set[typ] = NamedOf(all)
	}
	return set
}

type named = map[string]string
type typed = map[string]map[string]string

// world is a server on an in-memory listener.
type world struct {
	t    testing.TB
	srv  *Server
	reg  *prometheus.Registry
	grpc *grpc.Server
	lis  *bufconn.Listener
	stop func()
}

func start(t testing.TB, cfg Config) *world {
	reg := prometheus.NewRegistry()
	cfg.Reg = reg
	w := &world{t: t, srv: New(cfg), reg: reg, lis: bufconn.Listen(1 << 16)}
	w.grpc = grpc.NewServer(append(ServerOptions(), grpc.WaitForHandlers(true))...)
	w.srv.Register(w.grpc)
	done := make(chan struct{})
	go func() { defer close(done); w.grpc.Serve(w.lis) }()
	w.stop = sync.OnceFunc(func() { w.grpc.Stop(); <-done })
	t.Cleanup(w.stop)
	return w
}

// serving starts a server with one feed for all.
func serving(t testing.TB, feed Feed) *world {
	return start(t, Config{Feed: func(Client) (Feed, func(), error) { return feed, nil, nil }})
}

func (w *world) dial() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.lis.DialContext(ctx) }))
}

func (w *world) conn() *grpc.ClientConn {
	w.t.Helper()
	c, err := w.dial()
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

// sum adds up a metric over its labels.
func (w *world) sum(name string) (total float64) {
	w.t.Helper()
	families, err := w.reg.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return total
}

// deltaStream is a bare delta client.
type deltaStream struct {
	t      testing.TB
	w      *world
	ads    discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	noded  bool
	fences int
}

func (w *world) delta() *deltaStream {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	w.t.Cleanup(cancel)
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(w.conn()).DeltaAggregatedResources(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return &deltaStream{t: w.t, w: w, ads: ads}
}

func (d *deltaStream) send(req *discoveryv3.DeltaDiscoveryRequest) {
	d.t.Helper()
	if !d.noded {
		d.noded, req.Node = true, &corev3.Node{Id: "client"}
	}
	if err := d.ads.Send(req); err != nil {
		d.t.Fatal(err)
	}
}

func (d *deltaStream) subscribe(typ string, names ...string) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, ResourceNamesSubscribe: names})
}

func (d *deltaStream) unsubscribe(typ string, names ...string) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, ResourceNamesUnsubscribe: names})
}

func (d *deltaStream) recv() *discoveryv3.DeltaDiscoveryResponse {
	d.t.Helper()
	r, err := d.ads.Recv()
	if err != nil {
		d.t.Fatal(err)
	}
	return r
}

// want receives one response, compares it with "TYPE +name=text -name" and accepts it.
func (d *deltaStream) want(want string) {
	d.t.Helper()
	r := d.recv()
	if got := show(r); got != want {
		d.t.Fatalf("received %q, want %q", got, want)
	}
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()})
}

// quiet checks that nothing is on its way, by asking for something that comes after it.
func (d *deltaStream) quiet() {
	d.t.Helper()
	d.fences++
	name := fmt.Sprintf("fence%d", d.fences)
	d.subscribe("zz.Fence", name)
	d.want("Fence -" + name)
}

func show(r *discoveryv3.DeltaDiscoveryResponse) string {
	s := shortName(r.GetTypeUrl())
	for _, a := range r.GetResources() {
		s += " +" + a.GetName() + "=" + text(a.GetResource().GetValue())
	}
	for _, name := range r.GetRemovedResources() {
		s += " -" + name
	}
	return s
}

// text decodes the body of a thing: a string value under 128 bytes.
func text(body []byte) string {
	if len(body) < 2 {
		return ""
	}
	return string(body[2:])
}

// sotwStream is a bare state-of-the-world client.
type sotwStream struct {
	t     testing.TB
	ads   discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	noded bool
	last  map[string]*discoveryv3.DiscoveryResponse
	names map[string][]string
}

func (w *world) sotw() *sotwStream {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	w.t.Cleanup(cancel)
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(w.conn()).StreamAggregatedResources(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return &sotwStream{t: w.t, ads: ads, last: map[string]*discoveryv3.DiscoveryResponse{}, names: map[string][]string{}}
}

func (s *sotwStream) send(req *discoveryv3.DiscoveryRequest) {
	s.t.Helper()
	if !s.noded {
		s.noded, req.Node = true, &corev3.Node{Id: "client"}
	}
	if err := s.ads.Send(req); err != nil {
		s.t.Fatal(err)
	}
}

func (s *sotwStream) subscribe(typ string, names ...string) {
	s.t.Helper()
	s.names[typ] = names
	s.send(&discoveryv3.DiscoveryRequest{TypeUrl: typ, ResourceNames: names,
		VersionInfo: s.last[typ].GetVersionInfo(), ResponseNonce: s.last[typ].GetNonce()})
}

func (s *sotwStream) want(want string) {
	s.t.Helper()
	r, err := s.ads.Recv()
	if err != nil {
		s.t.Fatal(err)
	}
	got := shortName(r.GetTypeUrl())
	for _, a := range r.GetResources() {
		got += " " + text(a.GetValue())
	}
	if got != want {
		s.t.Fatalf("received %q, want %q", got, want)
	}
	s.last[r.GetTypeUrl()] = r
	s.subscribe(r.GetTypeUrl(), s.names[r.GetTypeUrl()]...)
}

// eventually polls until ok, without sleeping between the server's steps longer than it must.
func eventually(t interface {
	Helper()
	Fatalf(string, ...any)
}, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("not within %v: %s", patience, what)
		case <-tick.C:
		}
	}
}
