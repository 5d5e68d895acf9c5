// Package socket makes the transport sockets of clusters and listeners: TLS of the mesh, TLS as rules ask for it, none,
// and what may stand before it on the wire. It is pure.
package socket

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	internalv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/internal_upstream/v3"
	proxyprotocolv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/proxy_protocol/v3"
	rawbufferv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// Roots is the secret with the mesh's trusted roots, served by the control plane.
const Roots = "ROOTCA"

const (
	ownCertSecret = "default"  // served by the agent
	agentCluster  = "sds-grpc" // static in the bootstrap
	// systemRoots is where distributions keep the public certificate authorities.
	systemRoots = "/etc/ssl/certs/ca-certificates.crt"
)

// serverALPN is what an inbound listener picks from: never a mesh protocol, which Envoy's codec could not tell apart.
var serverALPN = []string{"h2", "http/1.1"}

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
				ValidationContextSdsSecretConfig: &tlsv3.SdsSecretConfig{Name: Roots, SdsConfig: wire.ADS(0)},
			},
		},
	}
}

// Inbound asks for a mesh certificate. Sessions are never resumed: a trust domain that is dropped must bite at once.
func Inbound() *corev3.TransportSocket {
	return tlsSocket(&tlsv3.DownstreamTlsContext{
		CommonTlsContext:                 meshTLS(serverALPN, nil),
		RequireClientCertificate:         wire.Yes(),
		DisableStatefulSessionResumption: true,
		SessionTicketKeysType:            &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
	})
}

// Outbound is mesh TLS to a service; without a name the endpoint's host name is sent.
func Outbound(name string, alpn, ids []string) *corev3.TransportSocket {
	return tlsSocket(&tlsv3.UpstreamTlsContext{
		CommonTlsContext: meshTLS(alpn, ids), Sni: name, AutoHostSni: name == "", MaxSessionKeys: wire.U32(0),
	})
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

// Raw is no TLS.
func Raw() *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name: "envoy.transport_sockets.raw_buffer", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: wire.Pack(&rawbufferv3.RawBuffer{})},
	}
}

// AfterProxyHeader sends a PROXY header before what inner sends; nil stands for no TLS.
func AfterProxyHeader(p *networking.TrafficPolicy_ProxyProtocol, inner *corev3.TransportSocket) *corev3.TransportSocket {
	if inner == nil {
		inner = Raw()
	}
	config := &corev3.ProxyProtocolConfig{Version: corev3.ProxyProtocolConfig_V1}
	if p.GetVersion() == networking.TrafficPolicy_ProxyProtocol_V2 {
		config.Version = corev3.ProxyProtocolConfig_V2
	}
	return &corev3.TransportSocket{Name: "envoy.transport_sockets.upstream_proxy_protocol", ConfigType: &corev3.TransportSocket_TypedConfig{
		TypedConfig: wire.Pack(&proxyprotocolv3.ProxyProtocolUpstreamTransport{Config: config, TransportSocket: inner}),
	}}
}

// ThroughInternal hands the bytes of inner to an internal listener.
func ThroughInternal(inner *corev3.TransportSocket) *corev3.TransportSocket {
	return &corev3.TransportSocket{Name: "envoy.transport_sockets.internal_upstream", ConfigType: &corev3.TransportSocket_TypedConfig{
		TypedConfig: wire.Pack(&internalv3.InternalUpstreamTransport{TransportSocket: inner}),
	}}
}
