package policy

import (
	"net/netip"
	"slices"
	"strconv"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/internal/cidr"
)

// Described returns what a cluster's description of itself says of its place: name, network and address ranges. What is
// wrong in it is left out.
func Described(id mesh.ClusterID, body *federationv1.Cluster) *mesh.Cluster {
	in := &importer{id: id}
	ref := in.ref("Cluster", "", string(id))
	return &mesh.Cluster{
		ID: id, TrustDomain: mesh.TrustDomain(body.GetTrustDomain()), Network: mesh.NetworkID(body.GetNetwork()),
		PodRanges: in.readRanges(ref, "podRanges", body.GetPodRanges()), ServiceRanges: in.readRanges(ref, "serviceRanges", body.GetServiceRanges()),
	}
}

func (in *importer) readRanges(ref mesh.ObjectRef, field string, ranges []string) (out []netip.Prefix) {
	for i, s := range ranges {
		if i >= maxRanges {
			in.problem(ref, field, "TooManyRanges", "%d address ranges, %d are allowed", len(ranges), maxRanges)
			break
		}
		one, wrong := cidr.Parse(ranges[i : i+1])
		if wrong != "" || len(one) == 0 {
			in.problem(ref, field+"["+strconv.Itoa(i)+"]", "BadRange", "address range %s is not ADDRESS/BITS", quote(s))
			continue
		}
		out = append(out, one...)
	}
	return slices.Clip(cidr.Aggregate(out))
}
