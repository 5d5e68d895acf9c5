package store

import (
	"net/netip"
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// reach completes the local cluster with the addresses that its own objects tell where the configuration tells none.
func (b *builder) reach(d *draft) {
	local := *d.Local
	if len(local.Gateways) == 0 {
		local.Gateways = b.ownAddresses(d)
	}
	if s := d.byHost[b.cfg.ControlPlaneHost]; s != nil && len(local.ControlPlane) == 0 {
		for _, a := range s.VIPsIn(local.ID) {
			local.ControlPlane = append(local.ControlPlane, netip.AddrPortFrom(a, ControlPlanePort))
		}
	}
	if len(local.PodRanges) == 0 { // those of the configuration win
		local.PodRanges = d.podRanges
	}
	next := &local
	for _, same := range []*mesh.Cluster{d.Local, b.prev.Local} {
		if same != nil && equalCluster(same, next) {
			next = same
			break
		}
	}
	for i, c := range d.Clusters {
		if c == d.Local {
			d.Clusters[i] = next
		}
	}
	d.Local = next
}

// ownAddresses are the gateways of the local cluster on its network. Those known by a host name are left out: what peers
// are told is addresses.
func (b *builder) ownAddresses(d *draft) (out []netip.AddrPort) {
	id := b.places.Clusters[d.Local.ID]
	if id == "" {
		id = d.Local.Network
	}
	n := d.Network(id)
	if n == nil {
		return nil
	}
	for _, g := range n.Gateways {
		a, err := netip.ParseAddr(g.Address)
		if err != nil || a.IsUnspecified() || g.Cluster != "" && g.Cluster != d.Local.ID || g.Port == 0 || g.Port > 65535 {
			continue
		}
		out = append(out, netip.AddrPortFrom(a.Unmap(), uint16(g.Port)))
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}
