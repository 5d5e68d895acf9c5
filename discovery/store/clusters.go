package store

import (
	"fmt"
	"slices"
	"strconv"

	"net/netip"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// clusterOf writes out that an empty name is the local cluster's.
func (b *builder) clusterOf(id mesh.ClusterID) mesh.ClusterID {
	if id == "" {
		return b.cfg.Local.ID
	}
	return id
}

// part is what one cluster declares of a service.
type part struct {
	decl   *mesh.ServiceDecl
	joined *joined
}

// combined is a service that other clusters of this control plane declare, and what it was made from.
type combined struct {
	parts    []part // the local cluster's first, then by cluster
	ports    []mesh.Port
	vips     []netip.Addr
	cluster  map[mesh.ClusterID][]netip.Addr
	ends     []*mesh.Endpoint
	problems []mesh.Problem
}

// joins reports whether decl is the same service in another cluster: sameness is by name and namespace, for Kubernetes
// Services alone.
func (b *builder) joins(parts []part, decl *mesh.ServiceDecl) bool {
	first := parts[0].decl.Object
	if first.Kind != "Service" || decl.Object.Kind != first.Kind || decl.Object.Name != first.Name || decl.Object.Namespace != first.Namespace {
		return false
	}
	return !slices.ContainsFunc(parts, func(p part) bool { return b.clusterOf(p.decl.Cluster) == b.clusterOf(decl.Cluster) })
}

// combine makes one service of what the clusters declare, unless the last one was made of the same.
func (b *builder) combine(host string, parts []part) *combined {
	if old := b.combined[host]; old != nil && slices.Equal(old.parts, parts) {
		return old
	}
	c := &combined{parts: slices.Clone(parts), cluster: map[mesh.ClusterID][]netip.Addr{}}
	for _, p := range parts {
		id := b.clusterOf(p.decl.Cluster)
		c.cluster[id] = p.decl.Addresses
		if id == b.cfg.Local.ID {
			c.vips = p.decl.Addresses
		}
		c.agree(host, p.decl)
		c.ends = append(c.ends, p.joined.endpoints...)
	}
	c.ports = sortedPorts(c.ports)
	sortEndpoints(c.ends)
	return c
}

// agree adds the ports of one declaration and reports where it differs from the first.
func (c *combined) agree(host string, decl *mesh.ServiceDecl) {
	first := c.parts[0].decl
	where := func(d *mesh.ServiceDecl) string {
		if d.Cluster == "" {
			return "the local cluster"
		}
		return "cluster " + string(d.Cluster)
	}
	for _, p := range decl.Ports {
		i := slices.IndexFunc(c.ports, func(x mesh.Port) bool {
			return x.Number == p.Number && (x.Protocol == mesh.UDP) == (p.Protocol == mesh.UDP)
		})
		if i < 0 {
			c.ports = append(c.ports, p)
			continue
		}
		if have := c.ports[i]; have.Protocol != p.Protocol {
			c.problems = append(c.problems, mesh.Problem{Object: decl.Object, Field: "spec.ports", Reason: "PortConflict",
				Message: fmt.Sprintf("port %s of %s is %s in %s and %s in %s; %s counts", strconv.FormatUint(uint64(p.Number), 10), host, have.Protocol, where(first), p.Protocol, where(decl), have.Protocol),
				Remedy:  "give the port one protocol in every cluster"})
		}
	}
	if decl.Headless != first.Headless || decl.External != first.External || decl.Resolution != first.Resolution {
		c.problems = append(c.problems, mesh.Problem{Object: decl.Object, Reason: "ServiceDiffers",
			Message: fmt.Sprintf("%s is of another type in %s than in %s, whose counts", host, where(decl), where(first)),
			Remedy:  "give the Service one type in every cluster (clusterIP, headless or externalName)"})
	}
}
