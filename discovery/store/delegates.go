package store

import (
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/delegate"
)

// delegation is what a VirtualService with delegates was joined from, and what came of it.
type delegation struct {
	from     []*mesh.VirtualService // in the order of the references; nil: not there
	exportTo []string
	merged   *mesh.VirtualService
	problems []mesh.Problem
}

// delegates replaces VirtualServices that hand routes over by what they and their delegates say together.
func (b *builder) delegates(d *draft) {
	next := map[*mesh.VirtualService]*delegation{}
	all := d.VirtualServices
	var byName map[delegate.Ref]*mesh.VirtualService
	exportTo := d.MeshConfig.GetSpec().GetDefaultVirtualServiceExportTo()
	for i, vs := range all {
		refs := delegate.Refs(vs)
		if len(refs) == 0 || len(vs.Spec.GetHosts()) == 0 {
			continue
		}
		if byName == nil {
			byName = make(map[delegate.Ref]*mesh.VirtualService, len(all))
			for _, x := range all {
				byName[delegate.Ref{Namespace: x.Object.Namespace, Name: x.Object.Name}] = x
			}
			d.VirtualServices = slices.Clone(all)
		}
		x := &delegation{exportTo: exportTo}
		for _, r := range refs {
			x.from = append(x.from, byName[r])
		}
		if old := b.delegated[vs]; old != nil && slices.Equal(old.from, x.from) && slices.Equal(old.exportTo, exportTo) {
			x = old
		} else {
			x.merged, x.problems = delegate.Merge(vs, func(r delegate.Ref) *mesh.VirtualService { return byName[r] }, exportTo)
		}
		next[vs] = x
		d.VirtualServices[i] = x.merged
		d.Problems = append(d.Problems, x.problems...)
	}
	b.delegated = next
}
