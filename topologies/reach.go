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
	// NoGateway: Direct, but only because no gateway is known of the network that the endpoint is on.
	NoGateway bool
	Via       []netip.AddrPort // gateways by address; those by name are in Network. None and not Direct: unreachable
	// Network is the endpoint's network when it is one of this control plane's own: its gateways are told the service
	// (server name outbound_.PORT_.SUBSET_.HOST) and choose the pod. Nil when Via are a peer's: they are told the pod.
	Network *mesh.Network
}

// Reachable reports whether there is any way at all.
func (p Path) Reachable() bool { return p.Direct || len(p.Via) > 0 || p.Network != nil }

// Reach says how a proxy on network from gets to e. Endpoints without mesh TLS are never offered across networks: a
// gateway forwards mutual TLS only. A network of this control plane that has no gateway is called directly, as Istio does.
func Reach(snap *mesh.Snapshot, from mesh.NetworkID, e *mesh.Endpoint) Path {
	if e.Network == from || e.Network == "" || from == "" {
		return Path{Direct: true}
	}
	c := snap.Cluster(e.Cluster)
	if IsPeer(snap, c) {
		if !e.TLS {
			return Path{}
		}
		return Path{Via: c.Gateways}
	}
	if n := snap.Network(e.Network); n != nil && len(n.Gateways) > 0 {
		if !e.TLS {
			return Path{}
		}
		return Path{Via: addresses(n), Network: n}
	}
	if e.Network != mesh.ExternalNetwork && snap.Local != nil && e.Cluster == snap.Local.ID && len(snap.Local.Gateways) > 0 {
		switch {
		case e.TLS:
			return Path{Via: snap.Local.Gateways}
		case e.Network == snap.Local.Network:
			return Path{}
		}
	}
	return Path{Direct: true, NoGateway: true}
}

// IsPeer reports whether the cluster has a control plane of its own that is not the local one.
func IsPeer(snap *mesh.Snapshot, c *mesh.Cluster) bool {
	return c != nil && !c.Managed && (snap.Local == nil || c.ID != snap.Local.ID)
}

func addresses(n *mesh.Network) (out []netip.AddrPort) {
	for _, g := range n.Gateways {
		if a, err := netip.ParseAddr(g.Address); err == nil {
			out = append(out, netip.AddrPortFrom(a.Unmap(), uint16(g.Port)))
		}
	}
	return out
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
