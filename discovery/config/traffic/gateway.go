package traffic

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Gateway decodes the object; nil when something is wrong with it.
func Gateway(w *written.Object) *mesh.Gateway {
	o := &object{w}
	spec := &networking.Gateway{}
	if _, ok := o.Spec(spec); !ok {
		return nil
	}
	if len(spec.Selector) == 0 {
		o.Reject("spec.selector", written.ReasonMissing, "the Gateway selects no workload", "write the labels of the gateway, for example istio: ingressgateway")
	}
	if len(spec.Servers) == 0 {
		o.Reject("spec.servers", written.ReasonMissing, "the Gateway has no server", "add one")
	}
	spec.Servers = keepIndexed(spec.Servers, func(i int, s *networking.Server) bool { return o.server(fmt.Sprintf("spec.servers[%d]", i), s) })
	if o.Failed {
		return nil
	}
	return &mesh.Gateway{Object: o.Ref, Spec: spec}
}

// server validates a server and reports whether it is used. One that cannot be served as it says is left out: plain
// text must not stand where TLS was asked for.
func (o *object) server(at string, s *networking.Server) bool {
	if s.GetPort() == nil {
		o.Reject(at+".port", written.ReasonMissing, "the port is missing", "add number, name and protocol")
		return false
	}
	o.CheckPort(at+".port.number", int64(s.Port.Number))
	p, known := written.ProtocolNamed(s.Port.Protocol)
	if !known {
		o.Invalid(at+".port.protocol", written.Show(s.Port.Protocol)+" is not a protocol", "write one of HTTP, HTTP2, GRPC, TLS, TCP")
	}
	if len(s.Hosts) == 0 {
		o.Reject(at+".hosts", written.ReasonMissing, "the server has no host", `name hosts, or "*"`)
	}
	for i, h := range s.Hosts {
		ns, name, scoped := strings.Cut(h, "/")
		if !scoped {
			ns, name = "", h
		}
		name = strings.ToLower(name)
		o.CheckHost(fmt.Sprintf("%s.hosts[%d]", at, i), name)
		if ns == "." {
			ns = o.Ref.Namespace
		}
		if s.Hosts[i] = name; ns != "" {
			s.Hosts[i] = ns + "/" + name
		}
	}
	if s.Bind != "" {
		o.Unsupported(at+".bind", "the server listens on all addresses")
	}
	if s.DefaultEndpoint != "" {
		o.Unsupported(at+".defaultEndpoint", "VirtualServices say where it leads")
	}
	if s.Tls != nil {
		return o.serverTLS(at, s, p)
	}
	if known && p == mesh.HTTPS || known && p == mesh.TLS {
		o.Note(at+".tls", written.ReasonMissing, "a "+strings.ToUpper(s.Port.Protocol)+" server needs TLS settings; the server is left out", "add tls.mode, and credentialName where the gateway ends TLS")
		return false
	}
	if known && !p.IsHTTP() && p != mesh.TCP {
		o.Unsupported(at+".port.protocol", "the server is left out")
		return false
	}
	return true
}

// serverTLS checks what a server says of TLS.
func (o *object) serverTLS(at string, s *networking.Server, p mesh.Protocol) bool {
	t, mode := s.Tls, s.Tls.GetMode()
	leave := func(field, reason, message, remedy string) bool {
		o.Note(at+field, reason, message+"; the server is left out", remedy)
		return false
	}
	encrypted := p == mesh.HTTPS || p == mesh.TLS
	passes := mode == networking.ServerTLSSettings_AUTO_PASSTHROUGH || mode == networking.ServerTLSSettings_PASSTHROUGH
	if onlyRedirects(t, p) {
		return true
	}
	if !encrypted {
		return leave(".port.protocol", written.ReasonConflict, written.Show(s.Port.Protocol)+" is not TLS, which tls.mode "+mode.String()+" needs", "write HTTPS, or TLS for other protocols")
	}
	if passes || mode == networking.ServerTLSSettings_ISTIO_MUTUAL {
		if t.CredentialName != "" || len(t.CredentialNames) > 0 || t.ServerCertificate != "" {
			o.Note(at+".tls", written.ReasonSatisfied, "tls.mode "+mode.String()+" needs no certificate; the one named is not used", "remove it")
		}
		return true
	}
	names := append(slices.Clone(t.CredentialNames), t.CredentialName, t.CaCertCredentialName)
	for _, n := range names {
		if strings.Contains(strings.TrimPrefix(n, "kubernetes://"), "/") {
			return leave(".tls.credentialName", written.ReasonInvalidValue, written.Show(n)+" is not the name of a Secret", "name a Secret in the gateway's own namespace")
		}
	}
	files := t.ServerCertificate != "" && t.PrivateKey != "" || len(t.TlsCertificates) > 0
	if t.CredentialName == "" && len(t.CredentialNames) == 0 && !files {
		return leave(".tls", written.ReasonMissing, "no certificate is named", "name a Secret in credentialName, or the files serverCertificate and privateKey")
	}
	mutual := mode == networking.ServerTLSSettings_MUTUAL || mode == networking.ServerTLSSettings_OPTIONAL_MUTUAL
	if mutual && files && t.CaCertificates == "" && t.CaCertCredentialName == "" && !t.GetInsecureSkipVerify().GetValue() {
		return leave(".tls.caCertificates", written.ReasonMissing, "tls.mode "+mode.String()+" needs the authorities of clients", "name their file")
	}
	if t.MinProtocolVersion != 0 && t.MaxProtocolVersion != 0 && t.MinProtocolVersion > t.MaxProtocolVersion {
		return leave(".tls.minProtocolVersion", written.ReasonConflict, "is above maxProtocolVersion", "correct one of the two")
	}
	if t.HttpsRedirect {
		o.Note(at+".tls.httpsRedirect", written.ReasonUnsupported, "the server speaks TLS; nothing is redirected", "write it in the server of the plain port")
	}
	return true
}

// onlyRedirects reports whether all that is asked for is to lead plain HTTP to HTTPS.
func onlyRedirects(t *networking.ServerTLSSettings, p mesh.Protocol) bool {
	return p.IsHTTP() && t.HttpsRedirect && proto.Equal(t, &networking.ServerTLSSettings{HttpsRedirect: true})
}
