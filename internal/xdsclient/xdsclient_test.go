package xdsclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	thing    = "type.googleapis.com/test.Thing"
	patience = 20 * time.Second
)

// scripted is a server whose streams a test drives by hand.
type scripted struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	streams chan *accepted
}

// accepted is one stream at the server. The test ends it with its error.
type accepted struct {
	t   *testing.T
	ads discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	end chan error
}

func (s *scripted) DeltaAggregatedResources(ads discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	a := &accepted{ads: ads, end: make(chan error, 1)}
	select {
	case s.streams <- a:
	case <-ads.Context().Done():
		return nil
	}
	select {
	case err := <-a.end:
		return err
	case <-ads.Context().Done():
		return nil
	}
}

// listen starts a scripted server on loopback and returns its address.
func listen(t *testing.T) (*scripted, string) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &scripted{streams: make(chan *accepted)}
	g := grpc.NewServer(grpc.WaitForHandlers(true))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s)
	done := make(chan struct{})
	go func() { defer close(done); g.Serve(lis) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return s, lis.Addr().String()
}

func (s *scripted) accept(t *testing.T) *accepted {
	t.Helper()
	select {
	case a := <-s.streams:
		a.t = t
		return a
	case <-time.After(patience):
		t.Fatal("no stream came")
		return nil
	}
}

// want receives a request and compares it with its short form, see show.
func (a *accepted) want(want string) *discoveryv3.DeltaDiscoveryRequest {
	a.t.Helper()
	req, err := a.ads.Recv()
	if err != nil {
		a.t.Fatal(err)
	}
	if got := show(req); got != want {
		a.t.Fatalf("received %q, want %q", got, want)
	}
	return req
}

func show(r *discoveryv3.DeltaDiscoveryRequest) string {
	var parts []string
	if r.GetNode() != nil {
		parts = append(parts, "node")
	}
	for _, name := range r.GetResourceNamesSubscribe() {
		parts = append(parts, "+"+name)
	}
	for _, name := range r.GetResourceNamesUnsubscribe() {
		parts = append(parts, "-"+name)
	}
	for name, version := range r.GetInitialResourceVersions() {
		parts = append(parts, name+"@"+version)
	}
	if len(parts) > 0 && len(r.GetInitialResourceVersions()) > 1 {
		slices.Sort(parts[len(parts)-len(r.GetInitialResourceVersions()):])
	}
	if r.GetResponseNonce() != "" {
		if d := r.GetErrorDetail(); d != nil {
			parts = append(parts, "nack "+r.GetResponseNonce()+": "+d.GetMessage())
		} else {
			parts = append(parts, "ack "+r.GetResponseNonce())
		}
	}
	return strings.Join(parts, " ")
}

// send sends "+name@version" and "-name".
func (a *accepted) send(nonce string, changes ...string) {
	a.t.Helper()
	r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: thing, Nonce: nonce}
	for _, c := range changes {
		if name, removed := strings.CutPrefix(c, "-"); removed {
			r.RemovedResources = append(r.RemovedResources, name)
			continue
		}
		name, version, _ := strings.Cut(c[1:], "@")
		r.Resources = append(r.Resources, &discoveryv3.Resource{Name: name, Version: version})
	}
	if err := a.ads.Send(r); err != nil {
		a.t.Fatal(err)
	}
}

// user is what stands behind a client: it writes down what it is told.
type user struct {
	mu     sync.Mutex
	events []string
	more   chan struct{}
}

func (u *user) note(event string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.events = append(u.events, event)
	select {
	case u.more <- struct{}{}:
	default:
	}
}

func (u *user) update(up Update) error {
	event := ""
	if up.First {
		event = "first"
	}
	for _, a := range up.Added {
		event += " +" + a.GetName() + "@" + a.GetVersion()
	}
	for _, name := range up.Removed {
		event += " -" + name
	}
	u.note(strings.TrimSpace(event))
	if strings.Contains(event, "bad") {
		return errors.New("it is bad")
	}
	return nil
}

func (u *user) state(connected bool, err error) {
	event := fmt.Sprintf("connected %v", connected)
	if err != nil {
		event += ": " + err.Error()
	}
	u.note(event)
}

// want waits for the next event to contain text.
func (u *user) want(t *testing.T, text string) {
	t.Helper()
	deadline := time.After(patience)
	for {
		u.mu.Lock()
		if len(u.events) > 0 {
			got := u.events[0]
			u.events = u.events[1:]
			u.mu.Unlock()
			if !strings.Contains(got, text) {
				t.Fatalf("event %q, want %q", got, text)
			}
			return
		}
		u.mu.Unlock()
		select {
		case <-u.more:
		case <-deadline:
			t.Fatalf("no event %q", text)
		}
	}
}

func run(t *testing.T, cfg Config) (*Client, *user) {
	u := &user{more: make(chan struct{}, 1)}
	cfg.OnUpdate, cfg.OnState = u.update, u.state
	cfg.Node = &corev3.Node{Id: "n"}
	cfg.DialOptions = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if cfg.Backoff == (Backoff{}) {
		cfg.Backoff = Backoff{Base: time.Millisecond, Max: 5 * time.Millisecond}
	}
	c := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return c, u
}

func TestStream(t *testing.T) {
	s, addr := listen(t)
	c, u := run(t, Config{Targets: []string{addr}, Subscribe: map[string][]string{thing: nil}, Resume: map[string]map[string]string{thing: {"a": "1"}}})
	a := s.accept(t)
	a.want("node +* a@1")
	a.ads.SendHeader(nil)
	u.want(t, "connected true")
	a.send("n1", "+b@1", "+c@1")
	u.want(t, "first +b@1 +c@1")
	a.want("ack n1")
	a.send("n2", "+b@2", "-c", "-a")
	u.want(t, "+b@2 -c -a")
	a.want("ack n2")
	a.send("n3", "+bad@1")
	u.want(t, "+bad@1")
	a.want("nack n3: it is bad")
	if got := c.Versions()[thing]; len(got) != 1 || got["b"] != "2" {
		t.Errorf("versions: %v", got)
	}
	a.end <- status.Error(codes.Unavailable, "going away")
	u.want(t, "connected false: xds server "+addr+": rpc error: code = Unavailable desc = going away")
	s.accept(t).want("node +* b@2")
}

func TestSubscribe(t *testing.T) {
	s, addr := listen(t)
	c, u := run(t, Config{Targets: []string{addr}, Subscribe: map[string][]string{thing: {"b", "a"}}})
	a := s.accept(t)
	a.want("node +a +b")
	a.send("n1", "+a@1", "+b@1", "+stray@1")
	u.want(t, "connected true")
	u.want(t, "first +a@1 +b@1")
	a.want("ack n1")
	c.Subscribe(thing, "b", "c")
	u.want(t, "-a")
	a.want("+c -a")
	a.send("n2", "+a@2", "+c@1") // a was on its way
	u.want(t, "+c@1")
	a.want("ack n2")
	c.Subscribe(thing)
	a.want("+* -b -c")
	c.Unsubscribe(thing)
	u.want(t, "-b -c")
	a.want("-*")
	c.Subscribe("type.googleapis.com/test.Other", "x")
	a.want("+x")
	c.Subscribe(thing, "z")
	a.want("+z")
	if got := c.Versions()[thing]; len(got) != 0 {
		t.Errorf("versions: %v", got)
	}
}

func TestTargetsInTurn(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := closed.Addr().String()
	closed.Close()
	s, addr := listen(t)
	_, u := run(t, Config{Targets: []string{dead, addr}, Subscribe: map[string][]string{thing: nil}})
	u.want(t, "connected false: xds server "+dead)
	a := s.accept(t)
	a.want("node +*")
	a.end <- status.Error(codes.PermissionDenied, "not of this mesh")
	u.want(t, "not of this mesh") // it was never connected
	u.want(t, "connected false: xds server "+dead)
	s.accept(t)
}

func TestSilenceEndsAConnection(t *testing.T) {
	s, addr := listen(t)
	_, u := run(t, Config{Targets: []string{addr}, Subscribe: map[string][]string{thing: nil}, HeartbeatTimeout: 50 * time.Millisecond})
	s.accept(t) // and say nothing
	u.want(t, ErrSilent.Error())
	a := s.accept(t)
	a.end <- status.Error(codes.Unavailable, "going away")
	s.accept(t)
}

// TestSpeechKeepsAConnection runs in false time: responses come a little before each timeout.
func TestSpeechKeepsAConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const timeout = time.Second
		client, server := newPipe()
		u := &user{more: make(chan struct{}, 1)}
		c := New(Config{Targets: []string{"x"}, OnUpdate: u.update, OnState: u.state, HeartbeatTimeout: timeout,
			Subscribe: map[string][]string{thing: nil}})
		ctx, cancel := context.WithCancelCause(t.Context())
		client.ctx = ctx
		done := make(chan error, 1)
		go func() {
			s := &session{c: c, ads: client, asked: map[string]names{}, first: map[string]bool{}}
			done <- because(ctx, "x", s.run(ctx, cancel))
		}()
		began := time.Now()
		for range 5 {
			<-time.After(timeout * 9 / 10)
			server <- &discoveryv3.DeltaDiscoveryResponse{TypeUrl: thing}
		}
		if err := <-done; !errors.Is(err, ErrSilent) {
			t.Errorf("ended by %v", err)
		}
		if got, want := time.Since(began), 5*timeout*9/10+timeout; got != want {
			t.Errorf("ended after %v, want %v", got, want)
		}
	})
}

// pipe is a client's side of a stream without a network.
type pipe struct {
	grpc.ClientStream
	ctx context.Context
	in  chan *discoveryv3.DeltaDiscoveryResponse
}

func newPipe() (*pipe, chan<- *discoveryv3.DeltaDiscoveryResponse) {
	in := make(chan *discoveryv3.DeltaDiscoveryResponse)
	return &pipe{in: in}, in
}

func (p *pipe) Header() (metadata.MD, error)                  { return metadata.MD{}, nil }
func (p *pipe) Send(*discoveryv3.DeltaDiscoveryRequest) error { return nil }
func (p *pipe) Recv() (*discoveryv3.DeltaDiscoveryResponse, error) {
	select {
	case r := <-p.in:
		return r, nil
	case <-p.ctx.Done():
		return nil, p.ctx.Err()
	}
}

func TestConnectTimeout(t *testing.T) {
	mute, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, never speaks
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	s, addr := listen(t)
	_, u := run(t, Config{Targets: []string{mute.Addr().String(), addr}, Subscribe: map[string][]string{thing: nil}, ConnectTimeout: 50 * time.Millisecond})
	u.want(t, "no answer within 50ms")
	s.accept(t)
}

func TestConfigErrors(t *testing.T) {
	for text, cfg := range map[string]Config{
		"set Targets or Dial": {OnUpdate: func(Update) error { return nil }},
		"no OnUpdate":         {Targets: []string{"127.0.0.1:1"}},
	} {
		if err := New(cfg).Run(context.Background()); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want %q", err, text)
		}
	}
}

func TestBackoff(t *testing.T) {
	b := Backoff{Base: 100 * time.Millisecond, Max: time.Second}
	for failures, ceiling := range map[int]time.Duration{0: 100 * time.Millisecond, 1: 200 * time.Millisecond, 3: 800 * time.Millisecond, 4: time.Second, 100: time.Second} {
		var longest time.Duration
		for range 1000 {
			longest = max(longest, b.next(failures))
		}
		if longest > ceiling || longest < ceiling*9/10 {
			t.Errorf("after %d failures the longest wait is %v, want nearly %v", failures, longest, ceiling)
		}
	}
}
