package translate

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/dynamic"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/traffic"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// plainHTTPPort is where hosts are routed that a VirtualService names and no service has.
const plainHTTPPort = 80

// outbound returns the listeners that captured connections are handed to by their destination, and their routes.
func (v *view) outbound() Resources {
	r := v.fixed("virtualOutbound", v.virtualOutbound)
	hosts := v.virtualHosts()
	for _, port := range slices.Sorted(maps.Keys(hosts)) {
		name := wire.Itoa(port)
		r.add(v.tableOf(name, hosts[port]))
		r.add(v.fixed("0.0.0.0_"+name, func() *listener { return v.httpPort(name, port) }))
	}
	own, ownRoutes := v.ownListeners()
	r.add(v.tcpListeners(hosts))
	r.add(Resources{Listeners: own, Routes: ownRoutes})
	return r
}

// table routes by host, what no host takes as other traffic.
func (v *view) table(name string, hosts []*routev3.VirtualHost) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{Name: name, ValidateClusters: wire.No(), VirtualHosts: append(httprule.UniqueDomains(hosts), v.otherHosts())}
}

// httpPort is the listener of a port on which services speak HTTP.
func (v *view) httpPort(name string, port uint32) *listener {
	return v.anyAddress(&listener{
		Name: "0.0.0.0_" + name, BindToPort: wire.No(), TrafficDirection: outboundDirection,
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{v.manager(&hcmv3.HttpConnectionManager{
			StatPrefix: "outbound_0.0.0.0_" + name, RouteSpecifier: rds(name),
		})}}},
	}, port)
}

// virtualOutbound takes everything that leaves; what no other listener is for goes where it was sent to. A connection
// made to the port itself would go round in circles, so it is closed.
func (v *view) virtualOutbound() *listener {
	return v.anyAddress(&listener{
		Name: "virtualOutbound", TrafficDirection: outboundDirection, UseOriginalDst: wire.Yes(),
		FilterChains: []*listenerv3.FilterChain{{
			Name:             "loop",
			FilterChainMatch: &listenerv3.FilterChainMatch{DestinationPort: wire.U32(outboundPort)},
			Filters:          []*listenerv3.Filter{tcpProxy(blackHoleCluster, blackHoleCluster)},
		}},
		DefaultFilterChain: &listenerv3.FilterChain{
			Name: "passthrough", Filters: []*listenerv3.Filter{v.elsewhere()},
		},
	}, outboundPort)
}

// elsewhere takes connections to what no service has: on to where they were sent, or nowhere.
func (v *view) elsewhere() *listenerv3.Filter {
	if v.scope.RegistryOnly() {
		return tcpProxy(blackHoleCluster, blackHoleCluster)
	}
	return tcpProxy(passthroughCluster, passthroughCluster)
}

// otherHosts takes requests for hosts that no service has.
func (v *view) otherHosts() *routev3.VirtualHost {
	if v.scope.RegistryOnly() {
		return virtualHost("block_all", []string{"*"}, []*routev3.Route{{Name: "block_all", Match: httprule.EveryPath(), Action: &routev3.Route_DirectResponse{
			DirectResponse: &routev3.DirectResponseAction{Status: 502},
		}}})
	}
	return virtualHost("allow_any", []string{"*"}, []*routev3.Route{passthroughRoute()})
}

func passthroughRoute() *routev3.Route {
	return &routev3.Route{Name: "allow_any", Match: httprule.EveryPath(), Action: &routev3.Route_Route{Route: &routev3.RouteAction{
		ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: passthroughCluster}, Timeout: wire.Duration(0),
	}}}
}

// virtualHosts returns, for each port that some service speaks HTTP on, one virtual host per service, sorted.
func (v *view) virtualHosts() map[uint32][]*routev3.VirtualHost {
	out := map[uint32][]*routev3.VirtualHost{}
	for _, s := range v.scope.Services() {
		for _, p := range s.Ports {
			if !p.Protocol.IsHTTP() || !v.scope.Serves(s, p.Number) {
				continue
			}
			if p.Number == outboundPort || p.Number == inboundPort {
				v.problems.add(s.Object, "spec.ports", reasonPortConflict, "port "+wire.Itoa(p.Number)+" is the proxy's own")
				continue
			}
			out[p.Number] = append(out[p.Number], v.hostOf(s, p))
		}
	}
	for _, host := range v.scope.RoutedHosts() {
		vs := v.scope.Routes(host)
		if host == "*" || v.snap.Service(host) != nil {
			continue
		}
		if h := v.namedHost(host, vs); h != nil {
			out[plainHTTPPort] = append(out[plainHTTPPort], h)
		}
	}
	return out
}

// routesOf are the routes of a service's port: its VirtualService's, or straight to the service where none is for it.
func (v *view) routesOf(s *mesh.Service, p mesh.Port) []*routev3.Route {
	if vs := v.scope.VirtualService(s.Host); vs != nil {
		if routes := v.httpRoutes(vs, site{meshGateway, p.Number}); len(routes) > 0 {
			return routes
		}
	}
	return []*routev3.Route{v.directRoute(clusterName("outbound", p.Number, "", s.Host), v.policyOf(v.scope.RuleFor(s), s, p.Number, nil))}
}

// tcpListeners returns one listener for each address and port of services that do not speak HTTP. TLS services without
// an address share the port's wildcard listener and are told apart by server name.
func (v *view) tcpListeners(http map[uint32][]*routev3.VirtualHost) (out Resources) {
	owner := map[string]string{}
	shared := map[uint32][]*listenerv3.FilterChain{}
	for _, s := range v.scope.Services() {
		for _, p := range s.Ports {
			if p.Protocol.IsHTTP() || p.Protocol == mesh.UDP || !v.scope.Serves(s, p.Number) {
				continue
			}
			x := v.opaqueOf(s, p)
			// Who asks another server than ours for an external name calls an address that is not known here.
			if len(x.addresses) == 0 || len(s.Ranges) > 0 || s.External && p.Protocol != mesh.TCP {
				v.share(shared, s, p, len(x.addresses) > 0, http)
			}
			for i, a := range x.addresses {
				name := opaqueName(a, p)
				if first, taken := owner[name]; taken {
					if first != s.Host {
						v.problems.add(s.Object, "", reasonPortConflict, wire.JoinHostPort(a, p.Number)+" belongs to "+first)
					}
					continue
				}
				owner[name] = s.Host
				out.add(x.listeners[i])
			}
		}
	}
	for _, port := range slices.Sorted(maps.Keys(shared)) {
		out.Listeners = append(out.Listeners, inspectTLS(v.anyAddress(&listener{
			Name: "0.0.0.0_" + wire.Itoa(port), BindToPort: wire.No(), TrafficDirection: outboundDirection, FilterChains: shared[port],
			DefaultFilterChain: &listenerv3.FilterChain{Filters: []*listenerv3.Filter{v.elsewhere()}},
		}, port)))
	}
	return out
}

// opaquePort makes the listeners of one port that is not HTTP.
func (v *view) opaquePort(s *mesh.Service, p mesh.Port) (out opaque) {
	chains := v.tcpChains(s, p)
	for _, a := range v.listenAddresses(s) {
		l := inspectTLS(&listener{
			Name: opaqueName(a, p), Address: wire.Socket(a.String(), p.Number),
			BindToPort: wire.No(), TrafficDirection: outboundDirection, FilterChains: chains,
		})
		r := Resources{Listeners: []*listener{l}}
		if p.Sniffed {
			r.Routes = append(r.Routes, v.sniff(l, s, p))
		}
		out.addresses, out.listeners = append(out.addresses, a), append(out.listeners, v.packed(r))
	}
	return out
}

func opaqueName(a netip.Addr, p mesh.Port) string { return a.String() + "_" + wire.Itoa(p.Number) }

// share adds the chains of a service that has no address of its own, or not only, to the port's wildcard listener: by
// range of addresses, else by server name.
func (v *view) share(shared map[uint32][]*listenerv3.FilterChain, s *mesh.Service, p mesh.Port, known bool, http map[uint32][]*routev3.VirtualHost) {
	switch {
	case http[p.Number] != nil:
		if !known {
			v.problems.add(s.Object, "spec.ports", reasonPortConflict, "port "+wire.Itoa(p.Number)+" of "+s.Host+" is "+string(p.Protocol)+" without an address of its own, other services speak HTTP there")
		}
	case len(s.Ranges) > 0, p.Protocol != mesh.TCP && s.Host != "*":
		for _, c := range v.tcpChains(s, p) {
			if c.FilterChainMatch == nil {
				c.FilterChainMatch = &listenerv3.FilterChainMatch{}
			}
			if m := c.FilterChainMatch; len(s.Ranges) == 0 && len(m.ServerNames) == 0 {
				m.ServerNames = []string{s.Host}
			} else if len(m.PrefixRanges) == 0 {
				m.PrefixRanges = wire.Prefixes(s.Ranges)
			}
			if wire.FreeMatch(shared[p.Number], c.FilterChainMatch) {
				shared[p.Number] = append(shared[p.Number], c)
			}
		}
	case p.Protocol == mesh.TCP && !known && s.Resolution != mesh.None && !s.Headless:
		v.problems.add(s.Object, "spec.addresses", reasonNoAddress, "port "+wire.Itoa(p.Number)+" of "+s.Host+" is TCP and the host has no address to know it by")
	}
}

// inspectTLS lets a listener read the server name when a chain asks for it.
func inspectTLS(l *listener) *listener {
	if slices.ContainsFunc(l.GetFilterChains(), func(c *listenerv3.FilterChain) bool { return len(c.GetFilterChainMatch().GetServerNames()) > 0 }) {
		l.ListenerFilters = []*listenerv3.ListenerFilter{tlsInspector()}
		l.ListenerFiltersTimeout, l.ContinueOnListenerFiltersTimeout = wire.Duration(inspectTimeout), true
	}
	return l
}

// listenAddresses are the addresses that DNS answers for s: its own, or those of endpoints reached directly.
func (v *view) listenAddresses(s *mesh.Service) []netip.Addr {
	if !s.Headless {
		return v.vips(s)
	}
	var out []netip.Addr
	for _, e := range s.Endpoints {
		if a, err := netip.ParseAddr(e.Address); err == nil && topologies.Reach(v.snap, v.network, e).Direct {
			out = append(out, a.Unmap())
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// tcpChains are the chains of one TCP or TLS port: one for each server name a VirtualService routes, and one for the rest.
func (v *view) tcpChains(s *mesh.Service, p mesh.Port) []*listenerv3.FilterChain {
	rest := v.straight(s, p)
	vs := v.scope.VirtualService(s.Host)
	if vs == nil {
		return []*listenerv3.FilterChain{{Filters: rest}}
	}
	at := site{meshGateway, p.Number}
	var out []*listenerv3.FilterChain
	taken := map[string]bool{}
	for i, t := range vs.Spec.GetTls() {
		for _, m := range t.GetMatch() {
			names := slices.DeleteFunc(slices.Clone(m.GetSniHosts()), func(n string) bool { return taken[n] })
			field := "spec.tls[" + strconv.Itoa(i) + "]"
			if len(names) == 0 || !v.applies(at, vs, m) {
				continue
			}
			ranges := wire.Ranges(m.GetDestinationSubnets())
			for _, n := range names {
				taken[n] = len(ranges) == 0
			}
			out = append(out, &listenerv3.FilterChain{
				FilterChainMatch: &listenerv3.FilterChainMatch{ServerNames: names, PrefixRanges: ranges},
				Filters:          v.tcpRoute(vs, t.GetRoute(), at, field),
			})
		}
	}
	narrow, all := v.tcpRoutes(vs, at)
	if all != nil {
		rest = all
	}
	return append(append(out, narrow...), &listenerv3.FilterChain{Filters: rest})
}

// straight leads connections to the service's own cluster.
func (v *view) straight(s *mesh.Service, p mesh.Port) []*listenerv3.Filter {
	name := clusterName("outbound", p.Number, "", s.Host)
	t := &tcpproxyv3.TcpProxy{StatPrefix: name, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: name}, IdleTimeout: wire.Duration(0)}
	traffic.TCP(t, v.policyOf(v.scope.RuleFor(s), s, p.Number, nil))
	return dynamic.Before(s, p, tcpFilter(t))
}

// tcpRoutes returns the chains of rules for some addresses only, and the first rule for all of them. Of chains whose
// addresses overlap Envoy takes the narrowest.
func (v *view) tcpRoutes(vs *mesh.VirtualService, at site) (narrow []*listenerv3.FilterChain, all []*listenerv3.Filter) {
	taken := map[string]bool{}
	for i, t := range vs.Spec.GetTcp() {
		matches, field := t.GetMatch(), "spec.tcp["+strconv.Itoa(i)+"]"
		if len(matches) == 0 {
			matches = []*networking.L4MatchAttributes{{}}
		}
		for _, m := range matches {
			if !v.applies(at, vs, m) {
				continue
			}
			if len(m.GetDestinationSubnets()) == 0 && m.GetSourceSubnet() == "" {
				return narrow, v.tcpRoute(vs, t.GetRoute(), at, field)
			}
			match := &listenerv3.FilterChainMatch{PrefixRanges: wire.Ranges(m.GetDestinationSubnets())}
			if m.GetSourceSubnet() != "" {
				match.SourcePrefixRanges = wire.Ranges([]string{m.GetSourceSubnet()})
			}
			if key := match.String(); !taken[key] {
				taken[key] = true
				narrow = append(narrow, &listenerv3.FilterChain{FilterChainMatch: match, Filters: v.tcpRoute(vs, t.GetRoute(), at, field)})
			}
		}
	}
	return narrow, nil
}

// tcpRoute spreads connections over the destinations; one that does not exist keeps its share, which is closed.
func (v *view) tcpRoute(vs *mesh.VirtualService, routes []*networking.RouteDestination, at site, field string) []*listenerv3.Filter {
	var out []*listenerv3.Filter
	t := &tcpproxyv3.TcpProxy{IdleTimeout: wire.Duration(0), StatPrefix: "outbound|" + vs.Object.String()}
	weighted := &tcpproxyv3.TcpProxy_WeightedCluster{}
	for i, d := range routes {
		if len(routes) > 1 && d.GetWeight() <= 0 {
			continue
		}
		name := blackHoleCluster
		if vs.GatewayAPI && d.GetDestination().GetHost() == "" {
			weighted.Clusters = append(weighted.Clusters, &tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight{Name: name, Weight: uint32(max(d.GetWeight(), 1))})
			continue
		}
		if to, ok := v.resolve(d.GetDestination(), at.port, vs.Object, field+".route["+strconv.Itoa(i)+"].destination"); ok {
			name = to.cluster
			traffic.TCP(t, to.policy)
			if len(out) == 0 {
				out = dynamic.Before(to.service, to.port)
			}
		}
		weighted.Clusters = append(weighted.Clusters, &tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight{Name: name, Weight: uint32(max(d.GetWeight(), 1))})
	}
	switch len(weighted.Clusters) {
	case 0:
		t.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: blackHoleCluster}
	case 1:
		t.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: weighted.Clusters[0].GetName()}
	default:
		t.ClusterSpecifier = &tcpproxyv3.TcpProxy_WeightedClusters{WeightedClusters: weighted}
	}
	return append(out, tcpFilter(t))
}
