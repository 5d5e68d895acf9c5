package topologies

import (
	"fmt"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/internal/cidr"
)

// Overlap says which ranges of two clusters share addresses, so that pods could not reach each other if both are on one
// network; empty: none do, as far as they are known. That both give the same addresses to their services is no harm: a
// cluster's own are used in it alone.
func Overlap(a, b *mesh.Cluster) string {
	if x, y, ok := cidr.Overlap(a.PodRanges, b.PodRanges); ok {
		return fmt.Sprintf("pods of %s (%s) and pods of %s (%s)", a.ID, x, b.ID, y)
	}
	if x, y, ok := cidr.Overlap(a.PodRanges, b.ServiceRanges); ok {
		return fmt.Sprintf("pods of %s (%s) and services of %s (%s)", a.ID, x, b.ID, y)
	}
	if x, y, ok := cidr.Overlap(a.ServiceRanges, b.PodRanges); ok {
		return fmt.Sprintf("services of %s (%s) and pods of %s (%s)", a.ID, x, b.ID, y)
	}
	return ""
}
