package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// What a cluster says of its ranges arrives; what is wrong in it is left out by itself.
func TestRanges(t *testing.T) {
	dune := &mesh.Cluster{
		ID: "dune", TrustDomain: "dune.mesh", Network: "vpn", PodRanges: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:1::/64")},
		ServiceRanges: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")},
	}
	local := &mesh.Cluster{ID: "amber", Network: "vpn"}
	got, problems := Imports(local, records("dune", ClusterStatement(dune, []byte("key"), nil)), nil, Options{})
	if len(problems) != 0 || len(got) != 1 || !slices.Equal(got[0].Input.Clusters[0].PodRanges, dune.PodRanges) || !slices.Equal(got[0].Input.Clusters[0].ServiceRanges, dune.ServiceRanges) {
		t.Errorf("%v, %+v", problems, got)
	}
	body := &federationv1.Cluster{TrustDomain: "dune.mesh", Network: "vpn", PodRanges: []string{"10.0.1.0/24", "everywhere", "10.0.0.7/24"}}
	got, problems = Imports(local, records("dune", protocol.Statement{Kind: protocol.KindCluster, Body: encode(body)}), nil, Options{})
	if len(problems) != 1 || problems[0].Reason != "BadRange" || problems[0].Field != "podRanges[1]" || fmt.Sprint(got[0].Input.Clusters[0].PodRanges) != "[10.0.0.0/23]" {
		t.Errorf("%v, %+v", problems, got)
	}
	body.PodRanges = slices.Repeat([]string{"10.0.1.0/24"}, maxRanges+1)
	if _, problems = Imports(local, records("dune", protocol.Statement{Kind: protocol.KindCluster, Body: encode(body)}), nil, Options{}); len(problems) != 1 || problems[0].Reason != "TooManyRanges" {
		t.Errorf("%v", problems)
	}
}
