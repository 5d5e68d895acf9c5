// Package topologies says who reaches whom, directly or through which gateways. It holds values and pure functions
// only; translations, peering, status, tests and the documentation all ask it, so that there is one answer.
package topologies

import (
	"net/netip"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Name is a named topology as the documentation describes it.
type Name string

const (
	// SingleVPN: one flat pod network, no gateway between clusters.
	SingleVPN Name = "single-vpn"
	// Gateways: separate networks behind gateways, one trust domain.
	Gateways Name = "gateway"
	// MultiControlPlane: every cluster has its own control plane, root and network.
	MultiControlPlane Name = "multi-control-plane"
)

// Path is how one network reaches an endpoint.
type Path struct {
	Direct bool
	Via    []netip.AddrPort // the gateways of the endpoint's cluster; empty with Direct false: unreachable
}

// Reachable reports whether there is any way at all.
func (p Path) Reachable() bool { return p.Direct || len(p.Via) > 0 }

// Reach says how a proxy on network from gets to e. Endpoints without mesh TLS are never offered across networks:
// a gateway forwards mutual TLS only.
func Reach(snap *mesh.Snapshot, from mesh.NetworkID, e *mesh.Endpoint) Path {
	if e.Network == from || e.Network == "" || from == "" {
		return Path{Direct: true}
	}
	if !e.TLS {
		return Path{}
	}
	if c := snap.Cluster(e.Cluster); c != nil {
		return Path{Via: c.Gateways}
	}
	return Path{}
}

// Between names the topology of two clusters.
func Between(a, b *mesh.Cluster) Name {
	switch {
	case a.Network == b.Network:
		return SingleVPN
	case a.TrustDomain == b.TrustDomain:
		return Gateways
	default:
		return MultiControlPlane
	}
}
