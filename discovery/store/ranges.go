package store

import (
	"cmp"
	"net/netip"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	ranges "github.com/isthmus-mesh/isthmus/internal/cidr"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// ownRanges are the pod ranges of the local cluster that its sources tell.
func ownRanges(inputs []mesh.Input) []netip.Prefix {
	var all []netip.Prefix
	for _, in := range inputs {
		all = append(all, in.PodRanges...)
	}
	return ranges.Aggregate(all)
}

// checkRanges reports clusters on one network whose pods cannot all be reached there, for others have their addresses.
func (b *builder) checkRanges(d *draft) {
	for i, one := range d.Clusters {
		for _, other := range d.Clusters[i+1:] {
			if b.networkOf(d, one) != b.networkOf(d, other) {
				continue
			}
			what := topologies.Overlap(one, other)
			if what == "" {
				continue
			}
			subject := other
			if other == d.Local {
				subject = one
			}
			d.problem(mesh.Problem{
				Object: mesh.ObjectRef{Kind: "Cluster", Name: string(subject.ID)}, Reason: "RangeOverlap",
				Message: what + " share addresses on network " + string(b.networkOf(d, one)),
				Remedy:  "give one cluster other ranges; or give it a network of its own and an east-west gateway; or, if its nodes tell ranges that its pods do not use, say podRanges in its configuration",
			})
		}
	}
}

// networkOf is where the pods of a cluster are unless they say otherwise.
func (b *builder) networkOf(d *draft, c *mesh.Cluster) mesh.NetworkID {
	if c.Managed || c == d.Local {
		return cmp.Or(b.places.Clusters[c.ID], c.Network)
	}
	return c.Network
}
