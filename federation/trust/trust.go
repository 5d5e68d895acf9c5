// Package trust knows the roots of every trust domain that this control plane talks to, and how two control planes
// prove to each other who they are. It does not know how bundles travel, nor who may do what: callers authorise.
//
// Bundles are never merged: a certificate is verified by the roots of the trust domain in its own SPIFFE id, and by no
// other. Every handshake looks the roots up anew and no session is ever resumed, so a bundle that is removed bites at
// the next handshake.
package trust

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Limits of a bundle.
const (
	MaxBundle = 64 << 10 // bytes of PEM
	MaxRoots  = 16       // certificates
)

// Errors of this package.
var (
	ErrBundle    = errors.New("not a trust bundle")
	ErrNoBundle  = errors.New("no trust bundle of that trust domain")
	ErrNoPeer    = errors.New("the other side shows no certificate")
	ErrUntrusted = errors.New("the certificate of the other side is not trusted")
)

// ParseBundle reads root certificates in PEM. Each must be a CA; a repeated one counts once. Anything in data that is
// not a certificate is an error.
func ParseBundle(data []byte) ([]*x509.Certificate, error) {
	if len(data) > MaxBundle {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are allowed", ErrBundle, len(data), MaxBundle)
	}
	var roots []*x509.Certificate
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if !bytes.HasPrefix(rest, []byte("-----BEGIN ")) {
			return nil, fmt.Errorf("%w: there is text that is not PEM after %d certificates", ErrBundle, len(roots))
		}
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%w: PEM block %d is not a certificate", ErrBundle, len(roots)+1)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d: %w", ErrBundle, len(roots)+1, err)
		}
		if !c.IsCA || !c.BasicConstraintsValid {
			return nil, fmt.Errorf("%w: certificate %d (%s) is not that of a CA", ErrBundle, len(roots)+1, c.Subject)
		}
		if slices.ContainsFunc(roots, c.Equal) {
			continue
		}
		if roots = append(roots, c); len(roots) > MaxRoots {
			return nil, fmt.Errorf("%w: over %d certificates", ErrBundle, MaxRoots)
		}
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("%w: no certificate", ErrBundle)
	}
	return roots, nil
}

// Bundles holds the roots of each trust domain. Its zero value is ready and empty; it is safe for concurrent use.
type Bundles struct {
	current atomic.Pointer[map[spiffeid.TrustDomain]*x509bundle.Bundle]
}

var _ x509bundle.Source = (*Bundles)(nil)

// Set replaces all bundles at once by those in PEM. A bundle that does not parse is left out, so its trust domain is
// not trusted; the error names each of them, and the others are in force.
func (b *Bundles) Set(pems map[mesh.TrustDomain][]byte) error {
	next := make(map[spiffeid.TrustDomain]*x509bundle.Bundle, len(pems))
	var errs []error
	for name, data := range pems {
		td, err := spiffeid.TrustDomainFromString(string(name))
		if err != nil || td.Name() != string(name) {
			errs = append(errs, fmt.Errorf("trust domain %.128q is not a trust domain name; its bundle is ignored", string(name)))
			continue
		}
		roots, err := ParseBundle(data)
		if err != nil {
			errs = append(errs, fmt.Errorf("bundle of trust domain %s is ignored: %w", name, err))
			continue
		}
		next[td] = x509bundle.FromX509Authorities(td, roots)
	}
	b.current.Store(&next)
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (b *Bundles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if m := b.current.Load(); m != nil {
		if bundle, ok := (*m)[td]; ok {
			return bundle, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", td, ErrNoBundle)
}

// TrustDomains lists the trust domains that have a bundle, sorted.
func (b *Bundles) TrustDomains() []mesh.TrustDomain {
	var out []mesh.TrustDomain
	if m := b.current.Load(); m != nil {
		for td := range *m {
			out = append(out, mesh.TrustDomain(td.Name()))
		}
	}
	slices.Sort(out)
	return out
}

// Local gives this control plane's own certificate under one control identity, current at the time of the call.
type Local func() (*tls.Certificate, error)

var _ x509svid.Source = Local(nil)

// GetX509SVID implements x509svid.Source.
func (l Local) GetX509SVID() (*x509svid.SVID, error) {
	cert, err := l()
	if err != nil {
		return nil, err
	}
	signer, ok := cert.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, errors.New("own certificate has no usable private key")
	}
	var chain []*x509.Certificate
	for _, raw := range cert.Certificate {
		c, err := x509.ParseCertificate(raw)
		if err != nil {
			return nil, fmt.Errorf("own certificate: %w", err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, errors.New("own certificate is empty")
	}
	id, err := x509svid.IDFromCert(chain[0])
	if err != nil {
		return nil, fmt.Errorf("own certificate: %w", err)
	}
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: signer}, nil
}

// Config says who we are and whom we take for whom. NextProtos and ServerName are set on the result by the caller.
type Config struct {
	// Local is our certificate. Needed by servers; a client without one shows none.
	Local Local
	// Bundles verify the other side.
	Bundles x509bundle.Source
	// Authorize refuses an identity that is genuine but not wanted. It must be set.
	Authorize func(spiffeid.ID) error
	// Optional lets clients without a certificate in; one that is shown must verify. For servers only.
	Optional bool
}

// ServerConfig returns TLS 1.3 with client certificates. No session is ever resumed.
func ServerConfig(c Config) *tls.Config {
	out := c.base()
	out.ClientAuth = tls.RequireAnyClientCert
	if c.Optional {
		out.ClientAuth = tls.RequestClientCert
	}
	out.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.Local() }
	out.VerifyConnection = func(cs tls.ConnectionState) error {
		if c.Optional && len(cs.PeerCertificates) == 0 {
			return nil
		}
		return c.verify(cs, x509.ExtKeyUsageClientAuth)
	}
	return out
}

// ClientConfig returns TLS 1.3 that verifies the server by its SPIFFE id; the server's DNS name does not matter.
func ClientConfig(c Config) *tls.Config {
	out := c.base()
	out.InsecureSkipVerify = true // VerifyConnection does it, by SPIFFE id instead of by name
	if c.Local != nil {
		out.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.Local() }
	}
	out.VerifyConnection = func(cs tls.ConnectionState) error { return c.verify(cs, x509.ExtKeyUsageServerAuth) }
	return out
}

func (c Config) base() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true}
}

func (c Config) verify(cs tls.ConnectionState, usage x509.ExtKeyUsage) error {
	id, err := Verify(cs.PeerCertificates, c.Bundles, usage)
	if err != nil {
		return err
	}
	if c.Authorize == nil {
		return fmt.Errorf("%s: nobody is authorised here: %w", id, ErrUntrusted)
	}
	if err := c.Authorize(id); err != nil {
		return fmt.Errorf("%s is not wanted here: %w", id, err)
	}
	return nil
}

// Verify checks a chain, leaf first, by the roots of the trust domain in its single SPIFFE id, and that its leaf is
// made for the usage. It returns the id.
func Verify(chain []*x509.Certificate, bundles x509bundle.Source, usage x509.ExtKeyUsage) (spiffeid.ID, error) {
	if len(chain) == 0 {
		return spiffeid.ID{}, ErrNoPeer
	}
	id, _, err := x509svid.Verify(chain, bundles)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	if leaf := chain[0]; !slices.Contains(leaf.ExtKeyUsage, usage) && !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return spiffeid.ID{}, fmt.Errorf("%w: the certificate of %s is not made for this side of TLS", ErrUntrusted, id)
	}
	return id, nil
}

// PeerID returns the SPIFFE id of the other side of a connection that ServerConfig or ClientConfig verified.
func PeerID(cs tls.ConnectionState) (spiffeid.ID, error) {
	if len(cs.PeerCertificates) == 0 {
		return spiffeid.ID{}, ErrNoPeer
	}
	return x509svid.IDFromCert(cs.PeerCertificates[0])
}

// Path returns an Authorize that accepts one path in every trust domain that has a bundle, for example "/isthmus/peer".
func Path(path string) func(spiffeid.ID) error {
	return func(id spiffeid.ID) error {
		if id.Path() != path {
			return fmt.Errorf("want an identity that ends with %s", path)
		}
		return nil
	}
}

// Exactly returns an Authorize that accepts one identity.
func Exactly(id string) func(spiffeid.ID) error {
	return func(got spiffeid.ID) error {
		if got.String() != id {
			return fmt.Errorf("want %s", id)
		}
		return nil
	}
}
