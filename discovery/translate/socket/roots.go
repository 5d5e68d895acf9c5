package socket

import (
	"crypto/x509"
	"encoding/pem"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

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
	return &tlsv3.Secret{Name: Roots, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
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

// Evictions marks a chain that clients of other clusters may have connections on. Envoy drains a chain that is not the same
// as before: so connections from before an eviction end, also those of the one who was evicted. Where the network is the
// cluster's own, others reach only what is exported.
func Evictions(local *mesh.Cluster, shared bool) *corev3.Metadata {
	if local == nil || local.Evictions == "" || !shared && local.Network == mesh.NetworkID(local.ID) {
		return nil
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"isthmus.io": {
		Fields: map[string]*structpb.Value{"evictions": structpb.NewStringValue(local.Evictions)},
	}}}
}
