package xds

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func ab() Set { return things(typed{thingType: named{"a": "1", "b": "1"}}) }

func TestDelta(t *testing.T) {
	changed := things(typed{thingType: named{"a": "1", "b": "2", "c": "1"}})
	for _, c := range []struct {
		name string
		set  Set
		run  func(d *deltaStream, feed *memory)
	}{
		{"names", ab(), func(d *deltaStream, feed *memory) {
			d.subscribe(thingType, "b")
			d.want("Thing +b=1")
			feed.publish(changed)
			d.want("Thing +b=2")
			d.quiet()
		}},
		{"implicit wildcard", ab(), func(d *deltaStream, feed *memory) {
			d.subscribe(thingType)
			d.want("Thing +a=1 +b=1")
			feed.publish(changed)
			d.want("Thing +b=2 +c=1")
			feed.publish(things(typed{thingType: named{"c": "1"}}))
			d.want("Thing -a -b")
		}},
		{"explicit wildcard", ab(), func(d *deltaStream, feed *memory) {
			d.subscribe(thingType, "*")
			d.want("Thing +a=1 +b=1")
			d.unsubscribe(thingType, "*")
			d.quiet()
			feed.publish(changed)
			d.quiet()
			d.subscribe(thingType, "*")
			d.want("Thing +a=1 +b=2 +c=1")
		}},
		{"empty wildcard is answered", Set{}, func(d *deltaStream, feed *memory) {
			d.subscribe(thingType)
			d.want("Thing")
			feed.publish(ab())
			d.want("Thing +a=1 +b=1")
		}},
		{"unknown names are answered", ab(), func(d *deltaStream, feed *memory) {
			d.subscribe(thingType, "x", "a", "c")
			d.want("Thing +a=1 -c -x")
			d.quiet()
			feed.publish(changed)
			d.want("Thing +c=1")
		}},
		{"a name is asked for again", ab(), func(d *deltaStream, feed *memory) {
			d.subscribe(thingType, "a")
			d.want("Thing +a=1")
			d.subscribe(thingType, "a", "b")
			d.want("Thing +a=1 +b=1")
		}},
		{"unsubscribe", ab(), func(d *deltaStream, feed *memory) {
			d.subscribe(thingType, "a", "b")
			d.want("Thing +a=1 +b=1")
			d.unsubscribe(thingType, "b")
			d.quiet()
			feed.publish(things(typed{thingType: named{"a": "3", "b": "3"}}))
			d.want("Thing +a=3")
			d.subscribe(thingType, "b")
			d.want("Thing +b=3")
		}},
		{"unsubscribe under a wildcard tells what stays", ab(), func(d *deltaStream, feed *memory) {
			d.subscribe(thingType)
			d.want("Thing +a=1 +b=1")
			d.subscribe(thingType, "a", "x")
			d.want("Thing +a=1 -x")
			d.unsubscribe(thingType, "a", "x")
			d.want("Thing +a=1 -x")
			feed.publish(changed)
			d.want("Thing +b=2 +c=1")
		}},
		{"resume a wildcard", ab(), func(d *deltaStream, feed *memory) {
			r := ab()[thingType]
			d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: thingType, InitialResourceVersions: named{"a": r.Get("a").Version, "b": "old", "z": "1"}})
			d.want("Thing +b=1 -z")
			d.quiet()
		}},
		{"resume names", ab(), func(d *deltaStream, feed *memory) {
			r := ab()[thingType]
			d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: thingType, ResourceNamesSubscribe: []string{"a", "z"},
				InitialResourceVersions: named{"a": r.Get("a").Version, "b": "old", "z": "1"}})
			d.want("Thing -z")
			d.quiet()
		}},
		{"refused version is not sent again", ab(), func(d *deltaStream, feed *memory) {
			d.subscribe(thingType)
			r := d.recv()
			d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: thingType, ResponseNonce: r.GetNonce(), ErrorDetail: &rpcstatus.Status{Message: "bad"}})
			d.quiet()
			feed.publish(changed)
			d.want("Thing +b=2 +c=1")
		}},
		{"types and removals in order", things(typed{ClusterType: named{"a": "1"}, EndpointType: named{"a": "1"}, ListenerType: named{"l": "1"},
			RouteType: named{"r": "1"}, thingType: named{"t": "1"}, SecretType: named{"s": "1"}}), func(d *deltaStream, feed *memory) {
			for _, typ := range []string{thingType, SecretType, RouteType, ListenerType, EndpointType, ClusterType} {
				d.subscribe(typ)
				d.recv()
			}
			feed.publish(things(typed{ClusterType: named{"b": "1"}, EndpointType: named{"b": "1"}, ListenerType: named{"m": "1"},
				RouteType: named{"r": "2"}, SecretType: named{"s": "2"}}))
			for _, want := range []string{"Cluster +b=1", "ClusterLoadAssignment +b=1", "Secret +s=2", "Listener +m=1 -l",
				"RouteConfiguration +r=2", "Thing -t", "ClusterLoadAssignment -a", "Cluster -a"} {
				d.want(want)
			}
		}},
		{"nothing is known yet", nil, func(d *deltaStream, feed *memory) {
			d.subscribe(thingType, "a", "x")
			d.subscribe(otherType)
			eventually(d.t, "both requests are in", func() bool { c := d.w.srv.Clients(); return len(c) == 1 && len(c[0].Types) == 2 })
			feed.publish(ab())
			d.want("Other")
			d.want("Thing +a=1 -x")
		}},
		{"a view that falls silent keeps its data", ab(), func(d *deltaStream, feed *memory) {
			d.subscribe(thingType)
			d.want("Thing +a=1 +b=1")
			feed.publish(nil)
			d.quiet()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			feed := newMemory(c.set)
			c.run(serving(t, feed).delta(), feed)
		})
	}
}

func TestStateOfTheWorld(t *testing.T) {
	set := things(typed{ClusterType: named{"a": "a1", "b": "b1"}, EndpointType: named{"a": "a1", "b": "b1"}, thingType: named{"t": "t1"}})
	for _, c := range []struct {
		name string
		run  func(s *sotwStream, feed *memory)
	}{
		{"clusters are sent whole", func(s *sotwStream, feed *memory) {
			s.subscribe(ClusterType)
			s.want("Cluster a1 b1")
			feed.publish(things(typed{ClusterType: named{"a": "a1", "b": "b2"}}))
			s.want("Cluster a1 b2")
			feed.publish(things(typed{ClusterType: named{"b": "b2", "c": "c1"}}))
			s.want("Cluster a1 b2 c1") // first the new
			s.want("Cluster b2 c1")    // then without the old
		}},
		{"endpoints are sent as they change", func(s *sotwStream, feed *memory) {
			s.subscribe(EndpointType, "a", "x")
			s.want("ClusterLoadAssignment a1")
			s.subscribe(EndpointType, "a", "b")
			s.want("ClusterLoadAssignment b1")
			feed.publish(things(typed{EndpointType: named{"a": "a2", "b": "b1"}}))
			s.want("ClusterLoadAssignment a2")
		}},
		{"named listeners are sent whole, and without what is gone", func(s *sotwStream, feed *memory) {
			s.subscribe(ListenerType, "l")
			s.want("Listener")
			feed.publish(things(typed{ListenerType: named{"l": "l1", "m": "m1"}}))
			s.want("Listener l1")
			s.subscribe(ListenerType, "l", "m")
			s.want("Listener l1 m1")
			feed.publish(things(typed{ListenerType: named{"m": "m1"}}))
			s.want("Listener m1")
		}},
		{"wildcard by name, and back", func(s *sotwStream, feed *memory) {
			s.subscribe(thingType, "*")
			s.want("Thing t1")
			s.subscribe(thingType)
			s.subscribe(otherType)
			s.want("Other")
			feed.publish(things(typed{thingType: named{"t": "t2"}, otherType: named{"o": "o1"}}))
			s.want("Other o1")
		}},
		{"a client that has this version is not sent it", func(s *sotwStream, feed *memory) {
			s.subscribe(ClusterType)
			s.want("Cluster a1 b1")
			again := serving(s.t, newMemory(set)).sotw()
			again.send(&discoveryv3.DiscoveryRequest{TypeUrl: ClusterType, VersionInfo: s.last[ClusterType].GetVersionInfo()})
			again.subscribe(thingType)
			again.want("Thing t1")
		}},
		{"overtaken requests are ignored", func(s *sotwStream, feed *memory) {
			s.subscribe(EndpointType, "a")
			if _, err := s.ads.Recv(); err != nil {
				s.t.Fatal(err)
			}
			s.send(&discoveryv3.DiscoveryRequest{TypeUrl: EndpointType, ResourceNames: []string{"b"}, ResponseNonce: "nonsense"})
			s.subscribe(thingType)
			s.want("Thing t1")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			feed := newMemory(set)
			c.run(serving(t, feed).sotw(), feed)
		})
	}
}

func TestStatus(t *testing.T) {
	w := serving(t, newMemory(ab()))
	d := w.delta()
	d.subscribe(thingType, "a", "b")
	r := d.recv()
	long := strings.Repeat("é", maxNackBytes)
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: thingType, ResponseNonce: r.GetNonce(), ErrorDetail: &rpcstatus.Status{Message: "bad " + long}})
	d.quiet()
	find := func() TypeStatus {
		clients := w.srv.Clients()
		if len(clients) != 1 || clients[0].Node.GetId() != "client" || !clients[0].Delta {
			t.Fatalf("clients: %+v", clients)
		}
		for _, s := range clients[0].Types {
			if s.TypeURL == thingType {
				return s
			}
		}
		t.Fatal("no account of the type")
		return TypeStatus{}
	}
	s := find()
	if !strings.HasPrefix(s.Nack, "bad é") || len(s.Nack) > maxNackBytes || s.Acked != "" || s.Sent == "" || s.Nacks != 1 || s.Held != 2 || s.Names != 2 {
		t.Errorf("after a refusal: %+v", s)
	}
	d.subscribe(thingType, "a")
	d.want("Thing +a=1")
	d.quiet()
	if s = find(); s.Nack != "" || s.Acked != s.Sent || s.Acks != 1 || s.Responses != 2 {
		t.Errorf("after acceptance: %+v", s)
	}
	if got := w.sum("isthmus_xds_resources_sent_total"); got != 3 {
		t.Errorf("%v resources counted, want 3", got)
	}
}

func TestLifeOfAStream(t *testing.T) {
	var released, connected, disconnected atomic.Int32
	w := start(t, Config{
		Identify: func(context.Context) (string, error) { return "spiffe://td/x", nil },
		Feed: func(c Client) (Feed, func(), error) {
			if c.Identity != "spiffe://td/x" || c.Addr == "" {
				t.Errorf("client: %+v", c)
			}
			return newMemory(ab()), func() { released.Add(1) }, nil
		},
		Connected: func(Client) func(bool) { connected.Add(1); return func(bool) { disconnected.Add(1) } },
	})
	d := w.delta()
	d.subscribe(thingType, "a")
	d.want("Thing +a=1")
	if connected.Load() != 1 || disconnected.Load() != 0 || released.Load() != 0 {
		t.Error("calls before the end of the stream")
	}
	d.ads.CloseSend()
	eventually(t, "the stream is released", func() bool { return disconnected.Load() == 1 && released.Load() == 1 })
	if n := len(w.srv.views) + len(w.srv.streams); n != 0 {
		t.Errorf("%d views and streams left", n)
	}
}

func TestRefused(t *testing.T) {
	node := &corev3.Node{Id: "n"}
	many := make([]string, MaxNames+1)
	for i := range many {
		many[i] = string(rune('a' + i%26))
	}
	fail := Config{Feed: func(Client) (Feed, func(), error) { return nil, nil, errors.New("node n is not of this mesh") }}
	anonymous := Config{Identify: func(context.Context) (string, error) { return "", errors.New("no certificate") }}
	fine := Config{Feed: func(Client) (Feed, func(), error) { return newMemory(ab()), nil, nil }}
	for _, c := range []struct {
		name string
		cfg  Config
		req  *discoveryv3.DeltaDiscoveryRequest
		code codes.Code
		text string
	}{
		{"no node", fine, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: thingType}, codes.InvalidArgument, "node id"},
		{"unknown node", fail, &discoveryv3.DeltaDiscoveryRequest{Node: node}, codes.PermissionDenied, "node n is not of this mesh"},
		{"no identity", anonymous, &discoveryv3.DeltaDiscoveryRequest{Node: node}, codes.Unauthenticated, "no certificate"},
		{"no type", fine, &discoveryv3.DeltaDiscoveryRequest{Node: node}, codes.InvalidArgument, "type_url"},
		{"long name", fine, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: thingType, ResourceNamesSubscribe: []string{strings.Repeat("x", MaxNameBytes+1)}}, codes.InvalidArgument, "4096"},
		{"many names", fine, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: thingType, ResourceNamesSubscribe: many}, codes.InvalidArgument, "100000"},
		{"long version", fine, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: thingType, InitialResourceVersions: named{"a": strings.Repeat("x", MaxNameBytes+1)}}, codes.InvalidArgument, "4096"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := start(t, c.cfg).delta()
			if err := d.ads.Send(c.req); err != nil {
				t.Fatal(err)
			}
			var err error
			for err == nil {
				_, err = d.ads.Recv()
			}
			if status.Code(err) != c.code || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.code, c.text)
			}
		})
	}
	t.Run("many types", func(t *testing.T) {
		d := start(t, fine).delta()
		for i := range MaxTypes + 1 {
			d.subscribe("t"+string(rune('A'+i)), "x")
		}
		for {
			if _, err := d.ads.Recv(); err != nil {
				if status.Code(err) != codes.InvalidArgument {
					t.Error(err)
				}
				return
			}
		}
	})
}

// TestSlowClient has one client that does not read, while another follows every change.
func TestSlowClient(t *testing.T) {
	big := strings.Repeat("x", 1<<20)
	version := func(n int) Set {
		return things(typed{thingType: named{"big": big + string(rune('0'+n)), "small": string(rune('0' + n))}})
	}
	feed := newMemory(version(0))
	w := serving(t, feed)
	slow, quick := w.delta(), w.delta()
	slow.subscribe(thingType)
	quick.subscribe(thingType, "small")
	quick.want("Thing +small=0")
	for n := 1; n < 10; n++ {
		feed.publish(version(n))
		quick.want("Thing +small=" + string(rune('0'+n)))
	}
	seen := 0
	for last := ""; last != "9"; seen++ {
		r := slow.recv()
		for _, a := range r.GetResources() {
			if a.GetName() == "small" {
				last = text(a.GetResource().GetValue())
			}
		}
	}
	if seen > 5 {
		t.Errorf("the slow client was sent %d responses: it did not skip", seen)
	}
}

// TestWarming checks that a changed cluster's endpoints are sent again: Envoy waits for them.
func TestWarming(t *testing.T) {
	cluster := func(text string) *Resource {
		r := thing(ClusterType, "a", text)
		r.warms = "e"
		return r
	}
	set := func(text string) Set {
		return Set{ClusterType: NamedOf(nil).With(cluster(text)), EndpointType: NamedOf(nil).With(thing(EndpointType, "e", "1"))}
	}
	feed := newMemory(set("1"))
	d := serving(t, feed).delta()
	d.subscribe(ClusterType)
	d.want("Cluster +a=1")
	d.subscribe(EndpointType, "e")
	d.want("ClusterLoadAssignment +e=1")
	feed.publish(set("2"))
	d.want("Cluster +a=2")
	d.want("ClusterLoadAssignment +e=1")
	d.quiet()

	resumed := serving(t, feed).delta()
	resumed.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: ClusterType, InitialResourceVersions: named{"a": "old"}})
	resumed.want("Cluster +a=2")
	resumed.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: EndpointType, ResourceNamesSubscribe: []string{"e"},
		InitialResourceVersions: named{"e": set("1")[EndpointType].Get("e").Version}})
	resumed.want("ClusterLoadAssignment +e=1")
	resumed.quiet()
}

// TestLargeState checks that a delta response stays below what clients receive by default.
func TestLargeState(t *testing.T) {
	set := Set{thingType: NamedOf(nil)}
	body := strings.Repeat("x", 100_000)
	for _, name := range strings.Split(strings.Repeat("n", 99), "") {
		name += string(rune('0' + set[thingType].Len()))
		set[thingType] = set[thingType].With(thing(thingType, name, body))
	}
	d := serving(t, newMemory(set)).delta()
	d.subscribe(thingType)
	for got := 0; got < set[thingType].Len(); {
		got += len(d.recv().GetResources())
	}
	d.quiet()
}

// TestAccepted: who asks for a resource is told apart by whether it has taken that version of it.
func TestAccepted(t *testing.T) {
	set := things(typed{SecretType: named{"a": "1", "b": "1"}})
	feed := newMemory(set)
	w := serving(t, feed)
	d := w.delta()
	d.subscribe(SecretType, "a")
	d.want("Secret +a=1")
	one := set[SecretType].Get("a").Version
	has := func(name, version string) string {
		out := ""
		for _, ok := range w.srv.Accepted(SecretType, name, version) {
			out += map[bool]string{true: "yes", false: "no"}[ok]
		}
		return out
	}
	eventually(t, "the answer is in", func() bool { return has("a", one) == "yes" })
	if got := has("b", one); got != "" {
		t.Errorf("nobody asks for b: %s", got)
	}
	if got := has("a", "other"); got != "no" {
		t.Errorf("another version: %s", got)
	}
	next := things(typed{SecretType: named{"a": "2"}})
	feed.publish(next)
	r := d.recv()
	two := next[SecretType].Get("a").Version
	if got := has("a", two); got != "no" {
		t.Errorf("sent and not answered: %s", got)
	}
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: SecretType, ResponseNonce: r.GetNonce(), ErrorDetail: &rpcstatus.Status{Message: "bad"}})
	eventually(t, "the refusal is in", func() bool { c := w.srv.Clients(); return len(c) == 1 && c[0].Types[0].Nack != "" })
	if got := has("a", two); got != "no" {
		t.Errorf("refused: %s", got)
	}
}
