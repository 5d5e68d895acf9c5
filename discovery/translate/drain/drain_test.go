package drain

import (
	"fmt"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func TestApply(t *testing.T) {
	at := func(name mesh.ClusterID, drained, weight uint32, f mesh.Freshness) *mesh.Endpoint {
		return &mesh.Endpoint{Cluster: name, Drained: drained, Weight: weight, Freshness: f}
	}
	for _, x := range []struct {
		what string
		in   []*mesh.Endpoint
		want string
	}{
		{"nothing is drained", []*mesh.Endpoint{at("amber", 0, 0, 0), at("birch", 0, 3, 0)}, "amber 1, birch 3"},
		{"by five of twenty", []*mesh.Endpoint{at("amber", 0, 0, 0), at("birch", 5, 3, 0)}, "amber 20, birch 45"},
		{"two of them", []*mesh.Endpoint{at("amber", 0, 0, 0), at("birch", 19, 0, 0), at("cedar", 10, 0, 0)}, "amber 20, birch 1, cedar 10"},
		{"to the end", []*mesh.Endpoint{at("amber", 0, 0, 0), at("birch", 20, 3, 0), at("cedar", 0, 2, 0)}, "amber 1, cedar 2"},
		{"the others are late", []*mesh.Endpoint{at("birch", 20, 0, 0), at("cedar", 0, 0, mesh.Late)}, "cedar 1"},
		{"the others are expired", []*mesh.Endpoint{at("birch", 20, 0, 0), at("cedar", 0, 0, mesh.Expired)}, "birch 1, cedar 20"},
		{"nobody else", []*mesh.Endpoint{at("birch", 20, 4, 0), at("birch", 20, 0, 0)}, "birch 4, birch 1"},
		{"all half", []*mesh.Endpoint{at("birch", 10, 4, 0)}, "birch 4"},
		{"none", nil, ""},
	} {
		kept, weight := Apply(x.in, func(e *mesh.Endpoint) *mesh.Endpoint { return e })
		var got []string
		for _, e := range kept {
			got = append(got, fmt.Sprint(e.Cluster, " ", weight(e)))
		}
		if s := strings.Join(got, ", "); s != x.want {
			t.Errorf("%s: %s, want %s", x.what, s, x.want)
		}
	}
}
