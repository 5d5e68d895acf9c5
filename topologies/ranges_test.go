package topologies_test

import (
	"net/netip"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/topologies"
)

func TestOverlap(t *testing.T) {
	cluster := func(id, pods, services string) *mesh.Cluster {
		c := &mesh.Cluster{ID: mesh.ClusterID(id)}
		if pods != "" {
			c.PodRanges = []netip.Prefix{netip.MustParsePrefix(pods)}
		}
		if services != "" {
			c.ServiceRanges = []netip.Prefix{netip.MustParsePrefix(services)}
		}
		return c
	}
	a := cluster("a", "10.1.0.0/16", "10.96.0.0/12")
	for _, c := range []struct {
		b    *mesh.Cluster
		want string
	}{
		{cluster("b", "", ""), ""},
		{cluster("b", "10.2.0.0/16", "10.96.0.0/12"), ""},
		{cluster("b", "10.1.4.0/24", ""), "pods of a (10.1.0.0/16) and pods of b (10.1.4.0/24)"},
		{cluster("b", "10.2.0.0/16", "10.1.0.0/20"), "pods of a (10.1.0.0/16) and services of b (10.1.0.0/20)"},
		{cluster("b", "10.97.0.0/16", ""), "services of a (10.96.0.0/12) and pods of b (10.97.0.0/16)"},
	} {
		if got := topologies.Overlap(a, c.b); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
