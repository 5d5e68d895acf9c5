package store

import (
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store/lists"
)

// sharing returns the input with values that equal those of the one before replaced by those, so that a source may read
// a whole file again for one object that changed. Objects of Istio's types are left as they are: readers may be at work
// in them, and the kinds they are of cost little.
func sharing(old, in mesh.Input) mesh.Input {
	in.Clusters = lists.Shared(old.Clusters, in.Clusters)
	in.Services = lists.Shared(old.Services, in.Services)
	in.Workloads = lists.Shared(old.Workloads, in.Workloads)
	in.Slices = lists.Shared(old.Slices, in.Slices)
	in.Exports = lists.Shared(old.Exports, in.Exports)
	in.Imports = lists.Shared(old.Imports, in.Imports)
	in.Networks = lists.Shared(old.Networks, in.Networks)
	return in
}
