package store

import (
	"reflect"
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// sharing returns the input with values that equal those of the one before replaced by those, so that a source may read
// a whole file again for one object that changed. Objects of Istio's types are left as they are: readers may be at work
// in them, and the kinds they are of cost little.
func sharing(old, in mesh.Input) mesh.Input {
	in.Clusters = shared(old.Clusters, in.Clusters)
	in.Services = shared(old.Services, in.Services)
	in.Workloads = shared(old.Workloads, in.Workloads)
	in.Slices = shared(old.Slices, in.Slices)
	in.Exports = shared(old.Exports, in.Exports)
	in.Imports = shared(old.Imports, in.Imports)
	in.Networks = shared(old.Networks, in.Networks)
	return in
}

// shared compares from both ends: what lies between is taken as new.
func shared[T any](old, now []*T) []*T {
	if len(old) == 0 || len(now) == 0 || slices.Equal(old, now) {
		return now
	}
	out := slices.Clone(now)
	same := func(i, j int) bool {
		if old[i] != now[j] && !reflect.DeepEqual(old[i], now[j]) {
			return false
		}
		out[j] = old[i]
		return true
	}
	n := min(len(old), len(now))
	head := 0
	for head < n && same(head, head) {
		head++
	}
	for tail := 1; tail <= n-head && same(len(old)-tail, len(now)-tail); tail++ {
		continue
	}
	if len(old) == len(now) { // most often one object in the middle is another
		for i := head; i < n; i++ {
			same(i, i)
		}
	}
	return out
}
