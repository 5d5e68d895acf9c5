package peering

import (
	"maps"
	"slices"

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

// capGzip is the capability of members whose record stream takes and gives compressed messages. A member that does not
// tell it is spoken to without.
const capGzip = "gzip"

// understands reports whether a member tells a capability. It runs in the goroutine of Run.
func (p *Peering) understands(id mesh.ClusterID, capability string) bool {
	for _, r := range p.status.Load().Peers {
		if r.Name == id && r.Cluster != nil {
			return slices.Contains(r.Cluster.Capabilities, capability)
		}
	}
	return false
}

// changed tells which clusters stand otherwise than before. The replica that speaks does.
func (p *Peering) changed(before *Status, peers []protocol.Peer) {
	if p.cfg.Changed == nil || p.follows != nil || before == nil {
		return
	}
	was := map[mesh.ClusterID]protocol.PeerState{}
	for _, x := range before.Peers {
		was[x.Name] = x.State
	}
	for _, x := range peers {
		if x.State != was[x.Name] {
			p.cfg.Changed(x.Name, was[x.Name], x.State, x.VouchedBy)
		}
		delete(was, x.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(was)) {
		p.cfg.Changed(name, was[name], "", nil)
	}
}
