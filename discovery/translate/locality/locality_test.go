package locality_test

import (
	"maps"
	"testing"

	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/locality"
)

type setting = networking.LocalityLoadBalancerSetting

func at(place string) *mesh.Endpoint {
	return &mesh.Endpoint{Locality: place, Network: "n2", Cluster: "c2"}
}

func TestPriority(t *testing.T) {
	p := &mesh.Proxy{Locality: "eu/a/1", Network: "n1", Cluster: "c1", Labels: map[string]string{"version": "v1"}, Placed: true}
	failover := &setting{Failover: []*networking.LocalityLoadBalancerSetting_Failover{{From: "us", To: "asia"}, {From: "eu", To: "us"}}}
	labels := &setting{FailoverPriority: []string{"version", "topology.kubernetes.io/region", "topology.istio.io/network=n2"}}
	v1 := at("us")
	v1.Labels = map[string]string{"version": "v1"}
	near := at("eu/b")
	near.Labels = v1.Labels
	for _, c := range []struct {
		name             string
		everywhere, rule *setting
		detects          bool
		endpoint         *mesh.Endpoint
		want             uint32
	}{
		{"no detection", nil, nil, false, at("us"), 0},
		{"subzone", nil, nil, true, at("eu/a/1"), 0},
		{"zone", nil, nil, true, at("eu/a/2"), 1},
		{"region", nil, nil, true, at("eu/b/1"), 2},
		{"elsewhere", nil, nil, true, at("us"), 3},
		{"the region that stands in", nil, failover, true, at("us/x"), 3},
		{"another", nil, failover, true, at("asia/x"), 4},
		{"of the mesh", failover, nil, true, at("asia/x"), 4},
		{"the rule replaces the mesh's", failover, &setting{}, true, at("asia/x"), 3},
		{"off", nil, &setting{Enabled: wrapperspb.Bool(false)}, true, at("us"), 0},
		{"off in the mesh", &setting{Enabled: wrapperspb.Bool(false)}, nil, true, at("us"), 0},
		{"no label", nil, labels, true, at("eu/a/1"), 3},
		{"first label", nil, labels, true, v1, 2},
		{"all labels", nil, labels, true, near, 0},
	} {
		if got := locality.For(c.everywhere, c.rule, c.detects, p).Priority(c.endpoint); got != c.want {
			t.Errorf("%s: priority %d, want %d", c.name, got, c.want)
		}
	}
}

func TestWeights(t *testing.T) {
	s := &setting{Distribute: []*networking.LocalityLoadBalancerSetting_Distribute{
		{From: "us/*", To: map[string]uint32{"us": 100}},
		{From: "eu/a/*", To: map[string]uint32{"eu/*": 70, "eu/c/*": 10, "us/*": 20, "asia": 0}},
	}}
	r := locality.For(nil, s, false, &mesh.Proxy{Locality: "eu/a/1", Placed: true})
	if !r.Distributes() {
		t.Fatal("nothing is distributed")
	}
	got := r.Weights(map[string]uint64{"eu/a/1": 3, "eu/b": 1, "eu/c/1": 9, "us/a": 5, "asia": 7, "africa": 1})
	if want := map[string]uint32{"eu/a/1": 52500, "eu/b": 17500, "eu/c/1": 10000, "us/a": 20000}; !maps.Equal(got, want) {
		t.Errorf("weights %v, want %v", got, want)
	}
	if r := locality.For(nil, s, true, &mesh.Proxy{Locality: "asia", Placed: true}); r.Distributes() || r.Priority(at("us")) != 0 {
		t.Error("a client that no share is for prefers some place")
	}
}
