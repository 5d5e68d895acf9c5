package peering

import (
	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// banned lists the members that said that this cluster is out.
func (p *Peering) banned() map[mesh.ClusterID]bool {
	self, last := string(p.cfg.Core.Name), map[string]*federationv1.Record{}
	for _, r := range p.core.Records() {
		about := r.Kind == protocol.KindMember && r.Key == self || r.Kind == protocol.KindTombstone && r.Key == protocol.KindMember+"/"+self
		if have := last[r.Origin]; about && r.Origin != self && (have == nil || protocol.Compare(have, r) < 0) {
			last[r.Origin] = r
		}
	}
	out := map[mesh.ClusterID]bool{}
	for origin, r := range last {
		if r.Kind == protocol.KindTombstone && !protocol.Withdrawn(r) {
			out[mesh.ClusterID(origin)] = true
		}
	}
	return out
}

// down collects why streams are not up.
func (p *Peering) down() map[mesh.ClusterID]string {
	out := map[mesh.ClusterID]string{}
	for id, l := range p.links {
		if why := l.why.Load(); why != nil {
			out[id] = *why
		}
	}
	return out
}
