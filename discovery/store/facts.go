package store

import (
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// exportable reports whether other clusters can reach what is declared: an ExternalName Service only names a host.
func exportable(decl *mesh.ServiceDecl) bool {
	return !(decl.Object.Kind == "Service" && decl.External)
}

// stateFacts puts on the exported Service what multi-cluster services compare. The ServiceExport is nil for a Service
// that is exported by label; one that is exported by both is as old as its ServiceExport.
func (d *draft) stateFacts(decl *mesh.ServiceDecl, x *mesh.Export) {
	s := d.byHost[mesh.LocalHost(decl.Object.Name, decl.Object.Namespace)]
	if s == nil || !s.Exported || decl.Facts == nil {
		return
	}
	if x == nil {
		s.Facts = decl.Facts
		return
	}
	facts := *decl.Facts
	facts.Created, facts.Labels, facts.Annotations = x.Created, x.Labels, x.Annotations
	s.Facts = &facts
}

// facts are those of all exports of the name taken together.
func (m *merged) facts() *mesh.Facts {
	var exporters []mesh.Exporter
	if m.local != nil {
		exporters = append(exporters, mesh.Exporter{Cluster: m.cluster, Facts: m.local.Facts})
	}
	for _, i := range m.imports {
		exporters = append(exporters, mesh.Exporter{Cluster: i.Cluster, Facts: i.Facts})
	}
	slices.SortFunc(exporters, mesh.CompareExporters)
	if f := mesh.Settle(exporters); f != nil {
		return f
	}
	return &mesh.Facts{} // exported, by clusters that tell nothing of it
}
