package store

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// defaultRegistry is Istio's name for the cluster of the control plane, where none was given.
const defaultRegistry mesh.ClusterID = "Kubernetes"

// places says which network an address is on that does not say so itself.
type places struct {
	CIDRs    []cidr                            // the longest prefix first
	Clusters map[mesh.ClusterID]mesh.NetworkID // by registry, else what the cluster says
}

type cidr struct {
	Prefix  netip.Prefix
	Network mesh.NetworkID
}

// of returns the network of an address in a cluster, empty when nothing is known. With rule only what the mesh's
// configuration says of the address counts.
func (p *places) of(id mesh.ClusterID, address string, rule bool) mesh.NetworkID {
	if len(p.CIDRs) > 0 {
		if a, err := netip.ParseAddr(address); err == nil {
			for _, c := range p.CIDRs {
				if c.Prefix.Contains(a.Unmap()) {
					return c.Network
				}
			}
		}
	}
	if rule {
		return ""
	}
	return p.Clusters[id]
}

// clusters completes the list: a cluster that objects come from and that nobody described is a managed one.
func (d *draft) clusters(inputs []mesh.Input) {
	known := map[mesh.ClusterID]*mesh.Cluster{d.Local.ID: d.Local}
	d.Clusters = []*mesh.Cluster{d.Local}
	add := func(c *mesh.Cluster) {
		have := known[c.ID]
		switch {
		case have == nil:
			known[c.ID] = c
			d.Clusters = append(d.Clusters, c)
		case c.Managed != have.Managed || c.Managed && !equalCluster(c, have):
			d.problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Cluster", Name: string(c.ID)}, Reason: "ClusterNameTaken", Message: fmt.Sprintf("two clusters are called %s", c.ID),
				Remedy: "give one of them another name: it is the key of its remote secret, or the name it joined by"})
		}
	}
	for _, managed := range []bool{false, true} { // of one name a peer counts
		for _, in := range inputs {
			for _, c := range in.Clusters {
				if c.Managed == managed {
					add(c)
				}
			}
		}
	}
	d.podRanges = ownRanges(inputs)
	imply := func(id mesh.ClusterID) {
		if id != "" && known[id] == nil {
			add(&mesh.Cluster{ID: id, TrustDomain: d.Local.TrustDomain, Managed: true})
		}
	}
	for _, in := range inputs {
		for _, s := range in.Services {
			imply(s.Cluster)
		}
		for _, w := range in.Workloads {
			imply(w.Cluster)
		}
		for _, s := range in.Slices {
			imply(s.Cluster)
		}
	}
	slices.SortFunc(d.Clusters, func(a, b *mesh.Cluster) int { return cmp.Compare(a.ID, b.ID) })
}

// managed reports whether the control plane reads other clusters.
func (d *draft) managed() bool {
	return slices.ContainsFunc(d.Clusters, func(c *mesh.Cluster) bool { return c.Managed })
}

// networks adds up what is said of each network and finds out who is on which.
func (d *draft) networks(inputs []mesh.Input) *places {
	byID := map[mesh.NetworkID]*mesh.Network{}
	for _, in := range inputs {
		for _, n := range in.Networks {
			d.addNetwork(byID, n)
		}
	}
	p := &places{Clusters: map[mesh.ClusterID]mesh.NetworkID{}}
	for _, c := range d.Clusters {
		if (c.Managed || c.ID == d.Local.ID) && c.Network != "" {
			p.Clusters[c.ID] = c.Network
		}
	}
	claimed := map[mesh.ClusterID]mesh.NetworkID{}
	for _, id := range slices.Sorted(maps.Keys(byID)) {
		n := byID[id]
		d.Networks = append(d.Networks, n)
		for _, x := range n.CIDRs {
			p.CIDRs = append(p.CIDRs, cidr{x, id})
		}
		for i, r := range n.Registries {
			if r == defaultRegistry && d.Cluster(r) == nil {
				r = d.Local.ID
				n.Registries[i] = r
			}
			other, taken := claimed[r]
			switch c := d.Cluster(r); {
			case c == nil || !c.Managed && c.ID != d.Local.ID:
				d.problem(mesh.Problem{Object: n.Object, Field: "networks." + string(id) + ".endpoints", Reason: "UnknownRegistry", Message: fmt.Sprintf("fromRegistry %s is no cluster that this control plane reads", r),
					Remedy: "write the name of a cluster: the key of its remote secret"})
			case taken:
				d.problem(mesh.Problem{Object: n.Object, Field: "networks." + string(id) + ".endpoints", Reason: "RegistryTaken", Message: fmt.Sprintf("cluster %s is already on network %s", r, other), Remedy: "leave it in one network"})
			default:
				claimed[r] = id
				p.Clusters[r] = id
			}
		}
		slices.Sort(n.Registries)
	}
	slices.SortFunc(p.CIDRs, func(a, b cidr) int {
		return cmp.Or(cmp.Compare(b.Prefix.Bits(), a.Prefix.Bits()), a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Network, b.Network))
	})
	d.ownGateways(p.Clusters[d.Local.ID])
	return p
}

// ownGateways gives the local network the gateways of isthmusd's own configuration when the mesh's names none.
func (d *draft) ownGateways(id mesh.NetworkID) {
	if len(d.Networks) == 0 && !d.managed() || id == "" || len(d.Local.Gateways) == 0 {
		return
	}
	i, found := slices.BinarySearchFunc(d.Networks, id, func(n *mesh.Network, id mesh.NetworkID) int { return cmp.Compare(n.ID, id) })
	if !found {
		d.Networks = slices.Insert(d.Networks, i, &mesh.Network{ID: id, Object: mesh.ObjectRef{Kind: "Cluster", Name: string(d.Local.ID)}})
	}
	n := d.Networks[i]
	if len(n.Gateways) > 0 {
		return
	}
	for _, a := range d.Local.Gateways {
		n.Gateways = append(n.Gateways, mesh.NetworkGateway{Object: n.Object, Address: a.Addr().Unmap().String(), Port: uint32(a.Port()), Cluster: d.Local.ID})
	}
	slices.SortFunc(n.Gateways, compareGateways)
}

// addNetwork adds one source's word on a network, without what cannot be used.
func (d *draft) addNetwork(byID map[mesh.NetworkID]*mesh.Network, in *mesh.Network) {
	n := byID[in.ID]
	if n == nil {
		n = &mesh.Network{ID: in.ID, Object: in.Object}
		byID[in.ID] = n
	}
	for _, g := range in.Gateways {
		if why := badGateway(g); why != "" {
			d.problem(mesh.Problem{Object: g.Object, Field: "networks." + string(in.ID) + ".gateways", Reason: "BadGateway", Message: fmt.Sprintf("gateway %q port %d of network %s %s", g.Address, g.Port, in.ID, why),
				Remedy: "write the address under which other networks reach the gateway"})
			continue
		}
		i, found := slices.BinarySearchFunc(n.Gateways, g, compareGateways)
		if !found {
			n.Gateways = slices.Insert(n.Gateways, i, g)
		} else if g.Object.String() < n.Gateways[i].Object.String() {
			n.Gateways[i] = g
		}
	}
	n.CIDRs = union(n.CIDRs, in.CIDRs, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	n.Registries = union(n.Registries, in.Registries, cmp.Compare[mesh.ClusterID])
}

func union[T any](a, b []T, compare func(T, T) int) []T {
	out := slices.SortedFunc(slices.Values(slices.Concat(a, b)), compare)
	return slices.CompactFunc(out, func(x, y T) bool { return compare(x, y) == 0 })
}

func compareGateways(a, b mesh.NetworkGateway) int {
	return cmp.Or(strings.Compare(a.Address, b.Address), cmp.Compare(a.Port, b.Port))
}

// badGateway says why nobody can dial the gateway, or nothing.
func badGateway(g mesh.NetworkGateway) string {
	if g.Port == 0 || g.Port > 65535 {
		return "has no port from 1 to 65535"
	}
	if a, err := netip.ParseAddr(g.Address); err == nil {
		if a.IsUnspecified() {
			return "stands for all addresses, it has yet to be set"
		}
		return ""
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(g.Address, "."), ".") {
		if !mesh.IsLabel(label) {
			return "is neither an IP address nor a host name"
		}
	}
	return ""
}

// place gives each workload the network that the rules put it on. A copy is kept as long as the original and the
// network stay, so that pointers compare equal.
func (b *builder) place(d *draft) {
	if len(d.Networks) == 0 && !d.managed() {
		b.placed = nil
		return
	}
	next := map[*mesh.Workload]*mesh.Workload{}
	for i, w := range d.Workloads {
		if placed := b.placeOne(w); placed != w {
			next[w], d.Workloads[i] = placed, placed
		}
	}
	b.placed = next
}

// placeOne returns w on the network that it is on, w itself when that is the local one or w says so.
func (b *builder) placeOne(w *mesh.Workload) *mesh.Workload {
	if w.Network != "" || len(w.Addresses) == 0 {
		return w
	}
	id := b.clusterOf(w.Cluster)
	n := b.places.of(id, w.Addresses[0], false)
	if n == "" || id == b.cfg.Local.ID && n == b.cfg.Local.Network {
		return w
	}
	if placed := b.placed[w]; placed != nil && placed.Network == n {
		return placed
	}
	c := *w
	c.Network = n
	return &c
}

// checkNetworks reports what keeps clusters of one control plane from reaching each other.
func (b *builder) checkNetworks(d *draft) {
	if !d.managed() && len(d.Networks) == 0 {
		return
	}
	type at struct {
		network mesh.NetworkID
		address string
	}
	type pair struct{ a, b mesh.ClusterID }
	owner := make(map[at]*mesh.Workload, len(d.Workloads))
	clash := map[pair]bool{}
	used := map[mesh.NetworkID]*mesh.Workload{}
	for _, w := range d.Workloads {
		n := cmp.Or(w.Network, b.places.Clusters[b.clusterOf(w.Cluster)])
		if n != "" && used[n] == nil && w.TLS {
			used[n] = w
		}
		for _, a := range w.Addresses {
			key := at{n, a}
			o := owner[key]
			if o == nil {
				owner[key] = w
				continue
			}
			p := pair{b.clusterOf(o.Cluster), b.clusterOf(w.Cluster)}
			if p.a == p.b || clash[p] {
				continue
			}
			clash[p] = true
			d.problem(mesh.Problem{Object: w.Object, Reason: "AddressClash",
				Message: fmt.Sprintf("address %s of cluster %s is also that of %s in cluster %s, on one network", a, p.b, o.Object, p.a),
				Remedy:  "give the clusters pod ranges that do not overlap, or networks of their own (label topology.istio.io/network) and gateways"})
		}
	}
	if len(used) < 2 {
		return
	}
	for _, id := range slices.Sorted(maps.Keys(used)) {
		w := used[id]
		if n := d.Network(id); n != nil && len(n.Gateways) > 0 || b.clusterOf(w.Cluster) == b.cfg.Local.ID && len(b.cfg.Local.Gateways) > 0 {
			continue
		}
		d.problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Network", Name: string(id)}, Reason: "NoGateway",
			Message: fmt.Sprintf("%s is on network %s, which has no gateway, so other networks call its address directly", w.Object, id),
			Remedy:  "label the Service of a gateway there topology.istio.io/network: " + string(id) + ", or name its address in meshNetworks"})
	}
}

func equalNetwork(a, b *mesh.Network) bool { return a == b || reflect.DeepEqual(a, b) }

// meshConfig takes the first object; there is one in a mesh.
func (d *draft) meshConfig(inputs []mesh.Input) {
	var all []*mesh.MeshConfig
	for _, in := range inputs {
		all = append(all, in.MeshConfigs...)
	}
	byObject(all, func(x *mesh.MeshConfig) *mesh.ObjectRef { return &x.Object })
	for i, c := range all {
		if i == 0 {
			d.MeshConfig = c
		} else if c.Object != all[0].Object {
			d.problem(mesh.Problem{Object: c.Object, Reason: "Duplicate", Message: "the mesh's configuration is already given by " + all[0].Object.String(), Remedy: "keep one of the two"})
		}
	}
}
