// Package ingress makes the listeners and route tables of Gateways: which servers a router has, how they share a port,
// and which hosts each of them takes. What a VirtualService routes is made by its caller.
package ingress

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/discovery/translate/socket"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// Site is where routes are made for: one Gateway (NAMESPACE/NAME) and the port of its server.
type Site struct {
	Gateway string
	Port    uint32
}

// TLSRoute is where a VirtualService leads connections with certain server names.
type TLSRoute struct {
	Names   []string
	Field   string // of the VirtualService
	Filters []*listenerv3.Filter
}

// Routes makes what VirtualServices route.
type Routes interface {
	// Sees reports whether the VirtualService is for this router's namespace.
	Sees(vs *mesh.VirtualService) bool
	// HTTP returns the routes of its http rules.
	HTTP(vs *mesh.VirtualService, at Site) []*routev3.Route
	// TCP returns the chains of tcp rules for some addresses only, and the filters of the first rule for all of them.
	TCP(vs *mesh.VirtualService, at Site) (narrow []*listenerv3.FilterChain, all []*listenerv3.Filter)
	// TLS returns where its tls rules lead.
	TLS(vs *mesh.VirtualService, at Site) []TLSRoute
	// Manager completes an HTTP connection manager.
	Manager(*hcmv3.HttpConnectionManager) *listenerv3.Filter
	// Report takes what is left out.
	Report(object mesh.ObjectRef, field, reason, message string)
}

// Reasons of what is left out.
const (
	ReasonInvalid      = "InvalidValue"
	ReasonUnsupported  = "Unsupported"
	ReasonHostConflict = "ConflictingHosts"
	ReasonPortConflict = "PortConflict"
	ReasonCredential   = "NoCredential"
)

// server is one server of a Gateway that selects the router.
type server struct {
	*networking.Server
	gateway *mesh.Gateway
	index   int
}

func (s server) site() Site {
	return Site{s.gateway.Object.Namespace + "/" + s.gateway.Object.Name, s.GetPort().GetNumber()}
}

func (s server) field() string { return "spec.servers[" + strconv.Itoa(s.index) + "]" }

// kind is what a server does with a connection.
type kind int

const (
	unknown  kind = iota
	plain         // HTTP
	https         // HTTP in TLS that ends here
	ended         // other protocols in TLS that ends here
	passed        // TLS that is passed on by its server name
	tcp           // bytes that are passed on
	eastWest      // by package gateway
)

func kindOf(s *networking.Server) kind {
	protocol, tls := strings.ToUpper(s.GetPort().GetProtocol()), s.GetTls()
	encrypted := protocol == "HTTPS" || protocol == "TLS"
	switch {
	case encrypted && tls == nil:
		return unknown
	case encrypted && tls.GetMode() == networking.ServerTLSSettings_AUTO_PASSTHROUGH:
		return eastWest
	case encrypted && tls.GetMode() == networking.ServerTLSSettings_PASSTHROUGH:
		return passed
	case protocol == "HTTPS":
		return https
	case protocol == "TLS":
		return ended
	case slices.Contains([]string{"HTTP", "HTTP2", "GRPC", "GRPC-WEB"}, protocol):
		return plain
	case slices.Contains([]string{"TCP", "MONGO", "MYSQL", "REDIS", "CASSANDRA", "THRIFT", "KAFKA"}, protocol):
		return tcp
	}
	return unknown
}

// builder makes what one router has.
type builder struct {
	snap   *mesh.Snapshot
	proxy  *mesh.Proxy
	from   *socket.Credentials
	routes Routes
	tables []*routev3.RouteConfiguration
	names  map[string]bool // of tables
}

// Build returns the listeners and route tables of the Gateways that select p, by port. A listener has a name, chains and
// listener filters, and no address yet.
func Build(snap *mesh.Snapshot, p *mesh.Proxy, from *socket.Credentials, r Routes) (map[uint32]*listenerv3.Listener, []*routev3.RouteConfiguration) {
	b := &builder{snap: snap, proxy: p, from: from, routes: r, names: map[string]bool{}}
	out := map[uint32]*listenerv3.Listener{}
	servers := b.servers()
	for _, bind := range slices.Sorted(maps.Keys(servers)) {
		if l := b.listener(bind, servers[bind]); l != nil {
			out[bind] = l
		}
	}
	return out, b.tables
}

// servers returns the servers for the router by the port that it listens on, in the order of their Gateways.
func (b *builder) servers() map[uint32][]server {
	out := map[uint32][]server{}
	for _, g := range b.snap.Gateways {
		if !scope.Selects(g.Spec.GetSelector(), b.proxy.Labels) || g.Routers != "" && g.Routers != b.proxy.Namespace {
			continue
		}
		b.from.Grant(g.Secrets)
		for i, x := range g.Spec.GetServers() {
			s, port := server{x, g, i}, x.GetPort().GetNumber()
			switch k := kindOf(x); {
			case k == eastWest:
			case k == unknown:
				b.report(s, ".port.protocol", ReasonUnsupported, "protocol "+x.GetPort().GetProtocol()+" is not served, or not without TLS settings")
			case port == 0 || port > 65535:
				b.report(s, ".port.number", ReasonInvalid, "port "+wire.Itoa(port))
			default:
				bind := b.snap.BindPort(b.proxy, port)
				out[bind] = append(out[bind], s)
			}
		}
	}
	return out
}

func (b *builder) report(s server, field, reason, message string) {
	b.routes.Report(s.gateway.Object, s.field()+field, reason, message)
}

// listener gathers the chains of one port. Chains with TLS are told apart by server name; beside them there may be plain
// HTTP, or TCP.
func (b *builder) listener(bind uint32, servers []server) *listenerv3.Listener {
	l := &listenerv3.Listener{Name: "0.0.0.0_" + wire.Itoa(bind)}
	c := &chains{b: b, bind: bind, taken: map[string]mesh.ObjectRef{}, all: servers}
	byPort := map[uint32][]server{}
	for _, s := range servers {
		switch kindOf(s.Server) {
		case plain:
			byPort[s.GetPort().GetNumber()] = append(byPort[s.GetPort().GetNumber()], s)
		case https, ended:
			c.terminate(s)
		case passed:
			c.pass(s)
		}
	}
	c.plain(byPort)
	if len(byPort) == 0 {
		c.tcp(servers)
	}
	if len(c.list)+len(c.open) == 0 {
		return nil
	}
	if len(c.list) > 0 {
		for _, x := range c.open { // else TLS with an unknown name would be taken for plain text
			if x.FilterChainMatch == nil {
				x.FilterChainMatch = &listenerv3.FilterChainMatch{}
			}
			x.FilterChainMatch.TransportProtocol = "raw_buffer"
		}
		l.ListenerFilters = []*listenerv3.ListenerFilter{inspector()}
		l.ListenerFiltersTimeout, l.ContinueOnListenerFiltersTimeout = wire.Duration(inspectTimeout), len(c.open) > 0
	}
	l.FilterChains = append(c.list, c.open...)
	return l
}

// inspectTimeout bounds the wait for a client's first bytes, which say whether it speaks TLS.
const inspectTimeout = 5 * time.Second

// inspector reads the server name of TLS.
func inspector() *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: "envoy.filters.listener.tls_inspector", ConfigType: &listenerv3.ListenerFilter_TypedConfig{
		TypedConfig: wire.Pack(&tlsinspectorv3.TlsInspector{}),
	}}
}
