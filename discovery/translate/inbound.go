package translate

import (
	"cmp"
	"maps"
	"slices"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/peerauth"
	"github.com/isthmus-mesh/isthmus/discovery/translate/socket"
	"github.com/isthmus-mesh/isthmus/discovery/translate/traffic"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

const (
	outboundPort = 15001
	inboundPort  = 15006
)

// localPort is one port at which this proxy's workload serves.
type localPort struct {
	number   uint32 // at the workload
	protocol mesh.Protocol

	// What a Sidecar may say beside.
	target *corev3.Address // where the application listens; nil: where the client asked for
	pool   *networking.ConnectionPoolSettings
	bind   string // the listener's IP; empty: every address
	opens  bool   // the proxy opens the port itself

	shared bool // clients of other clusters come here
}

// localPorts returns where this proxy's workload serves, sorted. A port that several services share speaks what the
// Kubernetes Service says, else the first service by host.
func (v *view) localPorts() []localPort {
	if list, ok := v.scope.Ingress(); ok {
		return v.declaredPorts(list)
	}
	type claim struct {
		localPort
		rank int
		host string
	}
	claims, shared := map[uint32]claim{}, map[uint32]bool{}
	for _, s := range v.snap.Services {
		i := slices.IndexFunc(s.Endpoints, v.isSelf)
		if i < 0 {
			continue
		}
		c := claim{host: s.Host}
		if s.Host != mesh.LocalHost(s.Name, s.Namespace) {
			c.rank = 1
		}
		if s.Global {
			c.rank = 2
		}
		for _, p := range s.Ports {
			if p.Protocol == mesh.UDP {
				continue
			}
			c.localPort = localPort{number: s.Endpoints[i].PortOf(p), protocol: p.Protocol}
			shared[c.number] = shared[c.number] || s.Global || s.Exported
			old, taken := claims[c.number]
			if !taken || cmp.Or(cmp.Compare(c.rank, old.rank), cmp.Compare(c.host, old.host)) < 0 {
				claims[c.number] = c
			}
		}
	}
	var out []localPort
	for _, number := range slices.Sorted(maps.Keys(claims)) {
		p := claims[number].localPort
		p.shared = shared[number]
		out = append(out, p)
	}
	return out
}

func (v *view) isSelf(e *mesh.Endpoint) bool { return v.proxy.Runs(e) }

// inbound returns the clusters of the workload's own ports and the listener for everything captured on its way in.
func (v *view) inbound() ([]*clusterv3.Cluster, []*listenerv3.Listener) {
	auth, local := peerauth.For(v.snap.PeerAuthentications, v.proxy.Namespace, v.proxy.Labels), v.localPorts()
	g := v.guard()
	clusters := append([]*clusterv3.Cluster{originalDst(inboundPassthroughCluster)}, g.clusters...)
	chains := []*listenerv3.FilterChain{{
		Name:             "loop",
		FilterChainMatch: &listenerv3.FilterChainMatch{DestinationPort: wire.U32(inboundPort)},
		Filters:          []*listenerv3.Filter{tcpProxy("BlackHoleCluster", blackHoleCluster)},
	}}
	served := map[uint32]bool{inboundPort: true}
	var opened []*listenerv3.Listener
	for _, p := range local {
		if served[p.number] {
			continue
		}
		served[p.number] = true
		c := originalDst(clusterName("inbound", p.number, "", ""))
		if p.target != nil {
			c = inboundTo(c.GetName(), p.target)
		}
		pool := p.pool
		if pool == nil {
			pool = v.scope.Sidecar.GetSpec().GetInboundConnectionPool()
		}
		policy := &networking.TrafficPolicy{ConnectionPool: pool}
		traffic.Apply(c, policy, false)
		traffic.HTTP(c, mesh.Port{Protocol: p.protocol}, policy, false)
		clusters = append(clusters, c)
		if p.opens {
			opened = append(opened, v.openInbound(g, p, c.GetName(), auth.At(p.number)))
		}
		chains = append(chains, g.inboundChains(p, c.GetName(), auth.At(p.number))...)
	}
	for _, number := range slices.Sorted(maps.Keys(auth.Ports)) {
		if !served[number] {
			chains = append(chains, g.inboundChains(localPort{number: number, protocol: mesh.TCP}, inboundPassthroughCluster, auth.At(number))...)
		}
	}
	chains = append(chains, g.inboundChains(localPort{protocol: mesh.TCP}, inboundPassthroughCluster, auth.Mode)...)
	var transparent *wrapperspb.BoolValue
	if v.proxy.Transparent {
		transparent = wire.Yes()
	}
	return clusters, append(opened, v.anyAddress(&listenerv3.Listener{
		Name:             "virtualInbound",
		Transparent:      transparent,
		TrafficDirection: inboundDirection,
		ListenerFilters: []*listenerv3.ListenerFilter{
			listenerFilter("envoy.filters.listener.original_dst", wire.Pack(&originaldstv3.OriginalDst{})),
			tlsInspector(),
		},
		// A client that sends nothing, or a server that speaks first, is not TLS.
		ListenerFiltersTimeout: wire.Duration(inspectTimeout), ContinueOnListenerFiltersTimeout: true,
		FilterChains: chains,
	}, inboundPort))
}

// inboundChains returns the filter chains of one port; number 0 stands for all ports without chains of their own. Envoy
// does not look back once the port and the transport match, so every pair that is to be taken has its own chain.
func (g guard) inboundChains(p localPort, cluster string, mode peerauth.Mode) []*listenerv3.FilterChain {
	chain := func(kind, transport string, alpn []string, filters ...*listenerv3.Filter) *listenerv3.FilterChain {
		m := &listenerv3.FilterChainMatch{TransportProtocol: transport, ApplicationProtocols: alpn}
		if p.number != 0 {
			m.DestinationPort = wire.U32(p.number)
		}
		return &listenerv3.FilterChain{Name: wire.Itoa(p.number) + "|" + kind, FilterChainMatch: m, Filters: filters}
	}
	opaque := g.before(tcpProxy(cluster, cluster))
	filters := opaque
	if p.protocol.IsHTTP() {
		filters = []*listenerv3.Filter{g.inboundHTTP(p, cluster)}
	}
	var out []*listenerv3.FilterChain
	if mode != peerauth.Disable {
		c := chain("mtls", "tls", slices.Clone(sni.ALPN), filters...)
		c.TransportSocket = socket.Inbound()
		c.Metadata = socket.Evictions(g.local, p.shared)
		out = append(out, c)
	}
	if mode != peerauth.Strict {
		out = append(out,
			chain("plaintext", "raw_buffer", nil, filters...),
			chain("app-tls", "tls", nil, opaque...))
	}
	return out
}

func (g guard) inboundHTTP(p localPort, cluster string) *listenerv3.Filter {
	return g.manager(&hcmv3.HttpConnectionManager{
		StatPrefix: "inbound_" + wire.Itoa(p.number),
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
			Name:             cluster,
			ValidateClusters: wire.No(),
			VirtualHosts: []*routev3.VirtualHost{{Name: "inbound|http|" + wire.Itoa(p.number), Domains: []string{"*"}, Routes: []*routev3.Route{{
				Name:   "default",
				Match:  httprule.EveryPath(),
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster}, Timeout: wire.Duration(0)}},
			}}}},
		}},
		ServerHeaderTransformation: hcmv3.HttpConnectionManager_PASS_THROUGH,
		ForwardClientCertDetails:   hcmv3.HttpConnectionManager_SANITIZE_SET,
		SetCurrentClientCertDetails: &hcmv3.HttpConnectionManager_SetCurrentClientCertDetails{
			Uri: true,
		},
	})
}

func tlsInspector() *listenerv3.ListenerFilter {
	return listenerFilter("envoy.filters.listener.tls_inspector", wire.Pack(&tlsinspectorv3.TlsInspector{}))
}

// takesTLS reports whether mesh TLS is spoken to the endpoint's port: it has a proxy, and no PeerAuthentication turned
// mutual TLS off there. What other clusters have turned off is not known here.
func (v *view) takesTLS(e *mesh.Endpoint, p mesh.Port) bool {
	if !e.TLS || !v.mtlsOff || e.Identity == "" || topologies.IsPeer(v.snap, v.snap.Cluster(e.Cluster)) {
		return e.TLS
	}
	return peerauth.For(v.snap.PeerAuthentications, e.Namespace, e.Labels).At(e.PortOf(p)) != peerauth.Disable
}
