package views

import (
	"reflect"
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/dns/zone"
)

// names are the DNS hosts for those who ask from one cluster, and which of them each service brings.
type names struct {
	set xds.Set
	of  map[nameKey][]*xds.Resource
}

// nameKey is all that the hosts of most services depend on.
type nameKey struct {
	service *mesh.Service
	aliased bool
}

// next returns the hosts of another snapshot. What services bring that are the same is not made anew.
func (n *names) next(snap *mesh.Snapshot, id mesh.ClusterID) (*names, error) {
	out := &names{of: make(map[nameKey][]*xds.Resource, len(snap.Services))}
	list := make([]*xds.Resource, 0, len(snap.Services))
	more := map[string]bool{} // names that services bring beside their own
	for _, s := range snap.Services {
		key := nameKey{s, len(snap.Aliases(s)) > 0}
		hosts, known := n.of[key]
		if !known || zone.FollowsOthers(s) {
			hosts = nil
			for _, h := range zone.HostsOf(snap, s, id) {
				r, err := xds.EncodeOne(h)
				if err != nil {
					return nil, err
				}
				hosts = append(hosts, r)
			}
		}
		out.of[key] = hosts
		for _, r := range hosts {
			if r.Name != s.Host {
				if more[r.Name] || snap.Service(r.Name) != nil {
					continue // the service of that name says what it is
				}
				more[r.Name] = true
			}
			list = append(list, r)
		}
	}
	set, err := xds.SetOf(list...)
	if err != nil {
		return nil, err
	}
	out.set = set.Sharing(n.set)
	return out, nil
}

// host encodes the DNS hosts of the newest snapshot once for each cluster that somebody asked from, for all scopes.
func (vs *Views) host(c change) {
	if c.endpointsOnly && !slices.ContainsFunc(c.pairs, func(p [2]*mesh.Service) bool {
		return zone.FollowsEndpoints(p[1]) || zone.FollowsEndpoints(p[0]) || !reflect.DeepEqual(p[0].Facts, p[1].Facts) || !slices.Equal(p[0].VIPs, p[1].VIPs) || !slices.Equal(p[0].Ports, p[1].Ports)
	}) {
		return
	}
	for id := range vs.names {
		vs.hostIn(id, c.to)
	}
}

func (vs *Views) hostIn(id mesh.ClusterID, snap *mesh.Snapshot) {
	old := vs.names[id]
	if old == nil {
		old = &names{}
	}
	next, err := old.next(snap, id)
	if err != nil {
		vs.log.Error("names not served", "part", "views", "revision", snap.Revision, "err", err)
		return
	}
	vs.names[id] = next
}

// namesFor returns the DNS hosts for a proxy, or for a DNS server, which is nil.
func (vs *Views) namesFor(p *mesh.Proxy, snap *mesh.Snapshot) xds.Set {
	id := snap.Local.ID
	if p != nil {
		id = p.Cluster
	}
	if vs.names[id] == nil {
		vs.hostIn(id, snap)
	}
	if n := vs.names[id]; n != nil {
		return n.set
	}
	return nil
}
