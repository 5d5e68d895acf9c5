package xds

import (
	"context"
	"fmt"
	"slices"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/encoding"
	encodingproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

// TestEqualStreamsShareMemory has streams with feeds of their own, over equal resources, ask for the same: however they
// asked, they hold one list of names and the very set that their feed gave, at first and after changes.
func TestEqualStreamsShareMemory(t *testing.T) {
	texts := typed{ClusterType: {}, EndpointType: {}}
	var names []string
	for i := range 1000 {
		name := fmt.Sprintf("outbound|80||svc-%04d", i)
		names = append(names, name)
		texts[ClusterType][name], texts[EndpointType][name] = "1", "1"
	}
	set := things(texts)
	s := New(Config{Feed: func(Client) (Feed, func(), error) { return newMemory(set), nil, nil }})
	var streams []*stream
	for i := range 4 {
		st, err := s.open(context.Background(), &corev3.Node{Id: "n"}, i < 3)
		if err != nil {
			t.Fatal(err)
		}
		defer s.close(st)
		st.view.publish(set)
		streams = append(streams, st)
	}
	copied := func(list []string) (out []string) { // as another request's
		for _, s := range list {
			out = append(out, string([]byte(s)))
		}
		return out
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(streams[0].deltaRequest(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: EndpointType, ResourceNamesSubscribe: names}))
	must(streams[1].deltaRequest(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: EndpointType, ResourceNamesSubscribe: copied(names[500:])}))
	must(streams[1].deltaRequest(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: EndpointType, ResourceNamesSubscribe: copied(names[:500])}))
	versions := named{}
	for r := range set[EndpointType].All() {
		versions[r.Name] = r.Version
	}
	must(streams[2].deltaRequest(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: EndpointType, ResourceNamesSubscribe: copied(names), InitialResourceVersions: versions}))
	backwards := copied(names)
	slices.Reverse(backwards)
	must(streams[3].sotwRequest(&discoveryv3.DiscoveryRequest{TypeUrl: EndpointType, ResourceNames: backwards}))
	sent := map[int]int{}
	push := func() {
		t.Helper()
		for i, st := range streams {
			must(st.push(func(b batch) error { sent[i] += len(b.adds); st.answered(b.sub, b.flight.nonce, nil); return nil }))
		}
	}
	check := func(set Set) {
		t.Helper()
		for i, st := range streams {
			sub := st.subs[EndpointType]
			if sub.held != set[EndpointType] {
				t.Errorf("stream %d has a copy of what it holds, of %d resources", i, sub.held.Len())
			}
			if sub.named != streams[0].subs[EndpointType].named {
				t.Errorf("stream %d has a list of names of its own", i)
			}
			if len(sub.dirty)+len(sub.gone) > 0 {
				t.Errorf("stream %d still has marks", i)
			}
		}
	}
	push()
	check(set)
	if sent[0] != 1000 || sent[1] != 1000 || sent[2] != 0 || sent[3] != 1000 {
		t.Errorf("sent %v", sent)
	}
	set = Set{ClusterType: set[ClusterType], EndpointType: set[EndpointType].With(thing(EndpointType, names[7], "2"))}
	for _, st := range streams {
		st.view.publish(set)
	}
	push()
	check(set)
	if sent[0] != 1001 || sent[2] != 1 || sent[3] != 1001 {
		t.Errorf("sent %v after one change", sent)
	}
}

// TestMarksAreBounded changes much while a client does not read.
func TestMarksAreBounded(t *testing.T) {
	s := New(Config{Feed: func(Client) (Feed, func(), error) { return newMemory(nil), nil, nil }})
	st, err := s.open(context.Background(), &corev3.Node{Id: "n"}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close(st)
	if err := st.deltaRequest(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: thingType}); err != nil {
		t.Fatal(err)
	}
	for i := range 10_000 {
		st.view.publish(things(typed{thingType: named{"a": fmt.Sprint(i), "b": fmt.Sprint(i / 2)}}))
	}
	if n := len(st.subs[thingType].dirty); n > 200 {
		t.Errorf("%d marks for two names", n)
	}
	var got []*Resource
	if err := st.push(func(b batch) error { got = append(got, b.adds...); return nil }); err != nil || len(got) != 2 {
		t.Errorf("%d resources are sent, %v", len(got), err)
	}
}

// TestWire sends every kind of response both ways: out of the shared bytes, and as gRPC's own codec would.
func TestWire(t *testing.T) {
	own := codec{encoding.GetCodecV2(encodingproto.Name)}
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.StringN(0, 300, -1)
		b := batch{sub: &sub{typ: text.Draw(t, "type")}, flight: flight{nonce: text.Draw(t, "nonce"), version: text.Draw(t, "version")},
			removed: rapid.SliceOfN(text, 0, 3).Draw(t, "removed")}
		for range rapid.IntRange(0, 4).Draw(t, "resources") {
			r := thing(thingType, text.Draw(t, "name"), text.Draw(t, "text"))
			if rapid.Bool().Draw(t, "bare") {
				r = &Resource{Name: r.Name, Version: r.Version, Body: r.Body}
			}
			b.adds = append(b.adds, r)
		}
		for _, delta := range []bool{true, false} {
			r := &response{delta, b}
			var got, want proto.Message = &discoveryv3.DiscoveryResponse{}, &discoveryv3.DiscoveryResponse{}
			if delta {
				got, want = &discoveryv3.DeltaDiscoveryResponse{}, &discoveryv3.DeltaDiscoveryResponse{}
			}
			shared, err := own.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			plain, err := own.CodecV2.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if err := proto.Unmarshal(shared.Materialize(), got); err != nil {
				t.Fatal(err)
			}
			if err := proto.Unmarshal(plain.Materialize(), want); err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(got, want) {
				t.Fatalf("sent %v, not %v", got, want)
			}
		}
	})
}

// TestNames compares sets of names with maps.
func TestNames(t *testing.T) {
	var sets nameSets
	rapid.Check(t, func(t *rapid.T) {
		list := rapid.SliceOf(rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "*"}))
		a, allA := sortedNames(list.Draw(t, "a"))
		b, _ := sortedNames(list.Draw(t, "b"))
		n := sets.of(a)
		if slices.Contains(n.all(), "*") || allA && n.has("*") {
			t.Fatal("the wildcard is a name")
		}
		missing := n.missing(b)
		for _, name := range []string{"a", "b", "c", "d", "e"} {
			if n.has(name) != slices.Contains(a, name) {
				t.Fatalf("has(%s) in %v", name, a)
			}
			if slices.Contains(missing, name) != (slices.Contains(b, name) && !n.has(name)) {
				t.Fatalf("missing %v of %v in %v", missing, b, a)
			}
		}
		both := merged(n.all(), missing)
		if !slices.IsSorted(both) || len(slices.Compact(slices.Clone(both))) != len(both) || len(both) != len(a)+len(missing) {
			t.Fatalf("merged %v", both)
		}
		if again := sets.of(slices.Clone(a)); again != n {
			t.Fatal("two sets of the same names")
		}
	})
}
