package socket

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// ciphers are the suites that Envoy knows for TLS 1.2 and older.
var ciphers = []string{
	"ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-RSA-AES256-GCM-SHA384",
	"ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-RSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-SHA", "ECDHE-RSA-AES128-SHA",
	"ECDHE-ECDSA-AES256-SHA", "ECDHE-RSA-AES256-SHA", "AES128-GCM-SHA256", "AES256-GCM-SHA384", "AES128-SHA", "AES256-SHA",
}

// UnknownCiphers returns those of a list that Envoy does not know: one of them would have it refuse the listener.
func UnknownCiphers(list []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(c string) bool { return slices.Contains(ciphers, c) })
}

// Server is how a server of a Gateway ends TLS. An error says which credential is not there.
func Server(t *networking.ServerTLSSettings, http bool, from *Credentials) (*corev3.TransportSocket, error) {
	var alpn []string
	if http {
		alpn = []string{"h2", "http/1.1"}
	}
	mode := t.GetMode()
	if mode == networking.ServerTLSSettings_ISTIO_MUTUAL {
		return meshServer(alpn), nil
	}
	common := &tlsv3.CommonTlsContext{AlpnProtocols: alpn, TlsParams: params(t)}
	names := t.GetCredentialNames()
	if len(names) == 0 && t.GetCredentialName() != "" {
		names = []string{t.GetCredentialName()}
	}
	for _, n := range names {
		s, err := from.certificate(n)
		if err != nil {
			return nil, err
		}
		common.TlsCertificateSdsSecretConfigs = append(common.TlsCertificateSdsSecretConfigs, s)
	}
	if len(names) == 0 {
		common.TlsCertificates = files(t)
	}
	down := &tlsv3.DownstreamTlsContext{CommonTlsContext: common}
	switch mode {
	case networking.ServerTLSSettings_MUTUAL:
		down.RequireClientCertificate = wire.Yes()
	case networking.ServerTLSSettings_OPTIONAL_MUTUAL:
	default:
		return tlsSocket(down), nil
	}
	if err := clients(common, t, names, from); err != nil {
		return nil, err
	}
	// A session that is resumed would not see that its certificate was revoked.
	down.DisableStatefulSessionResumption = true
	down.SessionTicketKeysType = &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true}
	return tlsSocket(down), nil
}

// meshServer asks for a mesh certificate.
func meshServer(alpn []string) *corev3.TransportSocket {
	return tlsSocket(&tlsv3.DownstreamTlsContext{
		CommonTlsContext: meshTLS(alpn, nil), RequireClientCertificate: wire.Yes(), DisableStatefulSessionResumption: true,
		SessionTicketKeysType: &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
	})
}

func params(t *networking.ServerTLSSettings) *tlsv3.TlsParameters {
	p := &tlsv3.TlsParameters{
		TlsMinimumProtocolVersion: tlsv3.TlsParameters_TlsProtocol(t.GetMinProtocolVersion()), TlsMaximumProtocolVersion: tlsv3.TlsParameters_TlsProtocol(t.GetMaxProtocolVersion()),
	}
	if t.GetMinProtocolVersion() == networking.ServerTLSSettings_TLS_AUTO {
		p.TlsMinimumProtocolVersion = tlsv3.TlsParameters_TLSv1_2
		if most := p.TlsMaximumProtocolVersion; most != tlsv3.TlsParameters_TLS_AUTO {
			p.TlsMinimumProtocolVersion = min(p.TlsMinimumProtocolVersion, most)
		}
	}
	for _, c := range t.GetCipherSuites() {
		if slices.Contains(ciphers, c) && !slices.Contains(p.CipherSuites, c) {
			p.CipherSuites = append(p.CipherSuites, c)
		}
	}
	return p
}

func files(t *networking.ServerTLSSettings) (out []*tlsv3.TlsCertificate) {
	for _, c := range t.GetTlsCertificates() {
		out = append(out, &tlsv3.TlsCertificate{CertificateChain: fileSource(c.GetServerCertificate()), PrivateKey: fileSource(c.GetPrivateKey())})
	}
	if len(out) == 0 {
		out = append(out, &tlsv3.TlsCertificate{CertificateChain: fileSource(t.GetServerCertificate()), PrivateKey: fileSource(t.GetPrivateKey())})
	}
	return out
}

// clients says which client certificates are taken.
func clients(common *tlsv3.CommonTlsContext, t *networking.ServerTLSSettings, names []string, from *Credentials) error {
	v := &tlsv3.CertificateValidationContext{
		MatchTypedSubjectAltNames: matchers(t.GetSubjectAltNames()), VerifyCertificateSpki: t.GetVerifyCertificateSpki(), VerifyCertificateHash: t.GetVerifyCertificateHash(),
	}
	if t.GetInsecureSkipVerify().GetValue() {
		v.TrustChainVerification = tlsv3.CertificateValidationContext_ACCEPT_UNTRUSTED
	}
	if t.GetCaCrl() != "" {
		v.Crl, v.OnlyVerifyLeafCertCrl = fileSource(t.GetCaCrl()), true
	}
	secret := t.GetCaCertCredentialName()
	if secret == "" && len(names) > 0 && t.GetCaCertificates() == "" {
		secret = names[0] + authorities
	}
	if secret == "" {
		if t.GetCaCertificates() != "" {
			v.TrustedCa = fileSource(t.GetCaCertificates())
		}
		common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: v}
		return nil
	}
	sds, err := from.roots(secret)
	if err != nil {
		return err
	}
	common.ValidationContextType = combined(v, sds)
	return nil
}

func combined(v *tlsv3.CertificateValidationContext, sds *tlsv3.SdsSecretConfig) *tlsv3.CommonTlsContext_CombinedValidationContext {
	return &tlsv3.CommonTlsContext_CombinedValidationContext{CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
		DefaultValidationContext: v, ValidationContextSdsSecretConfig: sds,
	}}
}

// matchers match the names that a certificate must have one of; how a name looks says of which kind it is.
func matchers(names []string) (out []*tlsv3.SubjectAltNameMatcher) {
	for _, n := range names {
		kind := tlsv3.SubjectAltNameMatcher_DNS
		if _, err := netip.ParseAddr(n); err == nil {
			kind = tlsv3.SubjectAltNameMatcher_IP_ADDRESS
		} else if strings.Contains(n, "://") {
			kind = tlsv3.SubjectAltNameMatcher_URI
		} else if strings.Contains(n, "@") {
			kind = tlsv3.SubjectAltNameMatcher_EMAIL
		}
		out = append(out, &tlsv3.SubjectAltNameMatcher{SanType: kind, Matcher: wire.Exact(n)})
	}
	return out
}

// Originated is TLS as a DestinationRule asks for it towards servers outside the mesh. names are those that the server may
// have where the rule says nothing of it; none: the server name, or the host. An error says which credential is not there.
func Originated(s *networking.ClientTLSSettings, host string, names []string, http2 bool, from *Credentials) (*corev3.TransportSocket, error) {
	name := s.GetSni()
	if name == "" && !strings.HasPrefix(host, "*") {
		name = host
	}
	common := &tlsv3.CommonTlsContext{}
	if http2 {
		common.AlpnProtocols = []string{"h2"}
	}
	credential := s.GetCredentialName()
	if !from.gateway {
		credential = "" // as Istio has it: sidecars name files
	}
	if s.GetMode() == networking.ClientTLSSettings_MUTUAL && credential != "" {
		sds, err := from.certificate(credential)
		if err != nil {
			return nil, err
		}
		common.TlsCertificateSdsSecretConfigs = []*tlsv3.SdsSecretConfig{sds}
	} else if s.GetMode() == networking.ClientTLSSettings_MUTUAL && s.GetClientCertificate() != "" {
		common.TlsCertificates = []*tlsv3.TlsCertificate{{CertificateChain: fileSource(s.GetClientCertificate()), PrivateKey: fileSource(s.GetPrivateKey())}}
	}
	up := &tlsv3.UpstreamTlsContext{CommonTlsContext: common, Sni: name}
	if s.GetInsecureSkipVerify().GetValue() {
		return tlsSocket(up), nil
	}
	if len(s.GetSubjectAltNames()) > 0 {
		names = s.GetSubjectAltNames()
	}
	if len(names) == 0 && name != "" {
		names = []string{name}
	}
	v := &tlsv3.CertificateValidationContext{MatchTypedSubjectAltNames: matchers(names)}
	if s.GetCaCrl() != "" {
		v.Crl = fileSource(s.GetCaCrl())
	}
	if credential == "" {
		v.TrustedCa = fileSource(cmp.Or(s.GetCaCertificates(), systemRoots))
		common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: v}
		return tlsSocket(up), nil
	}
	sds, err := from.roots(credential)
	if err != nil {
		return nil, fmt.Errorf("authorities of the server: %w", err)
	}
	common.ValidationContextType = combined(v, sds)
	return tlsSocket(up), nil
}
