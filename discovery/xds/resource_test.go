package xds

import (
	"slices"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
)

func TestEncode(t *testing.T) {
	set, err := Encode(
		&clusterv3.Cluster{Name: "c", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}},
		&endpointv3.ClusterLoadAssignment{ClusterName: "c"},
		&dnsv1.Host{Name: "a.b.global"},
		&federationv1.Record{Origin: "amber", Kind: "service", Key: "ns/name"},
		&federationv1.Digest{Origin: "amber"},
	)
	if err != nil {
		t.Fatal(err)
	}
	for typ, name := range map[string]string{
		ClusterType: "c", EndpointType: "c", "type.googleapis.com/isthmus.dns.v1.Host": "a.b.global",
		"type.googleapis.com/isthmus.federation.v1.Record": "amber/service/ns/name",
		"type.googleapis.com/isthmus.federation.v1.Digest": "amber",
	} {
		r := set[typ].Get(name)
		if r == nil || r.Body.GetTypeUrl() != typ || len(r.Version) != 16 {
			t.Errorf("%s %s: %+v", typ, name, r)
		}
	}
	if got := set[ClusterType].Get("c").warms; got != "c" {
		t.Errorf("the cluster waits for endpoints %q", got)
	}
	for name, bad := range map[string][]proto.Message{
		"no name": {&clusterv3.Cluster{}},
		"no such": {wrapperspb.String("x")},
		"twice":   {&clusterv3.Cluster{Name: "c"}, &clusterv3.Cluster{Name: "c"}},
		"invalid": {&clusterv3.Cluster{Name: "c\xff"}},
	} {
		if set, err := Encode(bad...); err == nil {
			t.Errorf("%s: got %v, want an error", name, set)
		}
	}
	if NewResource("x", &clusterv3.Cluster{Name: "c\xff"}) != nil {
		t.Error("a message that cannot be encoded became a resource")
	}
}

func TestSharing(t *testing.T) {
	old := things(typed{thingType: named{"a": "1", "b": "1"}, otherType: named{"o": "1"}})
	next := things(typed{thingType: named{"a": "1", "b": "2"}, otherType: named{"o": "1"}}).Sharing(old)
	if next[thingType].Get("a") != old[thingType].Get("a") || next[thingType].Get("b") == old[thingType].Get("b") || next[otherType] != old[otherType] {
		t.Error("resources are not shared by version")
	}
	if got := diff(old[thingType], next[thingType]); !slices.Equal(got, []string{"b"}) {
		t.Errorf("differences: %v", got)
	}
	if got := diff(old[otherType], next[otherType]); got != nil {
		t.Errorf("differences: %v", got)
	}
	if got := diff(next[thingType], nil); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("differences: %v", got)
	}
	if Set(nil).Sharing(old) != nil {
		t.Error("nothing known became nothing there")
	}
}
