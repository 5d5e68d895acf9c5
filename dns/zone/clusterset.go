package zone

import (
	"net/netip"
	"slices"
	"strings"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// labelPod is on the pods of a StatefulSet, whose name is their host name.
const labelPod = "statefulset.kubernetes.io/pod-name"

// clusterSet returns the names of multi-cluster services (KEP-1645, its DNS specification) for a host that clusters
// export: NAME.NAMESPACE.svc.clusterset.local with the addresses of NAME.NAMESPACE.global or, where the service is
// headless, with those of its pods, and then HOSTNAME.CLUSTER.NAME.NAMESPACE.svc.clusterset.local for each pod.
func clusterSet(snap *mesh.Snapshot, s *mesh.Service) []*dnsv1.Host {
	aliases := snap.Aliases(s)
	if len(aliases) == 0 || s.Host != mesh.GlobalHost(s.Name, s.Namespace) {
		return nil // names of single clusters must not exist, those of single pods come from their service
	}
	alias := aliases[0]
	h := &dnsv1.Host{Name: alias, Ports: clusterSetPorts(s)}
	out := []*dnsv1.Host{h}
	if s.Facts.Headless {
		h.Headless = true
		for _, e := range s.Endpoints {
			addresses := Reachable(snap, s, e)
			if len(addresses) == 0 || !e.Ready || e.Freshness == mesh.Expired {
				continue
			}
			h.Addresses = append(h.Addresses, addresses...)
			out = append(out, &dnsv1.Host{Name: HostName(e) + "." + string(e.Cluster) + "." + alias, Addresses: addresses, Ports: h.Ports, Headless: true})
		}
		slices.Sort(h.Addresses)
		h.Addresses = slices.Compact(h.Addresses)
		slices.SortFunc(out[1:], func(a, b *dnsv1.Host) int { return strings.Compare(a.Name, b.Name) })
		out = slices.CompactFunc(out, func(a, b *dnsv1.Host) bool { return a.Name == b.Name })
		for _, pod := range out[1:] {
			h.Targets = append(h.Targets, pod.Name)
		}
	}
	if len(h.Addresses) == 0 { // not headless, or every pod is behind a gateway: the mesh's address reaches one of them
		for _, a := range s.VIPs {
			h.Addresses = append(h.Addresses, a.String())
		}
	}
	return out
}

// Reachable returns the addresses by which clients here reach one endpoint of a ".global" host: its own on the same network, else the virtual
// ones of its name in the mesh, if it has one.
func Reachable(snap *mesh.Snapshot, s *mesh.Service, e *mesh.Endpoint) []string {
	if a, err := netip.ParseAddr(e.Address); err == nil && e.Network == snap.Local.Network {
		return []string{a.String()}
	}
	var out []string
	if pod := snap.Service(e.Workload + "." + string(e.Cluster) + "." + s.Host); pod != nil {
		for _, a := range pod.VIPs {
			out = append(out, a.String())
		}
	}
	return out
}

// HostName returns the first label of a pod's name: its host name where it has one that stays, else its address as
// Kubernetes writes it, else its name.
func HostName(e *mesh.Endpoint) string {
	if a, err := netip.ParseAddr(e.Address); err == nil && e.Labels[labelPod] != e.Workload {
		return strings.NewReplacer(".", "-", ":", "-").Replace(a.String())
	}
	return strings.ReplaceAll(e.Workload, ".", "-")
}

// clusterSetPorts are the ports of all exports together, of all protocols.
func clusterSetPorts(s *mesh.Service) []*dnsv1.Port {
	if s.Facts.Ports == nil {
		return ports(s)
	}
	out := make([]*dnsv1.Port, 0, len(s.Facts.Ports))
	for _, p := range s.Facts.Ports {
		out = append(out, &dnsv1.Port{Name: p.Name, Number: p.Number, Protocol: strings.ToLower(p.Protocol)})
	}
	return out
}
