package translate

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// located is an endpoint as this proxy reaches it.
type located struct {
	*mesh.Endpoint
	lb  *endpointv3.LbEndpoint
	key string // the address: unique in an assignment
}

// assignment lists the endpoints of u that are ready and reachable, one group for each locality, all of one priority.
// Endpoints of a cluster that was not heard from stand back (degraded) while others are there; those of an expired one
// are left out then. plain is for clients that know neither gateways nor degraded endpoints.
func (v *view) assignment(u upstream, plain bool) *endpointv3.ClusterLoadAssignment {
	found := v.locate(u, plain)
	best := mesh.Expired
	for _, e := range found {
		best = min(best, e.Freshness)
	}
	worst := mesh.Late // the least fresh that is still used
	if plain || best == mesh.Expired {
		worst = best
	}
	groups := map[string]*endpointv3.LocalityLbEndpoints{}
	a, total := &endpointv3.ClusterLoadAssignment{ClusterName: u.name()}, uint32(0)
	for _, e := range found {
		if e.Freshness > worst {
			continue
		}
		if e.Freshness != mesh.Fresh && !plain {
			e.lb.HealthStatus = corev3.HealthStatus_DEGRADED
		}
		g := groups[e.Locality]
		if g == nil {
			g = &endpointv3.LocalityLbEndpoints{Locality: locality(e.Locality), LoadBalancingWeight: wire.U32(0)}
			groups[e.Locality] = g
		}
		total++
		g.LoadBalancingWeight.Value += e.lb.LoadBalancingWeight.GetValue()
		g.LbEndpoints = append(g.LbEndpoints, e.lb)
	}
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		a.Endpoints = append(a.Endpoints, groups[name])
	}
	if best == mesh.Fresh && worst == mesh.Late && !plain {
		// One fresh endpoint suffices to leave the late ones alone; Envoy's own factor would share from 72 % downwards.
		a.Policy = &endpointv3.ClusterLoadAssignment_Policy{OverprovisioningFactor: wire.U32(max(140, 100*total))}
	}
	return a
}

func (v *view) locate(u upstream, plain bool) []located {
	var out []located
	seen := map[string]bool{}
	for _, e := range v.dnsDefault(u) {
		if !e.Ready || !selects(u.labels, e.Labels) || !serves(e, u.port) {
			continue
		}
		l, ok := v.locateOne(u, e, plain)
		if !ok || seen[l.key] {
			continue
		}
		seen[l.key] = true
		out = append(out, l)
	}
	slices.SortFunc(out, func(a, b located) int { return cmp.Compare(a.key, b.key) })
	return out
}

// serves reports whether the endpoint has the port: one cluster may have it and another not yet.
func serves(e *mesh.Endpoint, p mesh.Port) bool { return e.Ports == nil || e.Ports[p.Number] != 0 }

// dnsDefault returns the service's endpoints; a DNS service without any is its own host.
func (v *view) dnsDefault(u upstream) []*mesh.Endpoint {
	s := u.service
	if len(s.Endpoints) > 0 || s.Resolution != mesh.DNS || strings.HasPrefix(s.Host, "*") {
		return s.Endpoints
	}
	return []*mesh.Endpoint{{Address: s.Host, Ready: true}}
}

func (v *view) locateOne(u upstream, e *mesh.Endpoint, plain bool) (located, bool) {
	path := topologies.Reach(v.snap, v.network, e)
	port := endpointPort(e, u.port)
	l := located{Endpoint: e, lb: hostEndpoint(nil)}
	weight := cmp.Or(e.Weight, 1)
	l.lb.LoadBalancingWeight = wire.U32(weight)
	switch {
	case path.Direct:
		if _, err := netip.ParseAddr(e.Address); err != nil && u.service.Resolution != mesh.DNS {
			v.problems.add(u.service.Object, "", reasonInvalid, "address "+e.Address+" of endpoint "+e.Workload+" is not an IP")
			return l, false
		}
		l.key = e.Address + "|" + wire.Itoa(port)
		l.lb.GetEndpoint().Address = wire.Socket(e.Address, port)
		// What a proxy sends to its own workload is not captured again, so nobody would end mutual TLS there.
		if !plain && !v.isSelf(e) && v.takesTLS(e, u.port) {
			l.lb.Metadata = endpointMetadata(e, "tlsMode", "istio")
		} else if e.Workload != "" && !plain {
			l.lb.Metadata = endpointMetadata(e)
		}
	case path.Reachable() && !plain && u.carriesMeshTLS() && u.service.Resolution != mesh.DNS:
		name, err := sni.Pod{Workload: e.Workload, Port: u.port.Number, Cluster: e.Cluster, Service: u.service.Name, Namespace: u.service.Namespace}.Name()
		if err != nil {
			v.problems.add(u.service.Object, "", reasonServerName, err.Error())
			return l, false
		}
		l.key = name
		l.lb.GetEndpoint().Address = wire.Internal(eastwestName(e.Cluster), name)
		l.lb.GetEndpoint().Hostname = name
		l.lb.Metadata = endpointMetadata(e, "tlsMode", "istio", "via", "gateway")
	default:
		return l, false
	}
	return l, true
}

// endpointMetadata chooses the transport socket, and names the instance for access logs and for the administrator.
func endpointMetadata(e *mesh.Endpoint, match ...string) *corev3.Metadata {
	m := &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
		"isthmus": wire.Strings("cluster", string(e.Cluster), "workload", e.Namespace+"/"+e.Workload),
	}}
	if len(match) > 0 {
		m.FilterMetadata["envoy.transport_socket_match"] = wire.Strings(match...)
	}
	return m
}

// locality reads region/zone/subzone.
func locality(s string) *corev3.Locality {
	parts := append(strings.SplitN(s, "/", 3), "", "")
	return &corev3.Locality{Region: parts[0], Zone: parts[1], SubZone: parts[2]}
}
