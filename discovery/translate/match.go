package translate

import (
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// site is where routes are made for: all sidecars ("mesh"), or one Gateway (NAMESPACE/NAME); and the port the client uses.
type site struct {
	gateway string
	port    uint32
}

// matcher is what the match blocks of all kinds of traffic have in common.
type matcher interface {
	GetGateways() []string
	GetPort() uint32
	GetSourceLabels() map[string]string
	GetSourceNamespace() string
}

// applies reports whether a match of vs is for this proxy at the site. A match without gateways has the object's, an
// object without them is for sidecars.
func (v *view) applies(at site, vs *mesh.VirtualService, m matcher) bool {
	gateways := m.GetGateways()
	if len(gateways) == 0 {
		gateways = vs.Spec.GetGateways()
	}
	bound := len(gateways) == 0 && at.gateway == meshGateway
	for _, g := range gateways {
		bound = bound || g == at.gateway || g != meshGateway && vs.Object.Namespace+"/"+g == at.gateway
	}
	port, labels, namespace := m.GetPort(), m.GetSourceLabels(), m.GetSourceNamespace()
	return bound && (port == 0 || port == at.port) &&
		scope.Selects(labels, v.proxy.Labels) && (namespace == "" || namespace == v.proxy.Namespace)
}

// domains returns how clients write the host of s in requests to the port, seen from the proxy's namespace.
func (v *view) domains(s *mesh.Service, port uint32) []string {
	names := []string{s.Host}
	if s.Host == mesh.LocalHost(s.Name, s.Namespace) {
		short := s.Name + "." + s.Namespace
		names = append(names, short+".svc", short)
		if s.Namespace == v.proxy.Namespace {
			names = append(names, s.Name)
		}
	}
	names = append(names, v.snap.Aliases(s)...)
	for _, a := range v.vips(s) {
		names = append(names, wire.HostAddress(a))
	}
	return httprule.WithPort(names, port)
}
