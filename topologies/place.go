package topologies

import (
	"cmp"
	"net/netip"
	"slices"
	"sort"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Place returns p with its cluster, network and locality filled in where its node does not say: from its workload, then
// from what is configured of its address and cluster. A cluster that this control plane does not read is the local one.
// p itself is not changed.
func Place(snap *mesh.Snapshot, p *mesh.Proxy) *mesh.Proxy {
	q := *p
	if c := snap.Cluster(p.Cluster); c == nil || !c.Managed {
		q.Cluster = snap.Local.ID
	}
	if q.Network == "" || q.Locality == "" {
		w := workload(snap, q.Cluster, q.Namespace, q.Name)
		if w != nil {
			q.Network, q.Locality = cmp.Or(q.Network, w.Network), cmp.Or(q.Locality, w.Locality)
		}
	}
	if q.Network == "" {
		q.Network = networkAt(snap, q.Cluster, q.Addresses)
	}
	return &q
}

// workload finds the workload behind a proxy; it is nil for proxies without a name.
func workload(snap *mesh.Snapshot, cluster mesh.ClusterID, namespace, name string) *mesh.Workload {
	if name == "" {
		return nil
	}
	ws := snap.Workloads
	at := sort.Search(len(ws), func(i int) bool {
		return cmp.Or(cmp.Compare(ws[i].Namespace, namespace), cmp.Compare(ws[i].Name, name)) >= 0
	})
	for ; at < len(ws) && ws[at].Namespace == namespace && ws[at].Name == name; at++ {
		if cmp.Or(ws[at].Cluster, snap.Local.ID) == cluster {
			return ws[at]
		}
	}
	return nil
}

// networkAt is what is configured of an address, else of a cluster.
func networkAt(snap *mesh.Snapshot, cluster mesh.ClusterID, addresses []netip.Addr) mesh.NetworkID {
	best, bits := mesh.NetworkID(""), -1
	for _, n := range snap.Networks {
		for _, c := range n.CIDRs {
			if len(addresses) > 0 && c.Bits() > bits && c.Contains(addresses[0].Unmap()) {
				best, bits = n.ID, c.Bits()
			}
		}
	}
	if best != "" {
		return best
	}
	for _, n := range snap.Networks {
		if slices.Contains(n.Registries, cluster) {
			return n.ID
		}
	}
	if c := snap.Cluster(cluster); c != nil {
		return c.Network
	}
	return snap.Local.Network
}
