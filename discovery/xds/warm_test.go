package xds

import (
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
)

// warmSet is a cluster and its endpoints for each name, and a listener and a route that say the text.
func warmSet(text, clusters string) Set {
	set := things(typed{ListenerType: named{"l": text}, RouteType: named{"r": text}})
	for _, name := range strings.Fields(clusters) {
		c := thing(ClusterType, name, name)
		c.warms = "e" + name
		set[ClusterType], set[EndpointType] = set[ClusterType].With(c), set[EndpointType].With(thing(EndpointType, c.warms, name))
	}
	return set
}

// warming has every cluster of the set wait for endpoints of the same name.
func warming(set Set) Set {
	for c := range set[ClusterType].All() {
		c.warms = c.Name
	}
	return set
}

// TestMakeBeforeBreak adds a cluster with the route to it to a client that has routes, and looks when they are sent.
func TestMakeBeforeBreak(t *testing.T) {
	updates := []string{"Listener +l=2", "RouteConfiguration +r=2"}
	for _, c := range []struct {
		name string
		time time.Duration
		run  func(d *deltaStream, feed *memory)
		want []string
	}{
		{"endpoints are asked for, sent and accepted", time.Hour, func(d *deltaStream, feed *memory) {
			d.want("Cluster +b=b")
			d.quiet()
			d.subscribe(EndpointType, "eb")
			r := d.recv()
			if got := show(r); got != "ClusterLoadAssignment +eb=b" {
				d.t.Fatal(got)
			}
			d.quiet()
			d.accept(r)
		}, append(updates, "ClusterLoadAssignment -ea", "Cluster -a")},
		{"endpoints are never asked for", 100 * time.Millisecond, func(d *deltaStream, feed *memory) {
			began := time.Now()
			d.want("Cluster +b=b")
			for _, want := range append(updates, "ClusterLoadAssignment -ea", "Cluster -a") {
				d.want(want)
			}
			if took := time.Since(began); took < 50*time.Millisecond {
				d.t.Errorf("sent after %v", took)
			}
			// Nor are they waited for again.
			d.w.patient()
			next := warmSet("3", "b")
			next[ClusterType] = next[ClusterType].With(thing(ClusterType, "b", "b2"))
			next[ClusterType].Get("b").warms = "eb"
			feed.publish(next)
			d.want("Cluster +b=b2")
		}, []string{"Listener +l=3", "RouteConfiguration +r=3"}},
		{"endpoints are not accepted", 100 * time.Millisecond, func(d *deltaStream, feed *memory) {
			d.want("Cluster +b=b")
			d.subscribe(EndpointType, "eb")
			if got := show(d.recv()); got != "ClusterLoadAssignment +eb=b" {
				d.t.Fatal(got)
			}
		}, updates},
		{"the cluster is refused", time.Hour, func(d *deltaStream, feed *memory) {
			r := d.recv()
			d.quiet()
			d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: ClusterType, ResponseNonce: r.GetNonce(), ErrorDetail: &rpcstatus.Status{Message: "bad"}})
		}, updates},
		{"the endpoints are not wanted any more", time.Hour, func(d *deltaStream, feed *memory) {
			d.want("Cluster +b=b")
			d.subscribe(EndpointType, "eb")
			d.recv()
			d.quiet()
			d.unsubscribe(EndpointType, "eb")
		}, updates},
		{"the cluster is gone again", time.Hour, func(d *deltaStream, feed *memory) {
			d.want("Cluster +b=b")
			d.quiet()
			feed.publish(warmSet("2", "a"))
		}, append(updates, "Cluster -b")},
		{"another cluster comes meanwhile", time.Hour, func(d *deltaStream, feed *memory) {
			d.want("Cluster +b=b")
			d.subscribe(EndpointType, "eb")
			r := d.recv()
			feed.publish(warmSet("3", "b c"))
			d.want("Cluster +c=c")
			d.accept(r)
			d.quiet()
			d.subscribe(EndpointType, "ec")
			d.want("ClusterLoadAssignment +ec=c")
		}, []string{"Listener +l=3", "RouteConfiguration +r=3", "ClusterLoadAssignment -ea", "Cluster -a"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			feed := newMemory(warmSet("1", "a"))
			w := serving(t, feed)
			w.srv.warmTime = c.time
			d := w.delta()
			d.subscribe(ClusterType)
			d.want("Cluster +a=a")
			d.subscribe(EndpointType, "ea")
			d.want("ClusterLoadAssignment +ea=a")
			d.subscribe(ListenerType)
			d.want("Listener +l=1")
			d.subscribe(RouteType, "r")
			d.want("RouteConfiguration +r=1")
			feed.publish(warmSet("2", "b"))
			c.run(d, feed)
			for _, want := range c.want {
				d.want(want)
			}
		})
	}
}

// TestFirstConnectionDoesNotWait has a client that asks for listeners and routes before it has warmed its clusters.
func TestFirstConnectionDoesNotWait(t *testing.T) {
	w := serving(t, newMemory(warmSet("1", "a")))
	w.srv.warmTime = time.Hour
	d := w.delta()
	d.subscribe(ClusterType)
	d.want("Cluster +a=a")
	d.subscribe(ListenerType)
	d.want("Listener +l=1")
	d.subscribe(RouteType, "r")
	d.want("RouteConfiguration +r=1")
	d.quiet()
}

// TestMakeBeforeBreakAfterReconnection has a client come back with an older version of everything.
func TestMakeBeforeBreakAfterReconnection(t *testing.T) {
	w := serving(t, newMemory(warmSet("2", "a b")))
	w.srv.warmTime = time.Hour
	d := w.delta()
	old := warmSet("1", "a")
	resume := func(typ, name string, subscribe ...string) {
		d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, ResourceNamesSubscribe: subscribe, InitialResourceVersions: named{name: old[typ].Get(name).Version}})
	}
	resume(ClusterType, "a")
	d.want("Cluster +b=b")
	resume(RouteType, "r", "r")
	d.quiet()
	d.subscribe(EndpointType, "eb")
	d.want("ClusterLoadAssignment +eb=b")
	d.want("RouteConfiguration +r=2")
}

func TestMakeBeforeBreakStateOfTheWorld(t *testing.T) {
	for _, c := range []struct {
		name string
		time time.Duration
		run  func(s *sotwStream)
	}{
		{"endpoints are asked for", time.Hour, func(s *sotwStream) {
			s.subscribe(otherType, "o")
			s.subscribe(thingType)
			s.want("Thing t2")
			s.subscribe(EndpointType, "ea", "eb")
			s.want("ClusterLoadAssignment b")
		}},
		{"endpoints are never asked for", 100 * time.Millisecond, func(s *sotwStream) {
			s.subscribe(thingType)
			s.want("Thing t2")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			set := func(text, clusters string) Set {
				set := warmSet(text, clusters)
				set[thingType] = set[thingType].With(thing(thingType, "t", "t"+text))
				return set
			}
			feed := newMemory(set("1", "a"))
			w := serving(t, feed)
			w.srv.warmTime = c.time
			s := w.sotw()
			s.subscribe(ClusterType)
			s.want("Cluster a")
			s.subscribe(EndpointType, "ea")
			s.want("ClusterLoadAssignment a")
			s.subscribe(ListenerType)
			s.want("Listener 1")
			s.subscribe(RouteType, "r")
			s.want("RouteConfiguration 1")
			feed.publish(set("2", "b"))
			s.want("Cluster a b")
			c.run(s)
			s.want("Listener 2")
			s.want("RouteConfiguration 2")
			s.want("Cluster b")
		})
	}
}

// accept answers a response.
func (d *deltaStream) accept(r *discoveryv3.DeltaDiscoveryResponse) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()})
}

// patient makes all streams wait as long as the test.
func (w *world) patient() {
	w.srv.mu.Lock()
	defer w.srv.mu.Unlock()
	for st := range w.srv.streams {
		st.mu.Lock()
		st.warmTime = time.Hour
		st.mu.Unlock()
	}
}
