package translate

import (
	"cmp"
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	dnscommonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/common/dns/v3"
	dnsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dns/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/dynamic"
	"github.com/isthmus-mesh/isthmus/discovery/translate/locality"
	"github.com/isthmus-mesh/isthmus/discovery/translate/remote"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/discovery/translate/socket"
	"github.com/isthmus-mesh/isthmus/discovery/translate/traffic"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// edsTimeout is how long a new cluster waits for its endpoints before it is used without.
const edsTimeout = 5 * time.Second

// upstream is one cluster to be: a service's port, and the subset of its endpoints that carry certain labels.
type upstream struct {
	service *mesh.Service
	port    mesh.Port
	subset  string
	labels  map[string]string
	policy  *networking.TrafficPolicy
	object  mesh.ObjectRef // the DestinationRule
	facts   facts
	rank    *locality.Ranking
	router  bool             // it is for a gateway, whose clients dialled the gateway
	inside  []mesh.NetworkID // networks whose gateways are behind an internal listener, sorted
}

// facts are what a service's endpoints have in common.
type facts struct {
	gateways bool     // some are behind gateways
	networks bool     // some of these on networks of this control plane
	someTLS  bool     // some take mesh TLS
	allTLS   bool     // all do
	ids      []string // who they may be, sorted
}

func (u upstream) name() string {
	return clusterName("outbound", u.port.Number, u.subset, u.service.Host)
}

// serverName is what tells gateways and servers where a connection is to go.
func (u upstream) serverName() string {
	return cmp.Or(u.policy.GetTls().GetSni(), sni.Istio(u.port.Number, u.subset, u.service.Host))
}

// carriesMeshTLS reports whether the policy leaves mesh TLS on.
func (u upstream) carriesMeshTLS() bool {
	if t := u.policy.GetTls(); t != nil {
		return t.GetMode() == networking.ClientTLSSettings_ISTIO_MUTUAL
	}
	return !u.service.External
}

// alpn is what mesh clients offer; without an HTTP version the server finds out by the first bytes.
func (u upstream) alpn() []string {
	alpn := []string{"istio-peer-exchange", "istio"}
	h := u.policy.GetConnectionPool().GetHttp()
	switch p := u.port.Protocol; {
	case !p.IsHTTP() || h.GetUseClientProtocol():
		return alpn
	case p.IsHTTP2() || h.GetH2UpgradePolicy() == networking.ConnectionPoolSettings_HTTPSettings_UPGRADE:
		return append(alpn, "h2")
	}
	return append(alpn, "http/1.1")
}

// byAddress reports whether connections go to the very address the client dialled.
func (u upstream) byAddress() bool {
	if u.policy.GetLoadBalancer().GetSimple() == networking.LoadBalancerSettings_PASSTHROUGH {
		return true
	}
	return u.service.Resolution == mesh.None || u.service.Headless && !u.router && !u.port.Protocol.IsHTTP() && u.service.Resolution == mesh.Static
}

// upstreams lists the clusters of one service.
func (v *view) upstreams(s *mesh.Service) []upstream {
	r := v.scope.RuleFor(s)
	var f facts
	var out []upstream
	for i, p := range s.Ports {
		if i == 0 || v.mtlsOff { // only then do ports differ
			f = v.factsOf(s, p)
		}
		if p.Protocol == mesh.UDP {
			continue
		}
		out = append(out, v.ranked(upstream{service: s, port: p, policy: v.policyOf(r, s, p.Number, nil), object: r.Object, facts: f}))
		for _, sub := range r.Subsets {
			out = append(out, v.ranked(upstream{service: s, port: p, subset: sub.GetName(), labels: sub.GetLabels(), policy: v.policyOf(r, s, p.Number, sub), object: r.Object, facts: f}))
		}
	}
	return out
}

// ranked adds what depends on the places of the endpoints.
func (v *view) ranked(u upstream) upstream {
	u.router = v.proxy.Type == mesh.Router
	u.rank = locality.For(v.meshConfig().GetLocalityLbSetting(), u.policy.GetLoadBalancer().GetLocalityLbSetting(), u.policy.GetOutlierDetection() != nil, v.proxy)
	if u.facts.networks && u.service.Resolution != mesh.DNS {
		u.inside = v.insideOf(u)
	}
	return u
}

func (v *view) factsOf(s *mesh.Service, p mesh.Port) facts {
	f := facts{allTLS: len(s.Endpoints) > 0}
	for _, e := range s.Endpoints {
		path := topologies.Reach(v.snap, v.network, e)
		f.gateways = f.gateways || !path.Direct && path.Reachable()
		f.networks = f.networks || path.Network != nil
		tls := v.takesTLS(e, p)
		f.someTLS = f.someTLS || tls
		f.allTLS = f.allTLS && tls
		if tls && e.Identity != "" {
			f.ids = append(f.ids, e.Identity)
		}
	}
	slices.Sort(f.ids)
	f.ids = slices.Compact(f.ids)
	return f
}

// outboundClusters returns every cluster this proxy may send to, with its endpoints, and the ways to remote gateways.
func (v *view) outboundClusters() Resources {
	var r Resources
	r.add(v.part("clusters", "", nil, func() Resources { return Resources{Clusters: elsewhereClusters()} }))
	inside := map[mesh.NetworkID]bool{}
	for _, s := range v.scope.Services() {
		x := v.served(s)
		r.add(x.Resources)
		for _, n := range x.inside {
			inside[n] = true
		}
	}
	clusters, listeners := remote.Gateways(v.snap, v.network, v.scope.Services(), inside)
	r.add(Resources{Clusters: clusters, Listeners: listeners})
	return r
}

// elsewhereClusters are those that stand for no service.
func elsewhereClusters() []*clusterv3.Cluster {
	through := originalDst(passthroughCluster)
	traffic.EitherHTTP(through)
	return []*clusterv3.Cluster{through,
		{Name: blackHoleCluster, ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}, ConnectTimeout: wire.Duration(time.Second)}}
}

func (v *view) connectTimeout() *durationpb.Duration {
	if t := v.meshConfig().GetConnectTimeout(); t.AsDuration() > 0 {
		return t
	}
	return wire.Duration(10 * time.Second)
}

// policyOf is what the rule says of one port and subset, with what the mesh says of HTTP/2.
func (v *view) policyOf(r scope.Rule, s *mesh.Service, port uint32, subset *networking.Subset) *networking.TrafficPolicy {
	return traffic.Defaulted(r.PolicyFor(port, subset), !s.External && v.meshConfig().GetH2UpgradePolicy() == meshconfig.MeshConfig_UPGRADE)
}

// cluster builds one cluster; the assignment is nil when the endpoints are not served by EDS.
func (v *view) cluster(u upstream) (*clusterv3.Cluster, *endpointv3.ClusterLoadAssignment) {
	c := &clusterv3.Cluster{
		Name:            u.name(),
		ConnectTimeout:  v.connectTimeout(),
		CircuitBreakers: wire.Unlimited(),
	}
	if k := v.meshConfig().GetTcpKeepalive(); k != nil {
		c.UpstreamConnectionOptions = traffic.Keepalive(k)
	}
	if u.object.Name != "" {
		c.Metadata = origin(u.object)
	}
	var assignment *endpointv3.ClusterLoadAssignment
	switch {
	case u.byAddress():
		c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST}
		c.LbPolicy = clusterv3.Cluster_CLUSTER_PROVIDED
	case u.service.Resolution == mesh.DNS:
		c.ClusterDiscoveryType = &clusterv3.Cluster_ClusterType{ClusterType: &clusterv3.Cluster_CustomClusterType{
			Name: "envoy.clusters.dns", TypedConfig: wire.Pack(&dnsv3.DnsCluster{RespectDnsTtl: true, DnsLookupFamily: dnscommonv3.DnsLookupFamily_ALL, AllAddressesInSingleEndpoint: u.service.OneAddress}),
		}}
		c.LoadAssignment = v.assignment(u, false)
	case u.service.Resolution == mesh.Dynamic:
		c.LbPolicy = clusterv3.Cluster_CLUSTER_PROVIDED
	default:
		c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}
		c.EdsClusterConfig = &clusterv3.Cluster_EdsClusterConfig{EdsConfig: wire.ADS(edsTimeout)}
		assignment = v.assignment(u, false)
	}
	if u.facts.gateways && u.carriesMeshTLS() {
		c.ConnectTimeout = wire.Duration(2 * time.Second)
		// No outlier detection of our own: Envoy books route timeouts like failed connections, so a slow path would set
		// every pod aside. Probes of the gateways, retries and the control plane's word do it.
	}
	traffic.Apply(c, u.policy, u.rank.Distributes())
	v.secure(c, u)
	traffic.HTTP(c, u.port, u.policy, u.router)
	if u.service.Resolution == mesh.Dynamic && !u.byAddress() {
		dynamic.Cluster(c)
	}
	if c.GetType() != clusterv3.Cluster_EDS {
		assignment = nil
	}
	return c, assignment
}

// secure chooses the transport: per endpoint in the mesh, one for all where a DestinationRule says so. A PROXY header is
// for servers without mesh TLS.
func (v *view) secure(c *clusterv3.Cluster, u upstream) {
	v.transport(c, u)
	p := u.policy.GetProxyProtocol()
	if p == nil {
		return
	}
	if len(c.TransportSocketMatches) == 0 {
		c.TransportSocket = socket.AfterProxyHeader(p, c.TransportSocket)
	}
	for _, m := range c.TransportSocketMatches {
		if m.Name == "plaintext" {
			m.TransportSocket = socket.AfterProxyHeader(p, m.TransportSocket)
		}
	}
}

func (v *view) transport(c *clusterv3.Cluster, u upstream) {
	tls := u.policy.GetTls()
	backend := v.snap.BackendTLS(u.service.Host, u.port.Number)
	if backend != nil && v.proxy.Type == mesh.Router {
		tls = socket.Backend(backend)
	}
	if tls != nil {
		switch tls.GetMode() {
		case networking.ClientTLSSettings_SIMPLE, networking.ClientTLSSettings_MUTUAL:
			s, err := socket.Originated(tls, u.service.Host, u.service.SubjectAltNames, u.port.Protocol.IsHTTP2(), v.credentials)
			if c.TransportSocket = s; err != nil {
				if backend == nil { // a policy's conditions say why
					v.problems.add(u.object, "spec.trafficPolicy.tls.credentialName", reasonCredential, err.Error())
				}
				traffic.Empty(c)
			}
			return
		case networking.ClientTLSSettings_DISABLE:
			return
		}
	}
	always := tls != nil
	if !always && (u.service.External || !u.facts.someTLS) {
		return
	}
	ids, alpn, name := u.facts.ids, u.alpn(), u.serverName()
	if len(u.service.SubjectAltNames) > 0 {
		ids = u.service.SubjectAltNames
	}
	if len(tls.GetSubjectAltNames()) > 0 {
		ids = slices.Compact(slices.Sorted(slices.Values(tls.GetSubjectAltNames())))
	}
	direct := socket.Outbound(name, alpn, ids)
	if u.byAddress() {
		if always || u.facts.allTLS {
			c.TransportSocket = direct
		}
		return
	}
	if u.facts.gateways {
		c.TransportSocketMatches = append(c.TransportSocketMatches, &clusterv3.Cluster_TransportSocketMatch{
			Name: "gateway", Match: wire.Strings("tlsMode", "istio", "via", "gateway"),
			TransportSocket: socket.ThroughInternal(socket.Outbound("", alpn, ids)),
		})
	}
	if always {
		c.TransportSocket = direct
		return
	}
	c.TransportSocketMatches = append(c.TransportSocketMatches,
		&clusterv3.Cluster_TransportSocketMatch{Name: "istio", Match: wire.Strings("tlsMode", "istio"), TransportSocket: direct},
		&clusterv3.Cluster_TransportSocketMatch{Name: "plaintext", Match: wire.Strings(), TransportSocket: socket.Raw()})
}

// originalDst is a cluster whose one host is the address the client dialled.
func originalDst(name string) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
		LbPolicy:             clusterv3.Cluster_CLUSTER_PROVIDED,
		ConnectTimeout:       wire.Duration(10 * time.Second),
		CircuitBreakers:      wire.Unlimited(),
	}
}
