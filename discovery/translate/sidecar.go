package translate

import (
	"net/netip"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/peerauth"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// ownListeners returns the outbound listeners with an address of their own that a Sidecar asks for, and their routes.
func (v *view) ownListeners() (listeners []*listener, routes []*routev3.RouteConfiguration) {
	for _, l := range v.scope.Listeners() {
		name := l.Path
		if name == "" {
			name = l.Bind + "_" + wire.Itoa(l.Number)
		}
		out := &listener{Name: name, Address: wire.Socket(l.Bind, l.Number), BindToPort: wire.No(), TrafficDirection: outboundDirection}
		if l.Path != "" {
			out.Address = wire.Pipe(l.Path)
		}
		if l.Opens {
			out.BindToPort = nil
		}
		if l.Protocol.IsHTTP() {
			r := &routev3.RouteConfiguration{Name: name, ValidateClusters: wire.No(), VirtualHosts: append(httprule.UniqueDomains(v.hostsOf(l)), v.otherHosts())}
			routes = append(routes, r)
			out.FilterChains = []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{v.manager(&hcmv3.HttpConnectionManager{
				StatPrefix: "outbound_" + name, RouteSpecifier: rds(name),
			})}}}
		} else {
			out = v.opaque(out, l)
		}
		if out != nil {
			listeners = append(listeners, out)
		}
	}
	return listeners, routes
}

// hostsOf returns the virtual hosts of an HTTP listener of its own.
func (v *view) hostsOf(l scope.Listener) []*routev3.VirtualHost {
	var out []*routev3.VirtualHost
	for _, s := range l.Services {
		for _, p := range s.Ports {
			if p.Protocol.IsHTTP() && (l.Number == 0 || l.Number == p.Number) {
				out = append(out, virtualHost(s.Host+":"+wire.Itoa(p.Number), v.domains(s, p.Number), v.routesOf(s, p)))
			}
		}
	}
	return out
}

// opaque leads the connections of a listener of its own to its one service, or by server name to one of several.
func (v *view) opaque(out *listener, l scope.Listener) *listener {
	shared := map[uint32][]*listenerv3.FilterChain{}
	for _, s := range l.Services {
		p, ok := s.Port(l.Number)
		if l.Number == 0 && len(s.Ports) > 0 {
			p, ok = s.Ports[0], true
		}
		if !ok || p.Protocol.IsHTTP() || p.Protocol == mesh.UDP {
			continue
		}
		if p.Protocol == mesh.TCP { // the bytes do not say where they go
			out.FilterChains = v.tcpChains(s, p)
			return inspectTLS(out)
		}
		v.share(shared, s, p, false, nil)
	}
	for _, chains := range shared {
		out.FilterChains = append(out.FilterChains, chains...)
	}
	if len(out.FilterChains) == 0 {
		v.problems.add(v.scope.Sidecar.Object, "spec.egress", reasonUnknownHost, "listener "+out.Name+" leads to no service")
		return nil
	}
	return inspectTLS(out)
}

// declaredPorts are the ports of the workload that its Sidecar says, instead of those of its Services.
func (v *view) declaredPorts(list []*networking.IstioIngressListener) []localPort {
	var out []localPort
	for _, l := range list {
		p := localPort{number: l.GetPort().GetNumber(), protocol: scope.IngressProtocol(l), pool: l.GetConnectionPool(), bind: l.GetBind()}
		p.opens = l.GetCaptureMode() == networking.CaptureMode_NONE
		if path, unix := strings.CutPrefix(l.GetDefaultEndpoint(), "unix://"); unix {
			p.target = wire.Pipe(path)
		} else if a, err := netip.ParseAddrPort(l.GetDefaultEndpoint()); err == nil {
			if a.Addr().IsUnspecified() {
				a = netip.AddrPortFrom(v.ownAddress(a.Addr()), a.Port())
			}
			p.target = wire.Socket(a.Addr().String(), uint32(a.Port()))
		}
		out = append(out, p)
	}
	slices.SortStableFunc(out, func(a, b localPort) int { return int(a.number) - int(b.number) })
	return out
}

// ownAddress is the proxy's own address of the family of like.
func (v *view) ownAddress(like netip.Addr) netip.Addr {
	for _, a := range v.proxy.Addresses {
		if a.Is4() == like.Is4() {
			return a
		}
	}
	return v.proxy.Addresses[0]
}

// inboundTo is the cluster of one port that leads elsewhere than to where the client asked for.
func inboundTo(name string, target *corev3.Address) *clusterv3.Cluster {
	c := originalDst(name)
	c.ClusterDiscoveryType, c.LbPolicy = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}, clusterv3.Cluster_ROUND_ROBIN
	c.LoadAssignment = &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
		LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: target}}}},
	}}}
	return c
}

// openInbound is the listener of a port that nothing is captured for.
func (v *view) openInbound(g guard, p localPort, cluster string, mode peerauth.Mode) *listener {
	l := &listener{
		Name: "inbound_" + wire.Itoa(p.number), TrafficDirection: inboundDirection, FilterChains: g.inboundChains(p, cluster, mode),
		ListenerFilters: []*listenerv3.ListenerFilter{tlsInspector()}, ListenerFiltersTimeout: wire.Duration(inspectTimeout), ContinueOnListenerFiltersTimeout: true,
	}
	if p.bind == "" {
		return v.anyAddress(l, p.number)
	}
	l.Address = wire.Socket(p.bind, p.number)
	return l
}
