package topologies

import (
	"cmp"
	"net/netip"
	"slices"
	"sort"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Place returns p with its cluster, network and locality filled in where its node does not say: from its workload, then
// from what is configured of its address and cluster. A network that its node names and nobody else knows, such as the
// cluster's name where none was chosen, gives way to what is said of its workload or cluster: the proxy is on the
// network of its own endpoint. A cluster that this control plane does not read is the local one. p itself is not changed; one that is
// placed already is returned as it is.
func Place(snap *mesh.Snapshot, p *mesh.Proxy) *mesh.Proxy {
	if p.Placed {
		return p
	}
	q := *p
	q.Placed = true
	if c := snap.Cluster(p.Cluster); c == nil || !c.Managed {
		q.Cluster = snap.Local.ID
	}
	said := mesh.NetworkID("")
	if w := workload(snap, q.Cluster, q.Namespace, q.Name); w != nil {
		said, q.Locality = w.Network, cmp.Or(q.Locality, w.Locality)
	}
	if said == "" {
		said = configured(snap, q.Cluster, q.Addresses)
	}
	if q.Network == "" || said != "" && snap.Network(q.Network) == nil {
		q.Network = said
	}
	if q.Network == "" {
		q.Network = snap.Local.Network
		if c := snap.Cluster(q.Cluster); c != nil {
			q.Network = c.Network
		}
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

// configured is the network that the mesh's configuration puts an address on, else a cluster.
func configured(snap *mesh.Snapshot, cluster mesh.ClusterID, addresses []netip.Addr) mesh.NetworkID {
	best, bits := mesh.NetworkID(""), -1
	for _, n := range snap.Networks {
		for _, c := range n.CIDRs {
			if len(addresses) > 0 && c.Bits() > bits && c.Contains(addresses[0].Unmap()) {
				best, bits = n.ID, c.Bits()
			}
		}
	}
	for _, n := range snap.Networks {
		if best == "" && slices.Contains(n.Registries, cluster) {
			best = n.ID
		}
	}
	return best
}
