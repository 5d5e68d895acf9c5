// Package translate turns a Snapshot into the Envoy resources of one proxy: a sidecar, an ingress gateway, or a gRPC
// client without a proxy. It is pure: equal snapshots and proxies give equal resources in equal order. It does not know
// how resources are served, and it does not make the resources of east-west gateways.
package translate

import (
	"cmp"
	"net/netip"
	"slices"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	meshconfig "istio.io/api/mesh/v1alpha1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/memo"
	"github.com/isthmus-mesh/isthmus/discovery/translate/peerauth"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/discovery/translate/socket"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// Resources are what one proxy is served. Each list is sorted by resource name, and names are unique in it.
type Resources struct {
	Clusters  []*clusterv3.Cluster
	Endpoints []*endpointv3.ClusterLoadAssignment
	Listeners []*listenerv3.Listener
	Routes    []*routev3.RouteConfiguration
	Secrets   []*tlsv3.Secret
	// Extensions are configuration that filters fetch by name; only EnvoyFilters make any.
	Extensions []*corev3.TypedExtensionConfig
	// Packed are resources of any type as the Pack of a memo made them, in no order. Of a name that one of them has, and one
	// of the lists, theirs counts.
	Packed []any
}

// Names of clusters that stand for no service.
const (
	passthroughCluster        = "PassthroughCluster"
	blackHoleCluster          = "BlackHoleCluster"
	inboundPassthroughCluster = "InboundPassthroughCluster"
	// unresolvedCluster does not exist: that is what is answered for it.
	unresolvedCluster = "UnresolvedBackend"
)

// meshGateway is the gateway name that stands for all sidecars in a VirtualService.
const meshGateway = "mesh"

// Translate returns what p is served for snap, and what was left out and why. A Router that is an east-west gateway
// gets nothing here.
func Translate(snap *mesh.Snapshot, p *mesh.Proxy) (Resources, []mesh.Problem) {
	return Again(nil, snap, p)
}

// Again is Translate with a memory: parts that come out as before, for this or for another proxy, are the same messages,
// and cost little; with a Pack in the memo they are in Packed instead. What it returns must not be changed.
func Again(m *memo.Memo, snap *mesh.Snapshot, p *mesh.Proxy) (Resources, []mesh.Problem) {
	if snap == nil || snap.Local == nil || p.EastWest {
		return Resources{}, nil
	}
	v := newView(snap, p)
	v.remember(m)
	var r Resources
	switch p.Type {
	case mesh.Proxyless:
		r = v.proxyless()
	case mesh.Router:
		r = v.ingress()
	default:
		r = v.sidecar()
	}
	return r.sorted(), v.problems.sorted()
}

func (v *view) sidecar() Resources {
	r := v.outboundClusters()
	r.add(v.secrets())
	r.add(v.outbound())
	r.add(v.ownInbound())
	return r
}

// secrets returns the roots of the mesh and the credentials that were asked for until now.
func (v *view) secrets() Resources {
	r := v.part("secrets", "roots", nil, func() (r Resources) {
		if s := socket.TrustBundle(v.snap); s != nil {
			r.Secrets = append(r.Secrets, s)
		}
		return r
	})
	r.Secrets = append(v.credentials.Secrets(), r.Secrets...)
	return r
}

// view is what the translation of one proxy reads. Only problems grows while it works.
type view struct {
	snap     *mesh.Snapshot
	full     *mesh.Snapshot // snap, or the one that it is a part of
	proxy    *mesh.Proxy
	network  mesh.NetworkID
	ipv6     bool
	scope    *scope.Scope
	taken    map[netip.Addr]bool // cluster addresses of the proxy's own cluster, once asked for
	mtlsOff  bool                // some PeerAuthentication turns mutual TLS off
	problems *problems

	memo           *memo.Memo // nil: nothing is remembered
	labels, stands string     // of the proxy; the latter is what decides which endpoints it uses, and how
	dynamic        bool       // it calls wildcard hosts

	credentials *socket.Credentials
}

func newView(snap *mesh.Snapshot, p *mesh.Proxy) *view {
	p = topologies.Place(snap, p)
	v := &view{snap: snap, full: snap, proxy: p, network: p.Network, problems: &problems{}, credentials: socket.CredentialsOf(snap, p)}
	for _, a := range p.Addresses {
		v.ipv6 = v.ipv6 || a.Is6() && !a.Is4In6()
	}
	v.mtlsOff = peerauth.TurnsOff(snap.PeerAuthentications)
	v.scope = scope.For(snap, p, func(o mesh.ObjectRef, field, message string) { v.problems.add(o, field, reasonHostConflict, message) })
	return v
}

// meshConfig is nil where Istio's defaults hold.
func (v *view) meshConfig() *meshconfig.MeshConfig { return v.snap.MeshConfig.GetSpec() }

// problems collects what was left out; the same problem met twice counts once.
type problems struct{ list []mesh.Problem }

func (ps *problems) add(object mesh.ObjectRef, field, reason, message string) {
	ps.list = append(ps.list, mesh.Problem{Object: object, Field: field, Reason: reason, Message: message, Remedy: remedies[reason]})
}

func (ps *problems) sorted() []mesh.Problem {
	slices.SortFunc(ps.list, func(a, b mesh.Problem) int { return cmp.Compare(a.String(), b.String()) })
	return slices.Compact(ps.list)
}

// Reasons of Problems.
const (
	reasonUnknownHost   = "UnknownHost"
	reasonUnknownSubset = "UnknownSubset"
	reasonUnknownPort   = "UnknownPort"
	reasonUnsupported   = "Unsupported"
	reasonHostConflict  = "ConflictingHosts"
	reasonPortConflict  = "PortConflict"
	reasonInvalid       = "InvalidValue"
	reasonCredential    = "NoCredential"
	reasonNoAddress     = "NoAddress"
	reasonServerName    = "InvalidServerName"
	reasonNoGateway     = "NoGateway"
	reasonNotVisible    = "NotExported"
	reasonNotResolved   = "NotResolved"
)

var remedies = map[string]string{
	reasonUnknownHost:   "create the Service or ServiceEntry, or correct the host; until then such requests get 503",
	reasonUnknownSubset: "add the subset to the DestinationRule of that host; until then such requests get 503",
	reasonNotVisible:    "add the namespace to its exportTo, or the host to the egress of the Sidecar; until then such requests get 503",
	reasonNotResolved:   "write resolution DNS in the ServiceEntry, or DYNAMIC_DNS for a wildcard host; until then such requests get 503",
	reasonUnknownPort:   "name a port of the service; until then such requests get 503",
	reasonHostConflict:  "merge the objects into one, only the first by namespace and name is used",
	reasonPortConflict:  "give one of the services another port or an address of its own",
	reasonCredential:    "create the Secret in the namespace of the gateway, with the keys tls.crt and tls.key, and ca.crt where certificates are checked; Secrets outside of the namespace of isthmusd are read with source.kube.everySecret",
	reasonNoAddress:     "add addresses to the ServiceEntry",
	reasonNoGateway:     "name a gateway of the network in meshNetworks, or leave the network out",
	reasonServerName:    "use names that are DNS labels and shorter, the endpoint is not reachable through gateways",
}

// sorted orders every list by resource name and drops later resources of a name already taken.
func (r Resources) sorted() Resources {
	for _, table := range r.Routes {
		httprule.Room(table)
	}
	return Resources{
		Clusters:  byName(r.Clusters, (*clusterv3.Cluster).GetName),
		Endpoints: byName(r.Endpoints, (*endpointv3.ClusterLoadAssignment).GetClusterName),
		Listeners: byName(r.Listeners, (*listenerv3.Listener).GetName),
		Routes:    byName(r.Routes, (*routev3.RouteConfiguration).GetName),
		Secrets:   byName(r.Secrets, (*tlsv3.Secret).GetName),
		Packed:    r.Packed,
	}
}

func byName[T any](list []T, name func(T) string) []T {
	slices.SortStableFunc(list, func(a, b T) int { return cmp.Compare(name(a), name(b)) })
	return slices.CompactFunc(list, func(a, b T) bool { return name(a) == name(b) })
}
