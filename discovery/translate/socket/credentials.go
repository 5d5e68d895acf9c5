package socket

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

const (
	// scheme stands before the names of secrets that are made of Kubernetes Secrets, as in Istio.
	scheme = "kubernetes://"
	// authorities ends the name of the Secret with the authorities that belong to another Secret's certificate.
	authorities = "-cacert"
)

// Errors of credentials.
var (
	ErrUnverified = errors.New("credentials are served to gateways alone that prove who they are")
	ErrNoSecret   = errors.New("there is no such Secret")
	ErrNoKey      = errors.New("the Secret has no certificate with a key")
	ErrNoRoots    = errors.New("neither the Secret nor the one named like it with -cacert has certificate authorities")
)

// Credentials gives one gateway the Secrets of its own namespace, and remembers which it was given.
type Credentials struct {
	snap      *mesh.Snapshot
	namespace string
	gateway   bool
	verified  bool // the gateway proved its namespace
	used      map[string]*tlsv3.Secret
	granted   map[string]bool // Secrets of any namespace
}

// schemeAnywhere stands before NAMESPACE/NAME of Secrets that may be of another namespace.
const schemeAnywhere = "kubernetes-gateway://"

// Grant lets the gateway have Secrets of other namespaces, which are named kubernetes-gateway://NAMESPACE/NAME. Whoever
// calls it knows that their owners agree.
func (c *Credentials) Grant(names []string) {
	for _, n := range names {
		if c.granted == nil {
			c.granted = map[string]bool{}
		}
		c.granted[n] = true
	}
}

// CredentialsOf returns those of p, which has none unless its certificate or token proves its namespace.
func CredentialsOf(snap *mesh.Snapshot, p *mesh.Proxy) *Credentials {
	return &Credentials{snap: snap, namespace: p.Namespace, used: map[string]*tlsv3.Secret{}, gateway: p.Type == mesh.Router,
		verified: p.Type == mesh.Router && strings.HasPrefix(p.Identity, "spiffe://") && strings.Contains(p.Identity, "/ns/"+p.Namespace+"/sa/")}
}

// Secrets returns what was asked for and is there, sorted by name.
func (c *Credentials) Secrets() []*tlsv3.Secret {
	var out []*tlsv3.Secret
	for _, n := range slices.Sorted(maps.Keys(c.used)) {
		out = append(out, c.used[n])
	}
	return out
}

func (c *Credentials) find(name string) (sds string, found *mesh.Credential, err error) {
	if !c.verified {
		return "", nil, ErrUnverified
	}
	if at, anywhere := strings.CutPrefix(name, schemeAnywhere); anywhere && c.granted[strings.TrimSuffix(name, authorities)] {
		namespace, plain, _ := strings.Cut(at, "/")
		return name, c.snap.Credential(namespace, plain), nil
	}
	plain := strings.TrimPrefix(name, scheme)
	return scheme + plain, c.snap.Credential(c.namespace, plain), nil
}

// certificate refers to the certificate and key of a Secret.
func (c *Credentials) certificate(name string) (*tlsv3.SdsSecretConfig, error) {
	sds, found, err := c.find(name)
	switch {
	case err != nil:
		return nil, err
	case found == nil:
		return nil, fmt.Errorf("%s: %w", name, ErrNoSecret)
	case len(found.Certificate) == 0 || len(found.Key) == 0:
		return nil, fmt.Errorf("%s: %w", name, ErrNoKey)
	}
	c.used[sds] = &tlsv3.Secret{Name: sds, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(found.Certificate), PrivateKey: inline(found.Key),
	}}}
	return &tlsv3.SdsSecretConfig{Name: sds, SdsConfig: wire.ADS(0)}, nil
}

// roots refers to the authorities in a Secret: those of NAME-cacert, else those beside the certificate of NAME.
func (c *Credentials) roots(name string) (*tlsv3.SdsSecretConfig, error) {
	if id, is := strings.CutPrefix(name, schemeBackend); is {
		return c.backendRoots(name, id)
	}
	base := strings.TrimSuffix(name, authorities)
	sds, found, err := c.find(base + authorities)
	if err != nil {
		return nil, err
	}
	if found == nil || len(found.Roots) == 0 {
		_, found, _ = c.find(base)
	}
	if found == nil || len(found.Roots) == 0 {
		return nil, fmt.Errorf("%s: %w", name, ErrNoRoots)
	}
	v := &tlsv3.CertificateValidationContext{TrustedCa: inline(found.Roots)}
	if len(found.CRL) > 0 {
		v.Crl, v.OnlyVerifyLeafCertCrl = inline(found.CRL), true
	}
	c.used[sds] = &tlsv3.Secret{Name: sds, Type: &tlsv3.Secret_ValidationContext{ValidationContext: v}}
	return &tlsv3.SdsSecretConfig{Name: sds, SdsConfig: wire.ADS(0)}, nil
}

// schemeBackend stands before the object that says how a backend is verified.
const schemeBackend = "backend-tls://"

// Backend is TLS towards a backend of the Gateway API, as a DestinationRule would ask for it.
func Backend(b *mesh.BackendTLS) *networking.ClientTLSSettings {
	out := &networking.ClientTLSSettings{Mode: networking.ClientTLSSettings_SIMPLE, Sni: b.Name, SubjectAltNames: b.Names}
	if len(b.Roots) > 0 || b.Broken {
		out.CredentialName = schemeBackend + b.Object.Namespace + "/" + b.Object.Name
	}
	return out
}

// backendRoots are authorities that the Snapshot itself holds.
func (c *Credentials) backendRoots(name, id string) (*tlsv3.SdsSecretConfig, error) {
	for _, b := range c.snap.Backends {
		if b.Object.Namespace+"/"+b.Object.Name == id && !b.Broken && len(b.Roots) > 0 {
			c.used[name] = &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(b.Roots)}}}
			return &tlsv3.SdsSecretConfig{Name: name, SdsConfig: wire.ADS(0)}, nil
		}
	}
	return nil, fmt.Errorf("BackendTLSPolicy %s: %w", id, ErrNoRoots)
}

func inline(pem []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: pem}}
}
