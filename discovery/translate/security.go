package translate

import (
	"crypto/x509"
	"encoding/pem"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rawbufferv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/peerauth"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

const (
	ownCertSecret = "default"  // served by the agent
	rootsSecret   = "ROOTCA"   // served by the control plane
	agentCluster  = "sds-grpc" // static in the bootstrap
	// systemRoots is where distributions keep the public certificate authorities.
	systemRoots = "/etc/ssl/certs/ca-certificates.crt"
)

// serverALPN is what an inbound listener picks from: never a mesh protocol, which Envoy's codec could not tell apart.
var serverALPN = []string{"h2", "http/1.1"}

// TrustBundle returns the secret ROOTCA: one SPIFFE trust domain for each known cluster, never merged. Clusters that
// share a trust domain share its roots: the local cluster's say, else the first by ID, so that no peer can add a root
// to a trust domain that is not its own. Roots that are not PEM certificates leave their trust domain out. It is nil
// when no roots are known.
func TrustBundle(snap *mesh.Snapshot) *tlsv3.Secret {
	clusters := snap.Clusters
	if snap.Local != nil {
		clusters = append([]*mesh.Cluster{snap.Local}, clusters...)
	}
	var domains []*tlsv3.SPIFFECertValidatorConfig_TrustDomain
	seen := map[mesh.TrustDomain]bool{}
	for _, c := range clusters {
		if seen[c.TrustDomain] || c.TrustDomain == "" || !isBundle(c.Roots) {
			continue
		}
		seen[c.TrustDomain] = true
		domains = append(domains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name:        string(c.TrustDomain),
			TrustBundle: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: string(c.Roots)}},
		})
	}
	if len(domains) == 0 {
		return nil
	}
	slices.SortFunc(domains, func(a, b *tlsv3.SPIFFECertValidatorConfig_TrustDomain) int {
		return strings.Compare(a.GetName(), b.GetName())
	})
	return &tlsv3.Secret{Name: rootsSecret, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		CustomValidatorConfig: &corev3.TypedExtensionConfig{
			Name: "envoy.tls.cert_validator.spiffe", TypedConfig: wire.Pack(&tlsv3.SPIFFECertValidatorConfig{TrustDomains: domains}),
		},
	}}}
}

// isBundle reports whether every PEM block is a certificate, and there is one.
func isBundle(roots []byte) bool {
	n := 0
	for block, rest := pem.Decode(roots); block != nil; block, rest = pem.Decode(rest) {
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return false
		}
		n++
	}
	return n > 0
}

// meshTLS is the part of a mesh TLS context that clients and servers share. ids are the identities the other side may
// have; none means any identity of a known trust domain.
func meshTLS(alpn, ids []string) *tlsv3.CommonTlsContext {
	context := &tlsv3.CertificateValidationContext{}
	for _, id := range ids {
		context.MatchTypedSubjectAltNames = append(context.MatchTypedSubjectAltNames, &tlsv3.SubjectAltNameMatcher{
			SanType: tlsv3.SubjectAltNameMatcher_URI, Matcher: wire.Exact(id),
		})
	}
	return &tlsv3.CommonTlsContext{
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		},
		AlpnProtocols:                  alpn,
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{Name: ownCertSecret, SdsConfig: wire.GRPC(agentCluster)}},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext:         context,
				ValidationContextSdsSecretConfig: &tlsv3.SdsSecretConfig{Name: rootsSecret, SdsConfig: wire.ADS(0)},
			},
		},
	}
}

// inboundTLS asks for a mesh certificate. Sessions are never resumed: a trust domain that is dropped must bite at once.
func inboundTLS() *corev3.TransportSocket {
	return tlsSocket(&tlsv3.DownstreamTlsContext{
		CommonTlsContext:                 meshTLS(serverALPN, nil),
		RequireClientCertificate:         wire.Yes(),
		DisableStatefulSessionResumption: true,
		SessionTicketKeysType:            &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
	})
}

// outboundTLS is mesh TLS to a service; without a name the endpoint's host name is sent.
func outboundTLS(name string, alpn, ids []string) *corev3.TransportSocket {
	return tlsSocket(&tlsv3.UpstreamTlsContext{
		CommonTlsContext: meshTLS(alpn, ids), Sni: name, AutoHostSni: name == "", MaxSessionKeys: wire.U32(0),
	})
}

// originatedTLS is TLS as a DestinationRule asks for it towards servers outside the mesh.
func (v *view) originatedTLS(s *networking.ClientTLSSettings, host string, http2 bool, object mesh.ObjectRef) *corev3.TransportSocket {
	if s.GetCredentialName() != "" {
		v.problems.add(object, "spec.trafficPolicy.tls.credentialName", reasonUnsupported, "credentials come from files only")
		return nil
	}
	name := s.GetSni()
	if name == "" && !strings.HasPrefix(host, "*") {
		name = host
	}
	common := &tlsv3.CommonTlsContext{}
	if http2 {
		common.AlpnProtocols = []string{"h2"}
	}
	if s.GetMode() == networking.ClientTLSSettings_MUTUAL {
		common.TlsCertificates = []*tlsv3.TlsCertificate{{CertificateChain: fileSource(s.GetClientCertificate()), PrivateKey: fileSource(s.GetPrivateKey())}}
	}
	if !s.GetInsecureSkipVerify().GetValue() {
		roots := s.GetCaCertificates()
		if roots == "" {
			roots = systemRoots
		}
		names := s.GetSubjectAltNames()
		if len(names) == 0 && name != "" {
			names = []string{name}
		}
		context := &tlsv3.CertificateValidationContext{TrustedCa: fileSource(roots)}
		for _, n := range names {
			kind := tlsv3.SubjectAltNameMatcher_DNS
			if strings.Contains(n, "://") {
				kind = tlsv3.SubjectAltNameMatcher_URI
			}
			context.MatchTypedSubjectAltNames = append(context.MatchTypedSubjectAltNames, &tlsv3.SubjectAltNameMatcher{SanType: kind, Matcher: wire.Exact(n)})
		}
		common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: context}
	}
	return tlsSocket(&tlsv3.UpstreamTlsContext{CommonTlsContext: common, Sni: name})
}

func fileSource(path string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: path}}
}

func tlsSocket[T interface {
	*tlsv3.UpstreamTlsContext | *tlsv3.DownstreamTlsContext
}](context T) *corev3.TransportSocket {
	s := &corev3.TransportSocket{Name: "envoy.transport_sockets.tls"}
	switch c := any(context).(type) {
	case *tlsv3.UpstreamTlsContext:
		s.ConfigType = &corev3.TransportSocket_TypedConfig{TypedConfig: wire.Pack(c)}
	case *tlsv3.DownstreamTlsContext:
		s.ConfigType = &corev3.TransportSocket_TypedConfig{TypedConfig: wire.Pack(c)}
	}
	return s
}

func rawSocket() *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name: "envoy.transport_sockets.raw_buffer", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: wire.Pack(&rawbufferv3.RawBuffer{})},
	}
}

// takesTLS reports whether mesh TLS is spoken to the endpoint's port: it has a proxy, and no PeerAuthentication turned
// mutual TLS off there. What other clusters have turned off is not known here.
func (v *view) takesTLS(e *mesh.Endpoint, p mesh.Port) bool {
	if !e.TLS || !v.mtlsOff || e.Identity == "" || topologies.IsPeer(v.snap, v.snap.Cluster(e.Cluster)) {
		return e.TLS
	}
	return peerauth.For(v.snap.PeerAuthentications, e.Namespace, e.Labels).At(e.PortOf(p)) != peerauth.Disable
}

// meshALPN is what tells mesh TLS from the application's own.
func meshALPN() []string { return slices.Clone(sni.ALPN) }
