package policy

import (
	"net/netip"
	"slices"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Memo is what Imports read last. Its zero value is ready; it is for one local cluster, and not safe for concurrent use.
// Only services in which nothing is wrong are kept: the others say again what is.
type Memo struct {
	local *mesh.Cluster
	own   []netip.Prefix
	old   map[memoKey]read
	next  map[memoKey]read
}

type memoKey struct {
	id  mesh.ClusterID
	key string
}

// read is what came of a service, and all that it depends on.
type read struct {
	service, endpoints *federationv1.Record
	trustDomain        mesh.TrustDomain
	network            mesh.NetworkID
	freshness          mesh.Freshness
	drained            uint32
	imp                *mesh.Import
}

// turn begins a call. What was not asked for in the last one is forgotten.
func (m *Memo) turn(local *mesh.Cluster, own []netip.Prefix) {
	if m == nil {
		return
	}
	m.old, m.next = m.next, map[memoKey]read{}
	if m.local == nil || m.local.ID != local.ID || m.local.Network != local.Network || !slices.Equal(m.own, own) {
		m.old = nil
	}
	m.local, m.own = local, slices.Clone(own)
}

// recall gives the service as it was read before, or reads it.
func (in *importer) recall(service, endpoints *federationv1.Record) {
	m := in.o.Memo
	if m == nil {
		in.readService(service, endpoints)
		return
	}
	key := memoKey{in.id, service.Key}
	now := read{service: service, endpoints: endpoints, trustDomain: in.cluster.TrustDomain, network: in.cluster.Network, freshness: in.cluster.Freshness, drained: in.o.Drained[in.id]}
	was := m.old[key]
	now.imp = was.imp
	if was.imp != nil && was == now && in.endpoints+len(was.imp.Endpoints) <= in.o.MaxEndpoints {
		in.imports = append(in.imports, was.imp)
		in.endpoints += len(was.imp.Endpoints)
		m.next[key] = now
		return
	}
	problems, more, imports := len(in.problems), in.more, len(in.imports)
	in.readService(service, endpoints)
	if len(in.problems) == problems && in.more == more && len(in.imports) == imports+1 {
		now.imp = in.imports[imports]
		m.next[key] = now
	}
}
