package xds

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

var (
	allTypes = []string{ClusterType, EndpointType, RouteType, thingType}
	allNames = []string{"a", "b", "c", "d", "e", "f"}
)

// byNode serves each node a feed of its own.
type byNode struct{ feeds sync.Map }

func (b *byNode) feed(c Client) (Feed, func(), error) {
	f, ok := b.feeds.Load(c.Node.GetId())
	if !ok {
		return nil, nil, fmt.Errorf("no node %s", c.Node.GetId())
	}
	return f.(Feed), nil, nil
}

func drawSet(t *rapid.T) Set {
	texts := rapid.MapOf(rapid.SampledFrom(allTypes), rapid.MapOf(rapid.SampledFrom(allNames), rapid.SampledFrom([]string{"1", "2", "3"}))).Draw(t, "set")
	for _, named := range texts {
		for name := range named {
			named[name] = name + named[name] // a state-of-the-world response has no names beside the bodies
		}
	}
	return warming(things(texts))
}

func drawNames(t *rapid.T) []string {
	return rapid.SliceOfNDistinct(rapid.SampledFrom(append([]string{"unknown"}, allNames...)), 0, 5, rapid.ID).Draw(t, "names")
}

// holding is a delta client's state: what OnUpdate has been told.
type holding struct {
	mu    sync.Mutex
	state map[string]map[string]string // type -> name -> version
}

func (h *holding) update(u xdsclient.Update) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state[u.TypeURL] == nil {
		h.state[u.TypeURL] = map[string]string{}
	}
	for _, a := range u.Added {
		h.state[u.TypeURL][a.GetName()] = a.GetVersion()
	}
	for _, name := range u.Removed {
		delete(h.state[u.TypeURL], name)
	}
	return nil
}

func (h *holding) equal(set Set, wanted map[string][]string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, typ := range allTypes {
		want := map[string]string{}
		if names, ok := wanted[typ]; ok {
			for r := range set[typ].All() {
				name := r.Name
				if len(names) == 0 || slices.Contains(names, name) {
					want[name] = r.Version
				}
			}
		}
		if !maps.Equal(h.state[typ], want) {
			return false
		}
	}
	return true
}

// TestDeltaConverges drives a client by any sequence of sets, subscriptions and restarts: in the end it holds exactly
// what it subscribes to.
func TestDeltaConverges(t *testing.T) {
	nodes := &byNode{}
	w := start(t, Config{Feed: nodes.feed})
	w.srv.warmTime = 5 * time.Millisecond
	var serial atomic.Int64
	rapid.Check(t, func(rt *rapid.T) {
		feed := newMemory(drawSet(rt))
		node := "n" + strconv.FormatInt(serial.Add(1), 10)
		nodes.feeds.Store(node, feed)
		defer nodes.feeds.Delete(node)
		h := &holding{state: map[string]map[string]string{}}
		wanted := map[string][]string{}
		var client *xdsclient.Client
		stop := func() {}
		launch := func(resume map[string]map[string]string) {
			client = xdsclient.New(xdsclient.Config{
				Dial: func(context.Context) (*grpc.ClientConn, error) { return w.dial() },
				Node: &corev3.Node{Id: node}, Subscribe: wanted, OnUpdate: h.update, Resume: resume,
			})
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- client.Run(ctx) }()
			stop = func() { cancel(); <-done }
		}
		launch(nil)
		defer func() { stop() }()
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			switch rapid.IntRange(0, 6).Draw(rt, "step") {
			case 0, 1, 2:
				feed.publish(drawSet(rt))
			case 3, 4:
				typ, names := rapid.SampledFrom(allTypes).Draw(rt, "type"), drawNames(rt)
				wanted[typ] = names
				client.Subscribe(typ, names...)
			case 5:
				typ := rapid.SampledFrom(allTypes).Draw(rt, "type")
				delete(wanted, typ)
				client.Unsubscribe(typ)
			case 6:
				stop()
				launch(client.Versions())
			}
		}
		set, _ := feed.Latest()
		eventually(rt, fmt.Sprintf("the client, subscribed to %v, holds %v", wanted, set), func() bool { return h.equal(set, wanted) })
	})
}

// TestStateOfTheWorldConverges does it for the state-of-the-world protocol. There a client is not told that a resource
// which it has named is gone, apart from clusters and listeners.
func TestStateOfTheWorldConverges(t *testing.T) {
	nodes := &byNode{}
	w := start(t, Config{Feed: nodes.feed})
	w.srv.warmTime = 5 * time.Millisecond
	var serial atomic.Int64
	rapid.Check(t, func(rt *rapid.T) {
		feed := newMemory(drawSet(rt))
		node := "n" + strconv.FormatInt(serial.Add(1), 10)
		nodes.feeds.Store(node, feed)
		defer nodes.feeds.Delete(node)
		c := newSotwClient(t, w, node)
		defer c.stop()
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			if rapid.Bool().Draw(rt, "publish") {
				feed.publish(drawSet(rt))
			} else {
				c.subscribe(rapid.SampledFrom(allTypes).Draw(rt, "type"), drawNames(rt))
			}
		}
		set, _ := feed.Latest()
		eventually(rt, fmt.Sprintf("the client holds %v", set), func() bool { return c.equal(set) })
	})
}

// sotwClient follows the protocol's rules: one goroutine answers, and every request repeats the last nonce.
type sotwClient struct {
	ads  discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	stop func()

	mu    sync.Mutex // also over Send
	noded *corev3.Node
	names map[string][]string
	named map[string]bool // has ever named a resource of the type
	last  map[string]*discoveryv3.DiscoveryResponse
	state map[string]map[string]string // type -> name -> text
}

func newSotwClient(t *testing.T, w *world, node string) *sotwClient {
	conn, err := w.dial()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c := &sotwClient{ads: ads, noded: &corev3.Node{Id: node}, names: map[string][]string{}, named: map[string]bool{},
		last: map[string]*discoveryv3.DiscoveryResponse{}, state: map[string]map[string]string{}}
	done := make(chan struct{})
	c.stop = func() { cancel(); <-done; conn.Close() }
	go func() {
		defer close(done)
		for {
			r, err := ads.Recv()
			if err != nil {
				return
			}
			c.take(r)
		}
	}()
	return c
}

func (c *sotwClient) wildcard(typ string) bool { return len(c.names[typ]) == 0 && !c.named[typ] }

func (c *sotwClient) take(r *discoveryv3.DiscoveryResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	typ := r.GetTypeUrl()
	if c.state[typ] == nil || typ == ClusterType || c.wildcard(typ) {
		c.state[typ] = map[string]string{}
	}
	for _, a := range r.GetResources() {
		name, value := text(a.GetValue())[:1], text(a.GetValue())
		c.state[typ][name] = value
	}
	c.last[typ] = r
	c.send(typ)
}

func (c *sotwClient) subscribe(typ string, names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.names[typ] = names
	if len(names) > 0 {
		c.named[typ] = true
	}
	c.send(typ)
}

func (c *sotwClient) send(typ string) {
	req := &discoveryv3.DiscoveryRequest{Node: c.noded, TypeUrl: typ, ResourceNames: c.names[typ],
		VersionInfo: c.last[typ].GetVersionInfo(), ResponseNonce: c.last[typ].GetNonce()}
	c.noded = nil
	c.ads.Send(req)
}

func (c *sotwClient) equal(set Set) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for typ, names := range c.names {
		for name := range c.state[typ] {
			if (typ == ClusterType && slices.Contains(names, name) || c.wildcard(typ)) && set[typ].Get(name) == nil {
				return false
			}
		}
		for r := range set[typ].All() {
			name := r.Name
			if (c.wildcard(typ) || slices.Contains(names, name)) && c.state[typ][name] != text(r.Body.GetValue()) {
				return false
			}
		}
	}
	return true
}
