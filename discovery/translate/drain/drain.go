// Package drain gives the endpoints of a cluster that is drained less of the traffic.
package drain

import (
	"cmp"
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Apply leaves out the endpoints of clusters that are drained to the end, where others serve that are not expired, and
// returns how to weigh the rest. While some are drained more than others, each has as many parts of its weight as are
// left of mesh.DrainSteps, one at least; otherwise it has its weight.
func Apply[E any](found []E, of func(E) *mesh.Endpoint) ([]E, func(*mesh.Endpoint) uint64) {
	gone := func(e E) bool { return of(e).Drained >= mesh.DrainSteps }
	if slices.ContainsFunc(found, func(e E) bool { return !gone(e) && of(e).Freshness != mesh.Expired }) {
		found = slices.DeleteFunc(found, gone)
	}
	uneven := slices.ContainsFunc(found, func(e E) bool { return of(e).Drained != of(found[0]).Drained })
	return found, func(e *mesh.Endpoint) uint64 {
		w := uint64(cmp.Or(e.Weight, 1))
		if uneven {
			w *= uint64(mesh.DrainSteps - min(e.Drained, mesh.DrainSteps-1))
		}
		return w
	}
}
