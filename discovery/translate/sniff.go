package translate

import (
	"slices"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// sniffTimeout bounds the wait for a client's first bytes at a port of which nobody said what it speaks, unless the mesh
// has a protocolDetectionTimeout. A client that waits for its server is served after it.
const sniffTimeout = time.Second

// sniff lets the listener of a port of which nobody said what it speaks look for HTTP in the first bytes. It returns the
// routes for what is found.
func (v *view) sniff(l *listener, s *mesh.Service, p mesh.Port) *routev3.RouteConfiguration {
	name := s.Host + ":" + wire.Itoa(p.Number)
	match := &listenerv3.FilterChainMatch{ApplicationProtocols: []string{"http/1.0", "http/1.1", "h2c"}}
	if len(l.ListenerFilters) > 0 { // TLS is looked into, too: what it says of HTTP is not in plain text
		match.TransportProtocol = "raw_buffer"
		l.FilterChains = append(slices.Clone(l.FilterChains), wire.PlainChains(l.FilterChains)...)
	}
	l.FilterChains = slices.Insert(slices.Clone(l.FilterChains), 0, &listenerv3.FilterChain{
		FilterChainMatch: match,
		Filters: []*listenerv3.Filter{v.manager(&hcmv3.HttpConnectionManager{
			StatPrefix: "outbound_" + name, RouteSpecifier: rds(name),
		})},
	})
	wait := wire.Duration(sniffTimeout)
	if d := v.meshConfig().GetProtocolDetectionTimeout(); d.AsDuration() > 0 {
		wait = d
	}
	l.ListenerFilters = append(l.ListenerFilters, listenerFilter("envoy.filters.listener.http_inspector", wire.Pack(&httpinspectorv3.HttpInspector{})))
	l.ListenerFiltersTimeout, l.ContinueOnListenerFiltersTimeout = wait, true
	return &routev3.RouteConfiguration{
		Name: name, ValidateClusters: wire.No(), VirtualHosts: []*routev3.VirtualHost{virtualHost(name, []string{"*"}, v.routesOf(s, p))},
	}
}
