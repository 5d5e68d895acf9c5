package translate

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Changed compares two Snapshots by pointer, unless the newer says how it differs. It returns the services, old and new in turn, that differ; ok is false when
// anything else differs, or when services came or went.
func Changed(old, snap *mesh.Snapshot) (pairs [][2]*mesh.Service, ok bool) {
	if d, known := snap.Since(old); known {
		for _, x := range d.Services {
			pairs = append(pairs, [2]*mesh.Service{x.Was, x.Now})
		}
		return pairs, !d.Config
	}
	if old == nil || len(old.Services) != len(snap.Services) || old.Local != snap.Local || !slices.Equal(old.Clusters, snap.Clusters) ||
		!slices.Equal(old.VirtualServices, snap.VirtualServices) || !slices.Equal(old.DestinationRules, snap.DestinationRules) || !slices.Equal(old.Sidecars, snap.Sidecars) ||
		!slices.Equal(old.Networks, snap.Networks) || old.MeshConfig != snap.MeshConfig || !slices.Equal(old.Gateways, snap.Gateways) || !slices.Equal(old.PeerAuthentications, snap.PeerAuthentications) ||
		!slices.Equal(old.AuthorizationPolicies, snap.AuthorizationPolicies) || !slices.Equal(old.RequestAuthentications, snap.RequestAuthentications) ||
		!slices.Equal(old.EnvoyFilters, snap.EnvoyFilters) || !slices.Equal(old.Credentials, snap.Credentials) || !slices.Equal(old.Backends, snap.Backends) {
		return nil, false
	}
	for i, s := range snap.Services {
		switch was := old.Services[i]; {
		case was == s:
		case was.Host != s.Host:
			return nil, false
		default:
			pairs = append(pairs, [2]*mesh.Service{was, s})
		}
	}
	return pairs, true
}

// Endpoints is the short path of an endpoint change: it returns the assignments of the changed services alone. ok is
// false when a full Translate is needed, because more than endpoints would change for this proxy. With ok, Translate
// would give the same as for the Snapshot before, but for these assignments.
func Endpoints(old, snap *mesh.Snapshot, p *mesh.Proxy, pairs [][2]*mesh.Service) (out []*endpointv3.ClusterLoadAssignment, ok bool) {
	if snap == nil || p.EastWest {
		return nil, false
	}
	before, v := newView(old, p), newView(snap, p)
	for _, pair := range pairs {
		was, s := pair[0], pair[1]
		if !before.scope.Sees(was) && !v.scope.Sees(s) {
			continue
		}
		if !sameShape(was, s) || slices.ContainsFunc(was.Endpoints, v.isSelf) || slices.ContainsFunc(s.Endpoints, v.isSelf) {
			return nil, false
		}
		if !slices.Equal(clustersOf(was), clustersOf(s)) || slices.ContainsFunc(s.Ports, func(p mesh.Port) bool { return !before.factsOf(was, p).equal(v.factsOf(s, p)) }) {
			return nil, false
		}
		then := before.upstreams(was)
		for i, u := range v.upstreams(s) {
			if !slices.Equal(then[i].inside, u.inside) {
				return nil, false
			}
			if u.byAddress() || p.Type == mesh.Proxyless && !u.port.Protocol.IsHTTP() {
				continue
			}
			out = append(out, v.assignment(u, p.Type == mesh.Proxyless))
		}
	}
	// Problems of endpoints are shown by a full translation only.
	return out, len(v.problems.list) == len(before.problems.list)
}

func (f facts) equal(o facts) bool {
	ids, others := f.ids, o.ids
	f.ids, o.ids = nil, nil
	return reflect.DeepEqual(f, o) && slices.Equal(ids, others)
}

// sameShape reports whether two versions of a service differ in endpoints alone, and are served by EDS.
func sameShape(a, b *mesh.Service) bool {
	return a.Resolution == mesh.Static && b.Resolution == mesh.Static && !a.Headless && !b.Headless &&
		a.Host == b.Host && a.Name == b.Name && a.Namespace == b.Namespace && a.Object == b.Object && a.External == b.External && a.Global == b.Global &&
		slices.Equal(a.Ports, b.Ports) && slices.Equal(a.VIPs, b.VIPs) && slices.Equal(a.VisibleTo, b.VisibleTo) && slices.Equal(a.SubjectAltNames, b.SubjectAltNames) && slices.Equal(a.Ranges, b.Ranges) &&
		maps.EqualFunc(a.ClusterVIPs, b.ClusterVIPs, slices.Equal[[]netip.Addr])
}

// clustersOf lists the clusters of a service's endpoints in the order in which they first occur: endpoints are sorted by cluster.
func clustersOf(s *mesh.Service) []mesh.ClusterID {
	var out []mesh.ClusterID
	for _, e := range s.Endpoints {
		if len(out) == 0 || out[len(out)-1] != e.Cluster {
			out = append(out, e.Cluster)
		}
	}
	return out
}

// Own returns what a sidecar is served for itself alone: the listener and the clusters of its own ports, and the
// assignments of the services that it belongs to. All else is that of a proxy without a name, with the same labels,
// namespace and network. services are those of snap that have p's workload as an endpoint.
func Own(snap *mesh.Snapshot, p *mesh.Proxy, services []*mesh.Service) Resources {
	trimmed := *snap
	trimmed.Services = services
	v := newView(&trimmed, p)
	v.full = snap
	clusters, inbound := v.inbound()
	r := Resources{Clusters: clusters, Listeners: inbound}
	for _, s := range v.scope.Services() {
		for _, u := range v.upstreams(s) {
			if !u.byAddress() && s.Resolution == mesh.Static {
				r.Endpoints = append(r.Endpoints, v.assignment(u, false))
			}
		}
	}
	return r.sorted()
}

// Nameless returns p as proxies of its kind have in common: see Own.
func Nameless(p *mesh.Proxy) *mesh.Proxy {
	q := *p
	q.Name = ""
	return &q
}
