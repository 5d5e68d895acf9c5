package zone

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"

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
	var out []*dnsv1.Port
	for _, p := range s.Facts.Ports {
		out = append(out, &dnsv1.Port{Name: p.Name, Number: p.Number, Protocol: strings.ToLower(p.Protocol)})
	}
	if out == nil {
		for _, p := range s.Ports {
			proto := "tcp"
			if p.Protocol == mesh.UDP {
				proto = "udp"
			}
			out = append(out, &dnsv1.Port{Name: p.Name, Number: p.Number, Protocol: proto})
		}
	}
	return out
}

// podsOf finds the names of pods below each headless host: two labels more.
func podsOf(hosts map[string]*dnsv1.Host) map[string][]string {
	out := map[string][]string{}
	for key, h := range hosts {
		name := dns.CanonicalName(key)
		if !h.GetHeadless() || !strings.HasSuffix(name, mesh.ClusterSetSuffix+".") {
			continue
		}
		_, rest, _ := strings.Cut(name, ".")
		_, parent, _ := strings.Cut(rest, ".")
		if _, ok := hosts[strings.TrimSuffix(parent, ".")]; ok {
			out[parent] = append(out[parent], name)
		}
	}
	for _, names := range out {
		slices.Sort(names)
	}
	return out
}

// srv answers with one record for each port number and target: the host itself, or the pods of a headless one.
func (z *Zone) srv(m *dns.Msg, header dns.RR_Header, name string, h *host, ports []*dnsv1.Port) {
	targets := []string{name}
	if pods := z.pods[name]; len(pods) > 0 {
		targets = pods
	}
	for _, target := range targets {
		seen := map[uint32]bool{}
		for _, p := range ports {
			if !seen[p.GetNumber()] {
				m.Answer = append(m.Answer, &dns.SRV{Hdr: header, Weight: 100, Port: uint16(p.GetNumber()), Target: target})
			}
			seen[p.GetNumber()] = true
		}
		if t := z.hosts[target]; t != nil && len(seen) > 0 {
			m.Extra = append(m.Extra, z.addresses(target, t)...)
		} else if target == name && len(seen) > 0 {
			m.Extra = append(m.Extra, z.addresses(target, h)...) // of a wildcard
		}
	}
}

func versionOf(apex string) string {
	if dns.IsSubDomain("clusterset.local.", apex) {
		return ClusterSetVersion
	}
	return Version
}

// FollowsEndpoints reports whether the names of s depend on its endpoints, not on its addresses alone.
func FollowsEndpoints(s *mesh.Service) bool {
	return s.Headless || s.Facts != nil && s.Facts.Headless && s.Global
}
