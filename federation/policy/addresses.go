package policy

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// BadAddress says why a peer may not name the address, as a gateway or as an endpoint; empty: it may.
func BadAddress(ip netip.Addr, allowLoopback bool) string {
	switch {
	case !ip.IsValid():
		return "is no address"
	case ip.Is4In6():
		return "is an IPv4 address in IPv6 form"
	case ip.Zone() != "":
		return "has a zone"
	case ip.IsUnspecified():
		return "is unspecified"
	case ip.IsLoopback() && !allowLoopback:
		return "is loopback"
	case ip == metadata4 || ip == metadata6:
		return "is a metadata service"
	case ip.IsLinkLocalUnicast():
		return "is link-local"
	case ip.IsMulticast():
		return "is multicast"
	case ip.Is4() && (vip4.Contains(ip) || ip.As4()[0] == 0):
		return "is reserved"
	}
	return ""
}

// gatewayConflicts names gateways that clusters on different networks claim, at both: it is not known whose they are. They
// stay in use: the server name in every handshake keeps traffic from the wrong one.
func gatewayConflicts(origins []Origin) {
	owner := map[netip.AddrPort]int{}
	for i := range origins {
		for _, c := range origins[i].Input.Clusters {
			for _, g := range c.Gateways {
				j, taken := owner[g]
				if !taken {
					owner[g] = i
					continue
				}
				if other := origins[j].Input.Clusters[0]; other.Network != c.Network {
					origins[i].gatewayConflict(c.ID, g, other.ID)
					origins[j].gatewayConflict(other.ID, g, c.ID)
				}
			}
		}
	}
}

func (o *Origin) gatewayConflict(id mesh.ClusterID, g netip.AddrPort, other mesh.ClusterID) {
	o.Refused["GatewayConflict"]++
	o.Input.Problems = append(o.Input.Problems, mesh.Problem{
		Object: mesh.ObjectRef{Kind: "Cluster", Name: string(id), Source: "cluster " + string(id)}, Field: "gateways",
		Reason: "GatewayConflict", Message: fmt.Sprintf("gateway %s is also one of cluster %s on another network", g, other),
		Remedy: "give each network its own gateways",
	})
}

// foreignAddresses leaves out endpoints on our network whose address lies in what another cluster there declares as its
// own, and not in what its cluster declares. Imports are shared with what was read before, so one that changes is copied.
func foreignAddresses(local *mesh.Cluster, origins []Origin) {
	for i := range origins {
		for _, c := range origins[i].Input.Clusters {
			if c.Network != local.Network {
				continue // its endpoints have no address here
			}
			for n, imp := range origins[i].Input.Imports {
				owner := func(e *mesh.Endpoint) mesh.ClusterID { return ownerOf(local, origins, i, c, e) }
				if !slices.ContainsFunc(imp.Endpoints, func(e *mesh.Endpoint) bool { return owner(e) != "" }) {
					continue
				}
				kept := *imp
				kept.Endpoints = nil
				for _, e := range imp.Endpoints {
					if by := owner(e); by != "" {
						origins[i].foreign(imp, e, by)
					} else {
						kept.Endpoints = append(kept.Endpoints, e)
					}
				}
				origins[i].Input.Imports[n] = &kept
			}
		}
	}
}

// ownerOf is the other cluster in whose ranges an endpoint of cluster c, the i-th origin, lies; empty: none.
func ownerOf(local *mesh.Cluster, origins []Origin, i int, c *mesh.Cluster, e *mesh.Endpoint) mesh.ClusterID {
	ip, err := netip.ParseAddr(e.Address)
	if err != nil || e.Network != local.Network || within(c, ip) {
		return ""
	}
	for j := range origins {
		for _, other := range origins[j].Input.Clusters {
			if j != i && other.Network == c.Network && within(other, ip) {
				return other.ID
			}
		}
	}
	return ""
}

func (o *Origin) foreign(imp *mesh.Import, e *mesh.Endpoint, owner mesh.ClusterID) {
	if o.Refused["ForeignAddress"]++; o.Refused["ForeignAddress"] > maxProblems {
		return
	}
	o.Input.Problems = append(o.Input.Problems, mesh.Problem{
		Object: mesh.ObjectRef{Kind: "Service", Namespace: imp.Namespace, Name: imp.Name, Source: "cluster " + string(o.Cluster)}, Field: "endpoints",
		Reason: "ForeignAddress", Message: fmt.Sprintf("address %s of workload %s is in the ranges of cluster %s", e.Address, e.Workload, owner),
		Remedy: "correct it in cluster " + string(o.Cluster),
	})
}

// within reports whether an address lies in the ranges that a cluster declares.
func within(c *mesh.Cluster, ip netip.Addr) bool {
	return slices.ContainsFunc(c.PodRanges, func(p netip.Prefix) bool { return p.Contains(ip) }) ||
		slices.ContainsFunc(c.ServiceRanges, func(p netip.Prefix) bool { return p.Contains(ip) })
}
