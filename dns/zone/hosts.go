package zone

import (
	"net/netip"
	"slices"
	"strings"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Hosts returns what DNS servers of the local cluster answer for a Snapshot, sorted by name.
func Hosts(snap *mesh.Snapshot) []*dnsv1.Host { return HostsIn(snap, snap.Local.ID) }

// HostsIn returns what DNS servers answer clients in one of the clusters that the local control plane reads.
func HostsIn(snap *mesh.Snapshot, cluster mesh.ClusterID) []*dnsv1.Host {
	var out []*dnsv1.Host
	for _, s := range snap.Services {
		out = append(out, HostsOf(snap, s, cluster)...)
	}
	return Sorted(out)
}

// Sorted sorts hosts by name. Of two with one name the first counts: a pod's name may come from both its hosts.
func Sorted(hosts []*dnsv1.Host) []*dnsv1.Host {
	slices.SortStableFunc(hosts, func(a, b *dnsv1.Host) int { return strings.Compare(a.Name, b.Name) })
	return slices.CompactFunc(hosts, func(a, b *dnsv1.Host) bool { return a.Name == b.Name })
}

// HostsOf returns what one service of the Snapshot adds to HostsIn. Unless FollowsOthers, it follows from the service alone.
func HostsOf(snap *mesh.Snapshot, s *mesh.Service, cluster mesh.ClusterID) []*dnsv1.Host {
	vips := s.VIPsIn(cluster)
	if len(vips) == 0 && (asDialled(s) || strings.HasPrefix(s.Host, "*")) {
		return nil // its clients ask whoever knows the name
	}
	h := &dnsv1.Host{Name: s.Host, Headless: s.Headless, Ports: ports(s)}
	for _, a := range vips {
		h.Addresses = append(h.Addresses, a.String())
	}
	out := []*dnsv1.Host{h}
	if s.Headless {
		out = append(out, pods(s, h, cluster)...)
	}
	return append(out, clusterSet(snap, s)...)
}

// asDialled reports whether connections go to the addresses that clients have from elsewhere: the service has none of its own.
func asDialled(s *mesh.Service) bool {
	return s.Resolution == mesh.None || s.Resolution == mesh.Dynamic || len(s.Ranges) > 0
}

// pods adds the addresses of a headless service's endpoints to its host, and returns the hosts of the endpoints as
// Kubernetes names them: HOSTNAME.SERVICE.NAMESPACE.svc.cluster.local.
func pods(s *mesh.Service, h *dnsv1.Host, cluster mesh.ClusterID) []*dnsv1.Host {
	named := map[string]*dnsv1.Host{}
	for _, e := range s.Endpoints {
		a, err := netip.ParseAddr(e.Address)
		if err != nil || !e.Ready || e.Cluster != cluster {
			continue
		}
		h.Addresses = append(h.Addresses, a.String())
		if label := HostName(e); strings.HasSuffix(s.Host, ".svc.cluster.local") && mesh.IsLabel(label) {
			name := label + "." + s.Host
			if named[name] == nil {
				named[name] = &dnsv1.Host{Name: name, Ports: h.Ports, Headless: true}
				h.Targets = append(h.Targets, name)
			}
			named[name].Addresses = append(named[name].Addresses, a.String())
		}
	}
	slices.Sort(h.Addresses)
	h.Addresses = slices.Compact(h.Addresses)
	slices.Sort(h.Targets)
	out := make([]*dnsv1.Host, 0, len(named))
	for _, name := range h.Targets {
		p := named[name]
		slices.Sort(p.Addresses)
		p.Addresses = slices.Compact(p.Addresses)
		out = append(out, p)
	}
	return out
}

func ports(s *mesh.Service) []*dnsv1.Port {
	var out []*dnsv1.Port
	for _, p := range s.Ports {
		proto := "tcp"
		if p.Protocol == mesh.UDP {
			proto = "udp"
		}
		out = append(out, &dnsv1.Port{Name: p.Name, Number: p.Number, Protocol: proto})
	}
	return out
}

// FollowsEndpoints reports whether the names of s depend on its endpoints, not on its addresses alone.
func FollowsEndpoints(s *mesh.Service) bool {
	return s.Headless || s.Facts != nil && s.Facts.Headless && s.Global
}

// FollowsOthers reports whether the names of s depend on other services of the Snapshot, beyond whether they have
// aliases: on those of its pods.
func FollowsOthers(s *mesh.Service) bool { return s.Global && s.Facts != nil && s.Facts.Headless }
