package xds

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

// TestRestartResendsNothing stops a server under a client and starts another with nearly the same resources.
func TestRestartResendsNothing(t *testing.T) {
	set := things(typed{thingType: named{"a": "1", "b": "1"}, EndpointType: named{"e": "1", "f": "1"}})
	first := serving(t, newMemory(set))
	var current atomic.Pointer[world]
	current.Store(first)
	h := &holding{state: map[string]map[string]string{}}
	var connections atomic.Int32
	client := xdsclient.New(xdsclient.Config{
		Dial:      func(context.Context) (*grpc.ClientConn, error) { return current.Load().dial() },
		Node:      &corev3.Node{Id: "n"},
		Subscribe: map[string][]string{thingType: nil, EndpointType: {"e"}},
		OnUpdate:  h.update,
		OnState: func(connected bool, _ error) {
			if connected {
				connections.Add(1)
			}
		},
		Backoff: xdsclient.Backoff{Base: time.Millisecond, Max: 10 * time.Millisecond},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- client.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	wanted := map[string][]string{thingType: nil, EndpointType: {"e"}}
	eventually(t, "the client has all", func() bool { return h.equal(set, wanted) })
	if got := first.sum("isthmus_xds_resources_sent_total"); got != 3 {
		t.Errorf("%v resources sent at first, want 3", got)
	}

	// The second server sees the same messages, encoded anew.
	feed := newMemory(things(typed{thingType: named{"a": "1", "b": "1"}, EndpointType: named{"e": "1", "f": "1"}}))
	second := serving(t, feed)
	current.Store(second)
	first.stop()
	synced := func(w *world) func() bool {
		return func() bool {
			clients := w.srv.Clients()
			return len(clients) == 1 && len(clients[0].Types) == 2 && clients[0].Types[1].Acked != ""
		}
	}
	eventually(t, "the client is back", synced(second))
	if got := second.sum("isthmus_xds_resources_sent_total"); got != 0 {
		t.Errorf("%v resources sent after a restart, want 0", got)
	}
	feed.publish(things(typed{thingType: named{"a": "1", "c": "1"}, EndpointType: named{"e": "2"}}))
	set, _ = feed.Latest()
	eventually(t, "the client follows", func() bool { return h.equal(set, wanted) })
	if got := second.sum("isthmus_xds_resources_sent_total"); got != 2 {
		t.Errorf("%v resources sent for two changes", got)
	}
	if n := connections.Load(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}

// TestRefusalReachesTheOperator has a client's OnUpdate refuse a resource.
func TestRefusalReachesTheOperator(t *testing.T) {
	feed := newMemory(things(typed{thingType: named{"a": "good"}}))
	w := serving(t, feed)
	h := &holding{state: map[string]map[string]string{}}
	client := xdsclient.New(xdsclient.Config{
		Dial: func(context.Context) (*grpc.ClientConn, error) { return w.dial() },
		Node: &corev3.Node{Id: "n"}, Subscribe: map[string][]string{thingType: nil},
		OnUpdate: func(u xdsclient.Update) error {
			for _, a := range u.Added {
				if text(a.GetResource().GetValue()) == "bad" {
					return errors.New("a is bad")
				}
			}
			return h.update(u)
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- client.Run(ctx) }()
	defer func() { cancel(); <-done }()
	wanted := map[string][]string{thingType: nil}
	good, _ := feed.Latest()
	eventually(t, "the first version arrives", func() bool { return h.equal(good, wanted) })
	feed.publish(things(typed{thingType: named{"a": "bad"}}))
	account := func() TypeStatus { return w.srv.Clients()[0].Types[0] }
	eventually(t, "the refusal is seen", func() bool { return account().Nack == "a is bad" })
	if s := account(); s.Sent == s.Acked || !h.equal(good, wanted) {
		t.Errorf("after a refusal: %+v", s)
	}
	if got := client.Versions()[thingType]["a"]; got != good[thingType].Get("a").Version {
		t.Errorf("the client resumes from the refused version %s", got)
	}
	feed.publish(things(typed{thingType: named{"a": "better"}}))
	better, _ := feed.Latest()
	eventually(t, "the next version is sent", func() bool { return h.equal(better, wanted) && account().Nack == "" })
}
