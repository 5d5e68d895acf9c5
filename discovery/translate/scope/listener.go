package scope

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Listener is an outbound listener with an address of its own, as an egress listener of the Sidecar asks for. The usual
// ones take what is captured.
type Listener struct {
	Number   uint32        // of the port; 0 for some unix sockets
	Protocol mesh.Protocol // of the port, by its protocol, else by its name
	Bind     string        // an IP; empty for a unix socket
	Path     string        // of the unix socket, beginning with "/" or "@"
	Opens    bool          // it opens its port itself: nothing is captured for it
	Services []*mesh.Service
}

// Serves reports whether the usual listener of the port serves the service. A port that an egress listener names belongs
// to that listener's hosts alone.
func (s *Scope) Serves(svc *mesh.Service, port uint32) bool {
	if s.egress == nil {
		return true
	}
	named, served := false, false
	for _, e := range s.egress {
		if e.spec.GetPort().GetNumber() == port && !own(e.spec) {
			named, served = true, served || e.has(svc.Namespace, svc.Host)
		}
	}
	return served || !named && slices.ContainsFunc(s.egress, func(e egress) bool { return e.spec.GetPort() == nil && e.has(svc.Namespace, svc.Host) })
}

// Listeners returns those that the Sidecar asks for beside the usual ones, in its order.
func (s *Scope) Listeners() []Listener {
	var out []Listener
	for _, e := range s.egress {
		if !own(e.spec) {
			continue
		}
		l := Listener{Number: e.spec.GetPort().GetNumber(), Protocol: protocolOf(e.spec.GetPort()), Bind: cmp.Or(e.spec.GetBind(), "127.0.0.1")}
		l.Opens = e.spec.GetCaptureMode() == networking.CaptureMode_NONE
		if path, unix := strings.CutPrefix(l.Bind, "unix://"); unix {
			l.Bind, l.Path, l.Opens = "", path, true
		} else if a, err := netip.ParseAddr(l.Bind); err == nil && a.IsLoopback() {
			l.Opens = true // what goes to the own machine is not captured
		}
		for _, svc := range s.Services() {
			if _, ok := svc.Port(l.Number); (ok || l.Number == 0) && e.has(svc.Namespace, svc.Host) {
				l.Services = append(l.Services, svc)
			}
		}
		out = append(out, l)
	}
	return out
}

// own reports whether an egress listener has an address of its own.
func own(e *networking.IstioEgressListener) bool {
	return e.GetPort() != nil && (e.GetCaptureMode() == networking.CaptureMode_NONE || e.GetBind() != "" && e.GetBind() != "0.0.0.0" && e.GetBind() != "::")
}

// Ingress returns what the Sidecar says of the workload's own ports; ok is false when Services say it.
func (s *Scope) Ingress() (list []*networking.IstioIngressListener, ok bool) {
	list = s.Sidecar.GetSpec().GetIngress()
	return list, len(list) > 0
}

// IngressProtocol is what the port of an ingress listener speaks.
func IngressProtocol(l *networking.IstioIngressListener) mesh.Protocol {
	return protocolOf(l.GetPort())
}

// protocolOf reads the protocol, else what stands before the first '-' of the port's name.
func protocolOf(p *networking.SidecarPort) mesh.Protocol {
	prefix, _, _ := strings.Cut(p.GetName(), "-")
	for _, name := range []string{p.GetProtocol(), prefix} {
		switch x := mesh.Protocol(strings.ToUpper(name)); x {
		case mesh.HTTP, mesh.HTTP2, mesh.GRPC, mesh.HTTPS, mesh.TLS, mesh.TCP:
			return x
		case "GRPC-WEB":
			return mesh.HTTP
		}
	}
	return mesh.TCP
}
