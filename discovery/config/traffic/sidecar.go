package traffic

import (
	"fmt"
	"net/netip"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// sidecar reads what proxies see and listen to. An object that says nothing is the default written down.
func Sidecar(w *written.Object) *mesh.SidecarConfig {
	o := &object{w}
	spec := &networking.Sidecar{}
	var e written.Envelope
	if !o.Into(&e) {
		return nil
	}
	if o.Meta = e.ObjectMeta; len(e.Spec) > 0 && string(e.Spec) != "null" {
		if _, ok := o.Spec(spec); !ok {
			return nil
		}
	}
	o.checkSidecar(spec)
	o.connectionPool("spec.inboundConnectionPool", spec.GetInboundConnectionPool())
	if spec.GetOutboundTrafficPolicy().GetEgressProxy() != nil {
		o.Unsupported("spec.outboundTrafficPolicy.egressProxy", "what goes to unknown hosts goes where it is sent to")
	}
	if o.Failed {
		return nil
	}
	return &mesh.SidecarConfig{Object: o.Ref, Spec: spec}
}

func (o *object) checkSidecar(s *networking.Sidecar) {
	for i, e := range s.GetEgress() {
		at := fmt.Sprintf("spec.egress[%d]", i)
		if len(e.GetHosts()) == 0 {
			o.Reject(at+".hosts", written.ReasonMissing, "there is no host", `write NAMESPACE/HOST, for example "./*"`)
		}
		for j, h := range e.GetHosts() {
			field := fmt.Sprintf("%s.hosts[%d]", at, j)
			ns, host, ok := strings.Cut(h, "/")
			if !ok || ns == "" {
				o.Invalid(field, written.Show(h)+" is not NAMESPACE/HOST", `write for example "./*", "default/*" or "*/reviews.default.svc.cluster.local"`)
				continue
			}
			o.CheckHost(field, strings.ToLower(host))
		}
		o.checkSidecarPort(at+".port", e.GetPort(), strings.HasPrefix(e.GetBind(), "unix://"))
		o.checkBind(at+".bind", e.GetBind(), true)
		if e.GetPort() == nil && (e.GetBind() != "" || e.GetCaptureMode() == networking.CaptureMode_NONE) {
			o.Reject(at+".port", written.ReasonMissing, "a listener with an address of its own needs a port", "add number, name and protocol")
		}
	}
	seen := map[uint32]bool{}
	for i, in := range s.GetIngress() {
		at := fmt.Sprintf("spec.ingress[%d]", i)
		if in.GetPort() == nil {
			o.Reject(at+".port", written.ReasonMissing, "the port is missing", "add number, name and protocol")
		}
		o.checkSidecarPort(at+".port", in.GetPort(), false)
		o.checkBind(at+".bind", in.GetBind(), false)
		if seen[in.GetPort().GetNumber()] {
			o.Reject(at+".port.number", written.ReasonDuplicate, fmt.Sprintf("port %d is declared twice", in.GetPort().GetNumber()), "merge the two")
		}
		seen[in.GetPort().GetNumber()] = true
		o.connectionPool(at+".connectionPool", in.GetConnectionPool())
		if in.GetTls() != nil {
			o.Unsupported(at+".tls", "the port takes mutual TLS of the mesh and, unless a PeerAuthentication is STRICT, plain text")
		}
		o.checkEndpointText(at+".defaultEndpoint", in.GetDefaultEndpoint())
	}
}

// checkBind wants an IP, or unix:///PATH where that is possible.
func (o *object) checkBind(field, bind string, unix bool) {
	if path, ok := strings.CutPrefix(bind, "unix://"); ok && unix && (strings.HasPrefix(path, "/") || strings.HasPrefix(path, "@")) {
		return
	}
	if _, err := netip.ParseAddr(bind); bind != "" && err != nil {
		o.Invalid(field, written.Show(bind)+" is not an IP address", "write one, or leave it out")
	}
}

func (o *object) checkSidecarPort(field string, p *networking.SidecarPort, unix bool) {
	if p == nil {
		return
	}
	if p.GetTargetPort() != 0 {
		o.Unsupported(field+".targetPort", "defaultEndpoint says where the application listens")
	}
	if p.GetNumber() != 0 || !unix { // a unix socket has no port
		o.CheckPort(field+".number", int64(p.GetNumber()))
	}
	if _, known := written.ProtocolNamed(p.GetProtocol()); p.GetProtocol() != "" && !known {
		o.Invalid(field+".protocol", written.Show(p.GetProtocol())+" is not a protocol", "write one of HTTP, HTTP2, GRPC, HTTPS, TLS, TCP")
	}
}

// checkEndpointText wants 127.0.0.1:PORT, 0.0.0.0:PORT, [::1]:PORT, [::]:PORT or unix:///PATH.
func (o *object) checkEndpointText(field, text string) {
	if path, unix := strings.CutPrefix(text, "unix://"); text == "" || unix && (strings.HasPrefix(path, "/") || strings.HasPrefix(path, "@")) {
		return
	}
	a, err := netip.ParseAddrPort(text)
	if err != nil || a.Port() == 0 || !a.Addr().IsLoopback() && !a.Addr().IsUnspecified() {
		o.Invalid(field, written.Show(text)+" is not an endpoint of the workload itself", "write 127.0.0.1:PORT, 0.0.0.0:PORT, their IPv6 forms or unix:///PATH")
	}
}
