package ingress

import (
	"maps"
	"slices"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/discovery/translate/socket"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// chains are those of one listener.
type chains struct {
	b     *builder
	bind  uint32
	list  []*listenerv3.FilterChain // with TLS
	open  []*listenerv3.FilterChain // without
	taken map[string]mesh.ObjectRef // server names, and who has them
	all   []server                  // of the port
}

// claim takes the names that nobody has yet; "" stands for all names. It says who has the others.
func (c *chains) claim(names []string, by mesh.ObjectRef, field string) (out []string) {
	for _, n := range names {
		n = strings.ToLower(n)
		if n == "*" {
			n = ""
		}
		if first, taken := c.taken[n]; taken {
			if first != by {
				c.b.routes.Report(by, field, ReasonHostConflict, "server name "+show(n)+" at port "+wire.Itoa(c.bind)+" belongs to "+first.String())
			}
			continue
		}
		c.taken[n] = by
		out = append(out, n)
	}
	return out
}

func show(name string) string {
	if name == "" {
		return "*"
	}
	return name
}

// match is true for TLS with one of the names.
func match(names []string) *listenerv3.FilterChainMatch {
	m := &listenerv3.FilterChainMatch{TransportProtocol: "tls"}
	if !slices.Contains(names, "") {
		m.ServerNames = names
	}
	return m
}

// add adds chains for the names: what is for all names needs a chain of its own beside that of some.
func (c *chains) add(names []string, chain *listenerv3.FilterChain) {
	named := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == "" })
	if len(named) > 0 {
		x := proto.Clone(chain).(*listenerv3.FilterChain)
		x.FilterChainMatch = narrow(match(named), chain.GetFilterChainMatch())
		c.list = append(c.list, x)
	}
	if len(named) < len(names) {
		x := proto.Clone(chain).(*listenerv3.FilterChain)
		x.FilterChainMatch = narrow(match([]string{""}), chain.GetFilterChainMatch())
		c.list = append(c.list, x)
	}
}

// narrow adds the addresses of one match to another.
func narrow(m, by *listenerv3.FilterChainMatch) *listenerv3.FilterChainMatch {
	m.PrefixRanges, m.SourcePrefixRanges = by.GetPrefixRanges(), by.GetSourcePrefixRanges()
	return m
}

// terminate adds a server that ends TLS.
func (c *chains) terminate(s server) {
	isHTTP := kindOf(s.Server) == https
	tls, err := socket.Server(s.GetTls(), isHTTP, c.b.from)
	if err != nil {
		c.b.report(s, ".tls.credentialName", ReasonCredential, err.Error()+"; the server is down")
		return
	}
	for _, x := range socket.UnknownCiphers(s.GetTls().GetCipherSuites()) {
		c.b.report(s, ".tls.cipherSuites", ReasonInvalid, "Envoy knows no cipher suite "+x+"; it is left out")
	}
	var hosts []string
	for _, pattern := range s.GetHosts() {
		_, h := splitHost(pattern)
		hosts = append(hosts, h)
	}
	names := c.claim(hosts, s.gateway.Object, s.field()+".hosts")
	if len(names) == 0 {
		return
	}
	if !isHTTP {
		for _, x := range c.b.connections(s) {
			x.TransportSocket = tls
			c.add(names, x)
		}
		return
	}
	table := "https." + wire.Itoa(s.GetPort().GetNumber()) + "." + s.GetPort().GetName() + "." + s.gateway.Object.Name + "." + s.gateway.Object.Namespace
	if c.b.names[table] {
		table += "." + wire.Itoa(uint32(s.index))
	}
	c.b.table(table, c.misdirected(s, c.b.hosts([]server{s})))
	m := c.manager(table)
	if mode := s.GetTls().GetMode(); mode == networking.ServerTLSSettings_MUTUAL || mode == networking.ServerTLSSettings_ISTIO_MUTUAL || mode == networking.ServerTLSSettings_OPTIONAL_MUTUAL {
		m.ForwardClientCertDetails = hcmv3.HttpConnectionManager_SANITIZE_SET
		m.SetCurrentClientCertDetails = &hcmv3.HttpConnectionManager_SetCurrentClientCertDetails{Subject: wire.Yes(), Uri: true, Dns: true}
	}
	c.add(names, &listenerv3.FilterChain{Name: table, TransportSocket: tls, Filters: []*listenerv3.Filter{c.b.routes.Manager(m)}})
}

func (c *chains) manager(table string) *hcmv3.HttpConnectionManager {
	return &hcmv3.HttpConnectionManager{
		StatPrefix: "outbound_0.0.0.0_" + wire.Itoa(c.bind), RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: table, ConfigSource: wire.ADS(0)}}, UseRemoteAddress: wire.Yes(),
		ForwardClientCertDetails: hcmv3.HttpConnectionManager_SANITIZE,
	}
}

func (b *builder) table(name string, hosts []*routev3.VirtualHost) {
	b.names[name] = true
	b.tables = append(b.tables, &routev3.RouteConfiguration{
		Name: name, ValidateClusters: wire.No(), VirtualHosts: hosts, IgnorePortInHostMatching: true, // a load balancer before it may have any port
	})
}

// misdirected answers 421 to requests for hosts that the server is not for, which arrive when a client uses a connection
// again: HTTP/2 lets it for all names in the certificate. Hosts that the server is for and nobody routes get 404.
func (c *chains) misdirected(s server, hosts []*routev3.VirtualHost) []*routev3.VirtualHost {
	have := map[string]bool{}
	for _, h := range hosts {
		for _, d := range h.GetDomains() {
			have[d] = true
		}
	}
	for _, pattern := range s.GetHosts() {
		if _, h := splitHost(pattern); !have[h] {
			have[h] = true
			hosts = append(hosts, &routev3.VirtualHost{Name: "unrouted|" + h, Domains: withPort(h, s.GetPort().GetNumber(), have)})
		}
	}
	away := func(name string, domains []string) {
		hosts = append(hosts, &routev3.VirtualHost{Name: name, Domains: domains, Routes: []*routev3.Route{{
			Name: "misdirected", Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
			Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 421}},
		}}})
	}
	for _, o := range c.all { // narrower servers, within what this one is for
		for _, pattern := range o.GetHosts() {
			if _, h := splitHost(pattern); kindOf(o.Server) == https && h != "*" && !have[h] && c.wider(s, h) {
				have[h] = true
				away("misdirected|"+h, withPort(h, s.GetPort().GetNumber(), have))
			}
		}
	}
	if !have["*"] {
		away("misdirected", []string{"*"})
	}
	return hosts
}

// wider reports whether the server is for a host that is another's.
func (c *chains) wider(s server, host string) bool {
	return slices.ContainsFunc(s.GetHosts(), func(pattern string) bool {
		_, own := splitHost(pattern)
		return own != host && scope.Covers(own, host)
	})
}

func withPort(host string, port uint32, have map[string]bool) []string {
	if full := host + ":" + wire.Itoa(port); host != "*" && !have[full] {
		have[full] = true
		return []string{host, full}
	}
	return []string{host}
}

// plain adds the HTTP servers of a port, which share one table.
func (c *chains) plain(byPort map[uint32][]server) {
	for i, port := range slices.Sorted(maps.Keys(byPort)) {
		if i > 0 {
			for _, s := range byPort[port] {
				c.b.report(s, ".port.number", ReasonPortConflict, "another port of the Service leads to port "+wire.Itoa(c.bind)+" of the gateway, too, and is served")
			}
			continue
		}
		table := "http." + wire.Itoa(port)
		c.b.table(table, c.b.hosts(byPort[port]))
		c.open = append(c.open, &listenerv3.FilterChain{Filters: []*listenerv3.Filter{c.b.routes.Manager(c.manager(table))}})
	}
}

// tcp adds what the first TCP server that something is routed for leads to.
func (c *chains) tcp(servers []server) {
	for _, s := range servers {
		if kindOf(s.Server) != tcp {
			continue
		}
		if found := c.b.connections(s); len(c.open) == 0 {
			c.open = found
		} else if len(found) > 0 {
			c.b.report(s, ".port", ReasonPortConflict, "another server has the connections at port "+wire.Itoa(c.bind))
		}
	}
}

// connections returns the chains that the tcp rules of VirtualServices ask for.
func (b *builder) connections(s server) []*listenerv3.FilterChain {
	for _, vs := range b.snap.VirtualServices {
		if !b.bound(s, vs) {
			continue
		}
		chains, all := b.routes.TCP(vs, s.site())
		if all != nil {
			chains = append(chains, &listenerv3.FilterChain{Filters: all})
		}
		if len(chains) > 0 {
			return chains
		}
	}
	return nil
}

// bound reports whether the server takes one of the hosts of the VirtualService.
func (b *builder) bound(s server, vs *mesh.VirtualService) bool {
	return b.routes.Sees(vs) && slices.ContainsFunc(s.GetHosts(), func(pattern string) bool {
		return admits(pattern, s.gateway.Object.Namespace, vs) && slices.ContainsFunc(vs.Spec.GetHosts(), func(h string) bool {
			_, own := splitHost(pattern)
			_, ok := intersect(h, own)
			return ok
		})
	})
}

// pass adds the chains of a server that passes TLS on.
func (c *chains) pass(s server) {
	for _, vs := range c.b.snap.VirtualServices {
		if !c.b.bound(s, vs) {
			continue
		}
		for _, t := range c.b.routes.TLS(vs, s.site()) {
			names := slices.DeleteFunc(slices.Clone(t.Names), func(n string) bool {
				return !slices.ContainsFunc(s.GetHosts(), func(pattern string) bool {
					_, own := splitHost(pattern)
					_, ok := intersect(n, own)
					return ok && admits(pattern, s.gateway.Object.Namespace, vs)
				})
			})
			if names = c.claim(names, vs.Object, t.Field+".match.sniHosts"); len(names) > 0 {
				c.add(names, &listenerv3.FilterChain{Filters: t.Filters})
			}
		}
	}
}
