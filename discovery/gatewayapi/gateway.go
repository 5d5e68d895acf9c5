package gatewayapi

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	networking "istio.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// gateway is a Gateway of ours.
type gateway struct {
	ref       mesh.ObjectRef
	obj       *gatewayv1.Gateway
	listeners []*listener

	selector  map[string]string // of its routers
	namespace string            // of its routers
	named     bool              // it names a Service
	addresses []gatewayv1.GatewayStatusAddress
	// addressless says why there is no address.
	addressless string
	invalid     condition // Accepted, when the Gateway as a whole cannot be; no kind: it can
	resolved    condition // ResolvedRefs of the Gateway itself; no kind: it refers to nothing
}

// listener is one of a Gateway.
type listener struct {
	gateway  *gateway
	index    int
	spec     *gatewayv1.Listener
	host     string // lower case; "*" for all
	kinds    []gatewayv1.RouteGroupKind
	secrets  []string // as a server names them
	attached int32

	accepted, conflicted, resolved condition

	http map[string][]entry // by host
	l4   []l4
}

func (l *listener) field() string { return "spec.listeners[" + strconv.Itoa(l.index) + "]" }

// programmed reports whether the listener is served.
func (l *listener) programmed() bool {
	return l.accepted.status && !l.conflicted.status && (l.resolved.status || l.resolved.reason == "InvalidRouteKinds") && (l.gateway.invalid.kind == "" || l.gateway.invalid.status)
}

// name is that of the Istio Gateway that the listener becomes. No object of the API can have it.
func (l *listener) name() string { return l.gateway.ref.Name + "~" + string(l.spec.Name) }

func itoa(i int) string { return strconv.Itoa(i) }

// protocols are the kinds of routes that a listener of each protocol takes.
var protocols = map[gatewayv1.ProtocolType][]string{
	gatewayv1.HTTPProtocolType:  {"HTTPRoute", "GRPCRoute"},
	gatewayv1.HTTPSProtocolType: {"HTTPRoute", "GRPCRoute"},
	gatewayv1.TLSProtocolType:   {"TLSRoute"},
	gatewayv1.TCPProtocolType:   {"TCPRoute"},
}

// resolveGateway says which routers a Gateway has, and what is wrong with its listeners.
func (c *converter) resolveGateway(g *gateway) {
	c.routers(g)
	if p := g.obj.Spec.Infrastructure; p != nil && p.ParametersRef != nil {
		g.invalid = is("Accepted", false, "InvalidParameters", "infrastructure.parametersRef is not supported")
	}
	for i := range g.obj.Spec.Listeners {
		l := &listener{gateway: g, index: i, spec: &g.obj.Spec.Listeners[i], host: strings.ToLower(or(g.obj.Spec.Listeners[i].Hostname, "*")), http: map[string][]entry{}}
		g.listeners = append(g.listeners, l)
		l.accepted, l.conflicted, l.resolved = is("Accepted", true, "Accepted", ""), is("Conflicted", false, "NoConflicts", ""), is("ResolvedRefs", true, "ResolvedRefs", "")
		l.kinds = []gatewayv1.RouteGroupKind{}
		if _, known := protocols[l.spec.Protocol]; !known {
			l.accepted = is("Accepted", false, "UnsupportedProtocol", fmt.Sprintf("protocol %q is not supported; write HTTP, HTTPS, TLS or TCP", l.spec.Protocol))
			continue
		}
		if l.spec.Port < 1 || l.spec.Port > 65535 {
			l.accepted = is("Accepted", false, "PortUnavailable", fmt.Sprintf("%d is not a port", l.spec.Port))
		}
		c.kindsOf(l)
		c.certificates(l)
		c.conflicts(l)
	}
}

// routers says which pods serve a Gateway, and under which addresses: those of the Service that spec.addresses names, or
// those that have the Gateway's name as a label, in its namespace.
func (c *converter) routers(g *gateway) {
	g.namespace, g.selector = g.ref.Namespace, map[string]string{GatewayNameLabel: g.ref.Name}
	g.addressless = "no Service " + g.ref.Name + "-" + ClassName + " or " + g.ref.Name + " selects its pods, or it has no address yet"
	hosts := []string{mesh.LocalHost(g.ref.Name+"-"+ClassName, g.ref.Namespace), mesh.LocalHost(g.ref.Name, g.ref.Namespace)}
	for i, a := range g.obj.Spec.Addresses {
		switch t := or(a.Type, string(gatewayv1.IPAddressType)); {
		case a.Value == "":
		case t != string(gatewayv1.HostnameAddressType):
			g.invalid = is("Accepted", false, "UnsupportedAddress", fmt.Sprintf("spec.addresses[%d]: addresses of type %s cannot be asked for; name the Service of the gateway's pods by an address of type Hostname", i, t))
		default:
			host := serviceHost(a.Value, g.ref.Namespace)
			g.named = true
			decl := c.declaredAs(host)
			if decl == nil || len(decl.Selector) == 0 {
				g.selector, hosts = nil, nil
				g.addressless = fmt.Sprintf("spec.addresses[%d]: there is no Service %s with a selector", i, host)
				continue
			}
			g.selector, g.namespace, hosts = decl.Selector, decl.Object.Namespace, []string{host}
			g.addressless = "Service " + host + " has no address yet"
		}
	}
	for _, h := range hosts {
		if decl := c.declaredAs(h); decl != nil {
			g.addresses = addressesOf(decl)
			return
		}
	}
}

func (c *converter) declaredAs(host string) *mesh.ServiceDecl {
	if c.declared == nil {
		return nil
	}
	return c.declared(host)
}

// serviceHost writes the name of a Service out in full.
func serviceHost(name, namespace string) string {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	parts := strings.Split(name, ".")
	switch {
	case len(parts) == 1:
		return mesh.LocalHost(name, namespace)
	case len(parts) == 2 || len(parts) == 3 && parts[2] == "svc":
		return mesh.LocalHost(parts[0], parts[1])
	}
	return name
}

// addressesOf are those under which a Service is reached: from outside if it is to be, else its cluster addresses.
func addressesOf(decl *mesh.ServiceDecl) (out []gatewayv1.GatewayStatusAddress) {
	all := decl.Outside
	if len(all) == 0 && !decl.Balanced {
		for _, a := range decl.Addresses {
			all = append(all, a.String())
		}
	}
	for _, a := range all {
		t := gatewayv1.IPAddressType
		if _, err := netip.ParseAddr(a); err != nil {
			t = gatewayv1.HostnameAddressType
		}
		out = append(out, gatewayv1.GatewayStatusAddress{Type: &t, Value: a})
	}
	return out
}

// kindsOf says which kinds of routes the listener takes.
func (c *converter) kindsOf(l *listener) {
	own := protocols[l.spec.Protocol]
	if l.spec.Protocol == gatewayv1.TLSProtocolType && !passthrough(l.spec) {
		own = []string{"TLSRoute", "TCPRoute"}
	}
	kind := func(k string) gatewayv1.RouteGroupKind {
		g := gatewayv1.Group(group)
		return gatewayv1.RouteGroupKind{Group: &g, Kind: gatewayv1.Kind(k)}
	}
	if l.spec.AllowedRoutes == nil || len(l.spec.AllowedRoutes.Kinds) == 0 {
		for _, k := range own {
			l.kinds = append(l.kinds, kind(k))
		}
		return
	}
	for _, k := range l.spec.AllowedRoutes.Kinds {
		if or(k.Group, group) != group || !slices.Contains(own, string(k.Kind)) {
			l.resolved = is("ResolvedRefs", false, "InvalidRouteKinds", fmt.Sprintf("a listener of protocol %s takes no routes of kind %s", l.spec.Protocol, k.Kind))
			continue
		}
		l.kinds = append(l.kinds, kind(string(k.Kind)))
	}
}

func passthrough(l *gatewayv1.Listener) bool {
	return l.TLS != nil && l.TLS.Mode != nil && *l.TLS.Mode == gatewayv1.TLSModePassthrough
}

// certificates finds the Secrets of a listener that ends TLS.
func (c *converter) certificates(l *listener) {
	tls := l.spec.TLS
	switch {
	case l.spec.Protocol != gatewayv1.HTTPSProtocolType && l.spec.Protocol != gatewayv1.TLSProtocolType:
		return
	case passthrough(l.spec):
		if l.spec.Protocol == gatewayv1.HTTPSProtocolType {
			l.accepted = is("Accepted", false, "UnsupportedValue", "a listener of protocol HTTPS ends TLS; write protocol TLS to pass it on")
		}
		return
	case tls == nil || len(tls.CertificateRefs) == 0:
		l.resolved = is("ResolvedRefs", false, "InvalidCertificateRef", "tls.certificateRefs names no Secret")
		return
	}
	for k := range tls.Options {
		l.accepted = is("Accepted", false, "UnsupportedValue", fmt.Sprintf("the TLS option %q is not known", k))
	}
	for i, r := range tls.CertificateRefs {
		at := fmt.Sprintf("tls.certificateRefs[%d]: ", i)
		namespace := or(r.Namespace, l.gateway.ref.Namespace)
		if or(r.Group, "") != "" || or(r.Kind, "Secret") != "Secret" {
			l.resolved = is("ResolvedRefs", false, "InvalidCertificateRef", at+"certificates are in Secrets, not in a "+or(r.Kind, ""))
			return
		}
		if !c.granted(group, "Gateway", l.gateway.ref.Namespace, "", "Secret", namespace, string(r.Name)) {
			l.resolved = is("ResolvedRefs", false, "RefNotPermitted", fmt.Sprintf("%sno ReferenceGrant in namespace %s lets Gateways of namespace %s use Secret %s", at, namespace, l.gateway.ref.Namespace, r.Name))
			return
		}
		if s := c.snap.Credential(namespace, string(r.Name)); s == nil || len(s.Certificate) == 0 || len(s.Key) == 0 {
			l.resolved = is("ResolvedRefs", false, "InvalidCertificateRef", fmt.Sprintf("%sthere is no Secret %s/%s with a certificate and its key that isthmusd may read", at, namespace, r.Name))
			return
		}
		l.secrets = append(l.secrets, "kubernetes-gateway://"+namespace+"/"+string(r.Name))
	}
}

// conflicts compares the listener with those before it in the Gateway: of two that cannot be told apart the first is served.
func (c *converter) conflicts(l *listener) {
	for _, o := range l.gateway.listeners[:l.index] {
		if o.spec.Port != l.spec.Port || !o.accepted.status || o.conflicted.status {
			continue
		}
		a, b := o.spec.Protocol, l.spec.Protocol
		encrypted := func(p gatewayv1.ProtocolType) bool {
			return p == gatewayv1.HTTPSProtocolType || p == gatewayv1.TLSProtocolType
		}
		switch {
		case a != b && !(encrypted(a) && encrypted(b)):
			l.conflicted = is("Conflicted", true, "ProtocolConflict", fmt.Sprintf("listener %s has port %d for protocol %s", o.spec.Name, o.spec.Port, a))
		case o.host == l.host || a == gatewayv1.TCPProtocolType:
			l.conflicted = is("Conflicted", true, "HostnameConflict", fmt.Sprintf("listener %s has the same port and hostname", o.spec.Name))
		default:
			continue
		}
		l.accepted = is("Accepted", false, l.conflicted.reason, l.conflicted.message)
		return
	}
}

// admits reports whether the listener takes routes of the namespace.
func (c *converter) admits(l *listener, namespace string) bool {
	var rules *gatewayv1.RouteNamespaces
	if l.spec.AllowedRoutes != nil {
		rules = l.spec.AllowedRoutes.Namespaces
	}
	if rules == nil || rules.From == nil {
		return namespace == l.gateway.ref.Namespace
	}
	switch *rules.From {
	case gatewayv1.NamespacesFromAll:
		return true
	case gatewayv1.NamespacesFromSame:
		return namespace == l.gateway.ref.Namespace
	case gatewayv1.NamespacesFromSelector:
		s, err := metav1.LabelSelectorAsSelector(rules.Selector)
		return err == nil && s.Matches(labels.Set(c.namespaces[namespace]))
	}
	return false
}

// emit writes the listeners and their routes as Istio's objects.
func (c *converter) emit(g *gateway) {
	for _, l := range g.listeners {
		if !l.programmed() || g.selector == nil {
			continue
		}
		if l.spec.Protocol == gatewayv1.TLSProtocolType && !passthrough(l.spec) {
			c.emitEnded(l)
			continue
		}
		c.emitServer(l, l.name(), []string{l.host})
		c.emitHTTP(l)
		c.emitL4(l)
	}
}

// emitServer writes an Istio Gateway with one server.
func (c *converter) emitServer(l *listener, name string, hosts []string) {
	s := l.server()
	s.Hosts = hosts
	c.out.Input.Gateways = append(c.out.Input.Gateways, &mesh.Gateway{
		Object: l.object("Gateway", name), Routers: l.gateway.namespace, Secrets: l.secrets, Spec: &networking.Gateway{Selector: l.gateway.selector, Servers: []*networking.Server{s}},
	})
}

// object names what the listener becomes. It stands where the Gateway stands.
func (l *listener) object(kind, name string) mesh.ObjectRef {
	return mesh.ObjectRef{Kind: kind, Namespace: l.gateway.ref.Namespace, Name: name, Source: l.gateway.ref.Source}
}

func (l *listener) server() *networking.Server {
	s := &networking.Server{Port: &networking.Port{Number: uint32(l.spec.Port), Name: string(l.spec.Name), Protocol: string(l.spec.Protocol)}, Hosts: []string{l.host}}
	switch {
	case passthrough(l.spec):
		s.Tls = &networking.ServerTLSSettings{Mode: networking.ServerTLSSettings_PASSTHROUGH}
	case len(l.secrets) > 0:
		s.Tls = &networking.ServerTLSSettings{Mode: networking.ServerTLSSettings_SIMPLE, CredentialNames: l.secrets}
	}
	return s
}

// emitHTTP writes a VirtualService for each host of the listener, with the rules of all routes in the order in which the
// Gateway API wants them tried.
func (c *converter) emitHTTP(l *listener) {
	if l.spec.Protocol != gatewayv1.HTTPProtocolType && l.spec.Protocol != gatewayv1.HTTPSProtocolType {
		return
	}
	var shared bool
	for _, o := range l.gateway.listeners {
		shared = shared || o != l && o.programmed() && o.spec.Port == l.spec.Port
	}
	if _, own := l.http[l.host]; !own && shared && l.host != "*" {
		l.http[l.host] = nil // else a listener with a wider hostname would answer
	}
	for i, host := range slices.Sorted(maps.Keys(l.http)) {
		entries := l.http[host]
		slices.SortStableFunc(entries, entry.compare)
		vs := &mesh.VirtualService{Object: l.object("VirtualService", l.name()+"~"+itoa(i)), GatewayAPI: true, Spec: &networking.VirtualService{
			Hosts: []string{host}, Gateways: []string{l.gateway.ref.Namespace + "/" + l.name()}, ExportTo: []string{"*"},
		}}
		for _, e := range entries {
			vs.Spec.Http, vs.Origins = append(vs.Spec.Http, e.forListener(l)), append(vs.Origins, e.origin)
		}
		if len(entries) == 0 {
			vs.Spec.Http = []*networking.HTTPRoute{{DirectResponse: &networking.HTTPDirectResponse{Status: 404}}}
		}
		c.out.Input.VirtualServices = append(c.out.Input.VirtualServices, vs)
	}
}
