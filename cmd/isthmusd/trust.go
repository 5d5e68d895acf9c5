package main

import (
	"context"

	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/acks"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store"
	"github.com/isthmus-mesh/isthmus/discovery/translate/socket"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// leads reports whether this replica speaks for the cluster.
func (d *daemon) leads() bool {
	_, here := d.leader()
	return here
}

// acks makes the account of who has the newest roots.
func (d *daemon) acks(st *store.Store, ads *xds.Server, others func(context.Context, string) [][]byte) *acks.Acks {
	return acks.New(acks.Config{
		Local: d.local, Snapshots: st, Roots: d.ca.Roots, Others: others, Leads: d.leads, Update: st.UpdateLocal,
		Accepted: func(version string) map[string]bool { return ads.Accepted(xds.SecretType, socket.Roots, version) },
		Peers:    func() []protocol.Peer { return d.peering.Status().Peers },
	})
}

// listener is what changes of the roots do.
func (d *daemon) listener(st *store.Store) authority.Listener {
	return authority.Listener{
		Leads: d.leads, Lagging: d.behind.Lagging, Problems: st.Sink("ca"), Note: d.audit.Trust,
		Changed: func(roots []byte) {
			d.setTrust(nil)
			st.UpdateLocal(func(local *mesh.Cluster) { local.Roots = roots })
		},
	}
}
