package translate

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/locality"
	"github.com/isthmus-mesh/isthmus/discovery/translate/memo"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// remember has the parts of this translation taken from those that are remembered where they are made of the same. The
// stamp is everything that they read beside what each of them says. Gateways, proxies in other clusters and what is for one
// workload alone read more.
func (v *view) remember(m *memo.Memo) {
	if m == nil || v.proxy.Type != mesh.Sidecar || v.proxy.Name != "" || httprule.Versions(v.proxy.Metadata) != nil || v.proxy.Cluster != v.snap.Local.ID {
		return
	}
	stamp := add([]any{v.snap.Local, v.snap.MeshConfig, "clusters"}, v.snap.Clusters)
	stamp = append(add(stamp, v.snap.Networks), "authentication")
	m.Begin(add(stamp, v.snap.PeerAuthentications))
	v.memo = m
	var labels []string
	for _, k := range slices.Sorted(maps.Keys(v.proxy.Labels)) {
		labels = append(labels, k, v.proxy.Labels[k])
	}
	v.labels = strings.Join(labels, "\x00")
	var views []string
	for _, n := range v.proxy.NetworkView {
		views = append(views, string(n))
	}
	v.stands = string(v.proxy.Network) + "\x00" + v.proxy.Locality + "\x00" + strings.Join(views, ",")
	v.dynamic = len(v.resolvers()) > 0
	if locality.ByLabel(v.meshConfig().GetLocalityLbSetting(), v.snap.DestinationRules) {
		v.stands += "\x00" + v.labels
	}
}

// packed returns resources as the memo keeps them.
func (v *view) packed(r Resources) Resources {
	for _, table := range r.Routes {
		httprule.Room(table)
	}
	if v.memo == nil || v.memo.Pack == nil {
		return r
	}
	return Resources{Packed: slices.Concat(pack(v.memo, r.Clusters), pack(v.memo, r.Endpoints), pack(v.memo, r.Listeners), pack(v.memo, r.Routes), pack(v.memo, r.Secrets))}
}

func pack[T proto.Message](m *memo.Memo, list []T) (out []any) {
	for _, x := range list {
		out = append(out, m.Pack(x))
	}
	return out
}

// add adds all of more.
func (r *Resources) add(more Resources) {
	r.Clusters, r.Endpoints = append(r.Clusters, more.Clusters...), append(r.Endpoints, more.Endpoints...)
	r.Listeners, r.Routes = append(r.Listeners, more.Listeners...), append(r.Routes, more.Routes...)
	r.Secrets, r.Packed = append(r.Secrets, more.Secrets...), append(r.Packed, more.Packed...)
}

// part returns resources that are made from these values, and the stamp.
func (v *view) part(kind, name string, from []any, build func() Resources) Resources {
	return memo.Of(v.memo, memo.Key{Kind: kind, Name: name}, from, &v.problems.list, func() Resources { return v.packed(build()) })
}

func add[T any](to []any, list []*T) []any {
	for _, x := range list {
		to = append(to, x)
	}
	return to
}

// madeOf is what the clusters of a service are made of.
func (v *view) madeOf(s *mesh.Service) []any {
	if v.memo == nil {
		return nil
	}
	return add([]any{s, v.stands}, v.scope.RulesFor(s))
}

// routedBy is what the routes of a service are made of: its rules, and those of the services that they lead to.
func (v *view) routedBy(s *mesh.Service) []any {
	if v.memo == nil {
		return nil
	}
	out := add([]any{s, s.Namespace == v.proxy.Namespace}, v.scope.RulesFor(s))
	if s.Global {
		out = append(out, v.snap.Service(mesh.ClusterSetAlias(s.Host)))
	}
	return append(out, v.leadsTo(v.scope.VirtualService(s.Host))...)
}

// leadsTo is a VirtualService and what its destinations are made of.
func (v *view) leadsTo(vs *mesh.VirtualService) []any {
	if vs == nil || v.memo == nil {
		return nil
	}
	out := []any{vs, v.proxy.Namespace, v.labels}
	for _, host := range scope.Destinations(vs) {
		to := v.scope.Covering(host)
		out = append(out, v.snap.Service(host), to)
		if to != nil {
			out = add(out, v.scope.RulesFor(to))
		}
	}
	return out
}

// served is one service's clusters.
type served struct {
	Resources
	inside []mesh.NetworkID
}

func (v *view) served(s *mesh.Service) served {
	return memo.Of(v.memo, memo.Key{Kind: "clusters", Name: s.Host}, v.madeOf(s), &v.problems.list, func() (out served) {
		for _, u := range v.upstreams(s) {
			c, a := v.cluster(u)
			out.Clusters = append(out.Clusters, c)
			if a != nil {
				out.Endpoints = append(out.Endpoints, a)
			}
			out.inside = append(out.inside, u.inside...)
		}
		out.Resources = v.packed(out.Resources)
		return out
	})
}

// hostOf is the virtual host of a service's port.
func (v *view) hostOf(s *mesh.Service, p mesh.Port) *routev3.VirtualHost {
	return memo.Of(v.memo, memo.Key{Kind: "host", Name: s.Host, Port: p.Number}, v.routedBy(s), &v.problems.list, func() *routev3.VirtualHost {
		return virtualHost(s.Host+":"+wire.Itoa(p.Number), v.domains(s, p.Number), v.routesOf(s, p))
	})
}

// namedHost is the virtual host of a host that no service has, nil if its rules are not for HTTP.
func (v *view) namedHost(host string, vs *mesh.VirtualService) *routev3.VirtualHost {
	return memo.Of(v.memo, memo.Key{Kind: "named", Name: host}, v.leadsTo(vs), &v.problems.list, func() *routev3.VirtualHost {
		routes := v.httpRoutes(vs, site{meshGateway, plainHTTPPort})
		if len(routes) == 0 {
			return nil
		}
		return virtualHost(host+":80", httprule.WithPort([]string{host}, plainHTTPPort), routes)
	})
}

// tableOf is the route table of a port, with these hosts.
func (v *view) tableOf(name string, hosts []*routev3.VirtualHost) Resources {
	return v.part("table", name, add([]any{v.scope.Sidecar}, hosts), func() Resources {
		return Resources{Routes: []*routev3.RouteConfiguration{v.table(name, hosts)}}
	})
}

// fixed is a listener that depends on no service.
func (v *view) fixed(name string, build func() *listener) Resources {
	return v.part("listener", name, []any{v.scope.Sidecar, v.ipv6, v.dynamic}, func() Resources { return Resources{Listeners: []*listener{build()}} })
}

// opaque are the listeners of a service's port that is not HTTP, one for each address, each with what it routes where it
// looks for HTTP.
type opaque struct {
	addresses []netip.Addr
	listeners []Resources
}

func (v *view) opaqueOf(s *mesh.Service, p mesh.Port) opaque {
	from := append(v.routedBy(s), v.proxy.Network, v.dynamic)
	return memo.Of(v.memo, memo.Key{Kind: "opaque", Name: s.Host, Port: p.Number}, from, &v.problems.list, func() opaque { return v.opaquePort(s, p) })
}

// ownInbound is inbound, remembered where no policy and no Sidecar may have it depend on more than the workload's labels.
func (v *view) ownInbound() Resources {
	build := func() (r Resources) {
		r.Clusters, r.Listeners = v.inbound()
		return r
	}
	if v.memo == nil || v.scope.Sidecar != nil || len(v.full.AuthorizationPolicies)+len(v.full.RequestAuthentications) > 0 {
		return build()
	}
	return v.part("inbound", v.proxy.Namespace, []any{v.labels, v.ipv6, v.proxy.Transparent}, build)
}
