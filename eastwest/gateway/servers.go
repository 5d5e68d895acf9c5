package gateway

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// server is one server of a Gateway object that selects this router.
type server struct {
	*networking.Server
	gateway *mesh.Gateway
	field   string
	port    uint32 // where the router listens
}

// servers adds what Gateway objects open: AUTO_PASSTHROUGH servers open services, PASSTHROUGH and TCP servers what
// VirtualServices route.
func (b *builder) servers() {
	for _, g := range b.snap.Gateways {
		if !selects(g.Spec.GetSelector(), b.proxy.Labels) {
			continue
		}
		for i, x := range g.Spec.GetServers() {
			kind := Kind(x)
			if kind != Auto && !b.proxy.EastWest {
				continue // other routers pass on what VirtualServices route with the servers that end TLS, by package translate
			}
			s := server{x, g, "spec.servers[" + strconv.Itoa(i) + "]", b.snap.BindPort(b.proxy, x.GetPort().GetNumber())}
			switch kind {
			case Auto:
				b.open(s)
			case Passthrough:
				b.route(s)
			case TCP:
				if s.port == b.main && b.proxy.EastWest {
					b.problem(g.Object, s.field+".port", "PortTaken", fmt.Sprintf("port %d is for mutual TLS between clusters", s.port), "use another port")
					continue
				}
				b.route(s)
			}
		}
	}
}

// ServerKind is what a server of a Gateway object is to this package.
type ServerKind int

// The kinds of servers.
const (
	Other       ServerKind = iota // served by others, or not at all
	Auto                          // TLS passed on by Istio's server names (tls.mode AUTO_PASSTHROUGH)
	Passthrough                   // TLS passed on by the server names of VirtualServices (tls.mode PASSTHROUGH)
	TCP                           // connections passed on by VirtualServices
)

// Kind returns the kind of a server.
func Kind(s *networking.Server) ServerKind {
	protocol, mode := strings.ToUpper(s.GetPort().GetProtocol()), s.GetTls().GetMode()
	secure := protocol == "TLS" || protocol == "HTTPS"
	switch {
	case secure && s.GetTls() != nil && mode == networking.ServerTLSSettings_AUTO_PASSTHROUGH:
		return Auto
	case secure && s.GetTls() != nil && mode == networking.ServerTLSSettings_PASSTHROUGH:
		return Passthrough
	case protocol == "TCP" && s.GetTls() == nil:
		return TCP
	}
	return Other
}

// opened is a host that a server opens.
type opened struct {
	service *mesh.Service
	names   []string // hosts in server names, the service's own first
}

// open adds a chain for every port and subset of the services that the server's hosts take in. Services that are
// exported have theirs already.
func (b *builder) open(s server) {
	var list []opened
	claimed := map[string]bool{}
	for _, svc := range b.snap.Services {
		if svc.Global || svc.External || strings.HasPrefix(svc.Host, "*") {
			continue
		}
		o := opened{service: svc}
		names := []string{svc.Host}
		if svc.Host == mesh.LocalHost(svc.Name, svc.Namespace) {
			names = append(names, mesh.GlobalHost(svc.Name, svc.Namespace))
		}
		for _, n := range names {
			if s.takes(svc.Namespace, n) {
				o.names, claimed[n] = append(o.names, n), true
			}
		}
		if len(o.names) > 0 {
			list = append(list, o)
		}
	}
	for _, svc := range b.snap.Services { // hand-written ones: the way out of an egress gateway
		if svc.Global && svc.Object.Kind == "ServiceEntry" && !claimed[svc.Host] && s.takes(svc.Namespace, svc.Host) {
			list = append(list, opened{svc, []string{svc.Host}})
		}
	}
	b.at(s.port)
	for _, o := range list {
		for _, p := range o.service.Ports {
			if p.Protocol == mesh.UDP {
				continue
			}
			b.openPort(s, o, p, nil)
			for _, sub := range subsets(b.rules[o.service.Host], o.service.Namespace) {
				b.openPort(s, o, p, sub)
			}
		}
	}
}

func (b *builder) openPort(s server, o opened, p mesh.Port, subset *networking.Subset) {
	cluster := sni.Istio(p.Number, subset.GetName(), o.service.Host)
	c := chain{name: "auto|" + cluster, alpn: sni.ALPN, cluster: cluster}
	for _, host := range o.names {
		n := sni.Istio(p.Number, subset.GetName(), host)
		if !isServerName(n) {
			b.problem(o.service.Object, "", "UnroutableName", fmt.Sprintf("%s is no server name of at most %d octets", n, sni.MaxLen), "use names that are DNS labels, and shorter ones if they are too long")
			continue
		}
		if _, taken := b.at(s.port).taken[n]; !taken { // by the export, or by another server
			c.names = append(c.names, n)
		}
	}
	if len(c.names) == 0 {
		return
	}
	if !b.chainAt(s.port, s.gateway.Object, c) {
		return
	}
	var targets []target
	for _, e := range o.service.Endpoints {
		if !b.serves(e) || !e.TLS && o.service.Object.Kind != "ServiceEntry" || !topologies.Selects(subset.GetLabels(), e) {
			continue
		}
		if t, ok := b.targetOf(o.service, e, p); ok {
			targets = append(targets, t)
		}
	}
	slices.SortFunc(targets, target.compare)
	b.cluster(cluster, targets)
}

// serves reports whether the gateway may send to the endpoint: it is on the gateway's own network, or on one of those
// that the gateway asked to see.
func (b *builder) serves(e *mesh.Endpoint) bool {
	if !e.Ready {
		return false
	}
	if len(b.proxy.NetworkView) > 0 {
		return slices.Contains(b.proxy.NetworkView, e.Network)
	}
	c := b.snap.Cluster(e.Cluster)
	own := e.Cluster == b.local.ID || c != nil && c.Managed
	return own && (e.Network == b.proxy.Network || e.Network == "" || b.proxy.Network == "")
}

func (b *builder) targetOf(svc *mesh.Service, e *mesh.Endpoint, p mesh.Port) (target, bool) {
	t := target{name: e.Workload, namespace: e.Namespace, endpoint: e, weight: e.Weight}
	number := e.PortOf(p)
	if e.Ports != nil && e.Ports[p.Number] == 0 || number > 65535 {
		return t, false // the pod does not have the port
	}
	if addr, err := netip.ParseAddr(e.Address); err == nil {
		t.addrs = []netip.AddrPort{netip.AddrPortFrom(addr.Unmap(), uint16(number))}
		return t, true
	}
	t.host, t.port = e.Address, number
	return t, svc.Resolution == mesh.DNS && e.Address != ""
}

// takes reports whether one of the server's hosts takes in the host of a service in the namespace.
func (s server) takes(namespace, host string) bool {
	return slices.ContainsFunc(s.GetHosts(), func(pattern string) bool {
		ns, h, scoped := strings.Cut(pattern, "/")
		if !scoped {
			ns, h = "*", pattern
		}
		if ns == "." {
			ns = s.gateway.Object.Namespace
		}
		return (ns == "*" || ns == namespace) && covers(h, host)
	})
}

// covers reports whether host is pattern, or is below the wildcard pattern.
func covers(pattern, host string) bool {
	if pattern == host || pattern == "*" {
		return true
	}
	suffix, ok := strings.CutPrefix(pattern, "*")
	return ok && strings.HasSuffix(strings.TrimPrefix(host, "*"), suffix)
}

func selects(selector, labels map[string]string) bool {
	for k, want := range selector {
		if labels[k] != want {
			return false
		}
	}
	return true
}

// route adds what the VirtualServices that are bound to the server route.
func (b *builder) route(s server) {
	id := s.gateway.Object.Namespace + "/" + s.gateway.Object.Name
	secure := Kind(s.Server) == Passthrough
	for _, vs := range b.snap.VirtualServices {
		bound := func(list []string) bool {
			return slices.ContainsFunc(list, func(g string) bool { return g == id || vs.Object.Namespace+"/"+g == id })
		}
		applies := func(gateways []string, port uint32) bool {
			if len(gateways) == 0 {
				gateways = vs.Spec.GetGateways()
			}
			return bound(gateways) && (port == 0 || port == s.GetPort().GetNumber())
		}
		if secure {
			for i, t := range vs.Spec.GetTls() {
				for _, m := range t.GetMatch() {
					if applies(m.GetGateways(), m.GetPort()) {
						b.routeTLS(s, vs, t.GetRoute(), m.GetSniHosts(), fmt.Sprintf("spec.tls[%d]", i))
					}
				}
			}
			continue
		}
		for i, t := range vs.Spec.GetTcp() {
			matches := t.GetMatch()
			if len(matches) == 0 {
				matches = []*networking.L4MatchAttributes{{}}
			}
			if slices.ContainsFunc(matches, func(m *networking.L4MatchAttributes) bool { return applies(m.GetGateways(), m.GetPort()) }) {
				field := fmt.Sprintf("spec.tcp[%d]", i)
				b.chainAt(s.port, vs.Object, b.routed(chain{name: "tcp|" + vs.Object.String() + "|" + field}, vs, t.GetRoute(), s.GetPort().GetNumber(), field))
			}
		}
	}
}

func (b *builder) routeTLS(s server, vs *mesh.VirtualService, routes []*networking.RouteDestination, hosts []string, field string) {
	c := chain{name: "tls|" + vs.Object.String() + "|" + field + "|" + strings.Join(hosts, ","), tls: true}
	for _, h := range hosts {
		if !slices.ContainsFunc(s.GetHosts(), func(pattern string) bool {
			_, host, scoped := strings.Cut(pattern, "/")
			if !scoped {
				host = pattern
			}
			return covers(host, h)
		}) {
			continue
		}
		if h != "*" {
			c.names = append(c.names, h)
			continue
		}
		if s.port == b.main && b.proxy.EastWest {
			b.problem(vs.Object, field+".match.sniHosts", "PortTaken", fmt.Sprintf("on port %d only names that are written out are passed on", s.port), "name the hosts, or use another port")
			return
		}
		c.names = nil
		break
	}
	if len(c.names) == 0 && !slices.Contains(hosts, "*") {
		return
	}
	b.chainAt(s.port, vs.Object, b.routed(c, vs, routes, s.GetPort().GetNumber(), field))
}

// routed gives the chain the destinations of a route; one that does not exist keeps its share, which is closed.
func (b *builder) routed(c chain, vs *mesh.VirtualService, routes []*networking.RouteDestination, port uint32, field string) chain {
	for i, r := range routes {
		if len(routes) > 1 && r.GetWeight() <= 0 {
			continue
		}
		d, name := r.GetDestination(), BlackHole
		number := cmp.Or(d.GetPort().GetNumber(), port)
		if targets, ok := b.destination(d, &number); ok {
			name = fmt.Sprintf("passthrough|%d|%s|%s", number, d.GetSubset(), d.GetHost())
			b.cluster(name, targets)
		} else {
			b.problem(vs.Object, fmt.Sprintf("%s.route[%d].destination", field, i), "UnknownHost", fmt.Sprintf("no service has the host %s and port %d", d.GetHost(), number), "create the Service or ServiceEntry, or correct the destination; until then such connections are closed")
		}
		c.shares = append(c.shares, share{name, uint32(max(r.GetWeight(), 1))})
	}
	switch len(c.shares) {
	case 0:
		c.cluster = BlackHole
	case 1:
		c.cluster, c.shares = c.shares[0].cluster, nil
	}
	return c
}

// destination finds the endpoints that a connection is passed on to, by whatever protocol it speaks.
func (b *builder) destination(d *networking.Destination, number *uint32) (out []target, ok bool) {
	svc := b.snap.Service(d.GetHost())
	if svc == nil {
		return b.controlPlane(d.GetHost())
	}
	if d.GetPort().GetNumber() == 0 && len(svc.Ports) == 1 {
		*number = svc.Ports[0].Number
	}
	p, ok := svc.Port(*number)
	if !ok || p.Protocol == mesh.UDP {
		return nil, false
	}
	var labels map[string]string
	if d.GetSubset() != "" {
		i := slices.IndexFunc(subsets(b.rules[svc.Host], svc.Namespace), func(s *networking.Subset) bool { return s.GetName() == d.GetSubset() })
		if i < 0 {
			return nil, false
		}
		labels = subsets(b.rules[svc.Host], svc.Namespace)[i].GetLabels()
	}
	for _, e := range svc.Endpoints {
		if !b.serves(e) || !topologies.Selects(labels, e) {
			continue
		}
		if t, ok := b.targetOf(svc, e, p); ok {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, target.compare)
	if len(out) == 0 {
		if control, ok := b.controlPlane(d.GetHost()); ok {
			return control, true
		}
	}
	return out, true
}

// controlPlane stands in for the Service of the control plane, by Istio's name or ours, where it is not known.
func (b *builder) controlPlane(host string) (out []target, ok bool) {
	if !b.here() || host != mesh.LocalHost("istiod", rootNamespace) && host != mesh.LocalHost("isthmusd", rootNamespace) {
		return nil, false
	}
	for _, a := range b.local.ControlPlane {
		out = append(out, target{addrs: []netip.AddrPort{a}})
	}
	return out, len(out) > 0
}
