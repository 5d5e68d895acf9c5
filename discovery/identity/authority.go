package identity

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
)

// Material is a CA in PEM, in the parts of Istio's cacerts. It prints as [redacted].
type Material struct {
	Cert  []byte // ca-cert.pem: what signs
	Key   []byte // ca-key.pem
	Root  []byte // root-cert.pem; empty: Cert is a root
	Chain []byte // cert-chain.pem: what leads from Cert to Root; may be empty
	// Cross leads from Cert to a root before it, for those who know only that; empty: nothing does.
	Cross []byte
}

// MaterialOf reads the parts by their names in a Secret: those of Istio, or tls.crt, tls.key and ca.crt as cert-manager
// writes them.
func MaterialOf(data map[string][]byte) Material {
	if len(data[givenCert]) == 0 && len(data["tls.crt"]) > 0 {
		return Material{Cert: data["tls.crt"], Key: data["tls.key"], Root: data["ca.crt"], Chain: data["tls.crt"]}
	}
	return Material{Cert: data[givenCert], Key: data[givenKey], Root: data[givenRoot], Chain: data[givenChain], Cross: data[crossCert]}
}

// Data returns the parts by Istio's names.
func (m Material) Data() map[string][]byte {
	out := map[string][]byte{givenCert: m.Cert, givenKey: m.Key, givenRoot: m.Root, givenChain: m.Chain}
	if len(m.Cross) > 0 {
		out[crossCert] = m.Cross
	}
	return out
}

// String returns [redacted].
func (Material) String() string { return redacted }

// Format prints [redacted] for every verb.
func (Material) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns [redacted].
func (Material) LogValue() slog.Value { return slog.StringValue(redacted) }

// Authority is a checked CA that can sign. It is immutable.
type Authority struct {
	key   key
	chain []*x509.Certificate // signer first, root last
	roots []*x509.Certificate
	cross []*x509.Certificate // from the signer's key to a root before
}

// Cross has this authority sign the key of another's certificate: whoever knows only this one's roots trusts what the
// other signs, too. It returns what Material.Cross is of the other.
func (a *Authority) Cross(other []byte) ([]byte, error) {
	certs, err := parseCerts("that is to be vouched for", other, "give the certificate that signs")
	if err != nil {
		return nil, err
	}
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	c := certs[0]
	tmpl := &x509.Certificate{
		SerialNumber: serial, RawSubject: c.RawSubject, NotBefore: c.NotBefore, NotAfter: a.expires(), URIs: c.URIs,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: c.KeyUsage, SubjectKeyId: c.SubjectKeyId,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.chain[0], c.PublicKey, a.key.signer())
	if err != nil {
		return nil, fmt.Errorf("CA: vouch for %s: %w", c.Subject, err)
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return append(out, encodeCerts(a.chain)...), nil
}

// presented is what is shown behind a certificate that the authority signed.
func (a *Authority) presented() []*x509.Certificate { return slices.Concat(a.chain, a.cross) }

// ID tells authorities apart: a digest of the certificate that signs.
func (a *Authority) ID() string {
	digest := sha256.Sum256(a.chain[0].Raw)
	return hex.EncodeToString(digest[:8])
}

// Expires says when the first certificate of its chain ends.
func (a *Authority) Expires() time.Time { return a.expires() }

// Roots returns its roots in PEM.
func (a *Authority) Roots() []byte { return encodeCerts(a.roots) }

// state is what a CA signs with and trusts at a time.
type state struct {
	by      *Authority
	rootPEM []byte
	bundle  *x509bundle.Bundle
}

// New makes a CA out of material and the key of workload tokens (PEM), for places where files are not kept. from names
// the material in errors, for example "Secret istio-system/cacerts".
func New(c Config, from string, m Material, tokenKeyPEM []byte) (*CA, error) {
	ca, err := prepare(c)
	if err != nil {
		return nil, err
	}
	if ca.tokens, err = parseTokenKey("of workload tokens", tokenKeyPEM); err != nil {
		return nil, err
	}
	by, err := ca.Parse(from, m)
	if err != nil {
		return nil, err
	}
	return ca, ca.Use(by, nil)
}

// MakeRoot makes a root of the trust domain.
func MakeRoot(c Config) (Material, error) {
	ca, err := prepare(c)
	if err != nil {
		return Material{}, err
	}
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Material{}, fmt.Errorf("CA: make root key: %w", err)
	}
	der, err := ca.makeRoot(signer)
	if err != nil {
		return Material{}, err
	}
	private, err := encodeKey(signer)
	if err != nil {
		return Material{}, err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return Material{Cert: cert, Key: private, Root: cert, Chain: cert}, nil
}

// Parse checks material by the rules for a CA that is given. An error wraps *Invalid.
func (ca *CA) Parse(from string, m Material) (*Authority, error) {
	return ca.parse(func(name string) string { return from + " " + name }, m)
}

func (ca *CA) parse(label func(string) string, m Material) (*Authority, error) {
	certs, err := parseCerts(label(givenCert), m.Cert, remedyGiven)
	if err != nil {
		return nil, err
	}
	signer, err := parseKeyPEM(label(givenKey), m.Key, remedyGiven)
	if err != nil {
		return nil, err
	}
	a := &Authority{key: hide(signer)}
	if a.roots = certs[:1]; len(bytes.TrimSpace(m.Root)) > 0 {
		if a.roots, err = parseCerts(label(givenRoot), m.Root, remedyGiven); err != nil {
			return nil, err
		}
	}
	var between []*x509.Certificate
	if len(bytes.TrimSpace(m.Chain)) > 0 {
		if between, err = parseCerts(label(givenChain), m.Chain, remedyGiven); err != nil {
			return nil, err
		}
	}
	if err := ca.check(label(givenCert), certs[0], remedyGiven); err != nil {
		return nil, err
	}
	if err := matches(label(givenKey), certs[0], signer, remedyGiven); err != nil {
		return nil, err
	}
	if a.roots, err = ca.usable(label(givenRoot), a.roots); err != nil {
		return nil, err
	}
	for _, c := range between {
		if err := ca.check(label(givenChain), c, remedyGiven); err != nil {
			return nil, err
		}
	}
	chains, err := certs[0].Verify(x509.VerifyOptions{
		Roots: pool(a.roots), Intermediates: pool(between), CurrentTime: ca.config.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, &Invalid{File: label(givenChain), Reason: ReasonChain, Message: fmt.Sprintf("%s does not lead from %s to a root in %s: %v", givenChain, givenCert, givenRoot, err), Remedy: remedyGiven}
	}
	a.chain = chains[0]
	if len(bytes.TrimSpace(m.Cross)) > 0 {
		if a.cross, err = parseCerts(label(crossCert), m.Cross, remedyGiven); err != nil {
			return nil, err
		}
		if err := matches(label(crossCert), a.cross[0], signer, remedyGiven); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// usable returns the roots that are good now. One that is not stops nothing as long as another is left.
func (ca *CA) usable(file string, roots []*x509.Certificate) (out []*x509.Certificate, err error) {
	for _, r := range roots {
		if bad := ca.check(file, r, remedyGiven); bad != nil {
			ca.config.Log.Warn("a root certificate is left out", "err", bad)
			err = bad
			continue
		}
		out = append(out, r)
	}
	if len(out) > 0 {
		return out, nil
	}
	return nil, err
}

// Use signs with by from now on, and trusts its roots and those in also (PEM): during a change of roots, the ones that
// certificates in use were signed under, or will be. What was signed before stays valid as long as its root is trusted.
// The roots of by are first: by that agents see that their certificates are to be renewed. Those in also follow, sorted.
func (ca *CA) Use(by *Authority, also []byte) error {
	roots := slices.Clone(by.roots)
	if len(bytes.TrimSpace(also)) > 0 {
		more, err := parseCerts("of the roots trusted beside", also, "remove what is no root certificate")
		if err != nil {
			return err
		}
		slices.SortFunc(more, func(a, b *x509.Certificate) int {
			return cmp.Or(a.NotBefore.Compare(b.NotBefore), bytes.Compare(a.Raw, b.Raw))
		})
		now := ca.config.Now()
		for _, c := range more {
			if c.IsCA && now.Before(c.NotAfter) && !slices.ContainsFunc(roots, c.Equal) {
				roots = append(roots, c)
			}
		}
	}
	next := &state{by: by, rootPEM: encodeCerts(roots), bundle: x509bundle.FromX509Authorities(ca.domain, roots)}
	if old := ca.state.Swap(next); old != nil && old.by == by {
		return nil
	}
	if left := ca.Expires().Sub(ca.config.Now()); left < 30*24*time.Hour {
		ca.config.Log.Warn("the CA expires soon; rotate it", "expires", ca.Expires(), "trustDomain", string(ca.config.TrustDomain))
	}
	return nil
}

// Authority returns what signs now.
func (ca *CA) Authority() *Authority { return ca.state.Load().by }

// Roots returns the roots in PEM: the trust domain's bundle.
func (ca *CA) Roots() []byte { return bytes.Clone(ca.state.Load().rootPEM) }

// Chain returns what signs, signer first and root last.
func (ca *CA) Chain() []*x509.Certificate { return slices.Clone(ca.Authority().chain) }

// Root returns the root at the end of the chain. Every certificate that Issue makes carries it, so a join token may pin it.
func (ca *CA) Root() *x509.Certificate {
	chain := ca.Authority().chain
	return chain[len(chain)-1]
}

// Expires says when the first certificate of the chain ends.
func (ca *CA) Expires() time.Time { return ca.Authority().expires() }

func (a *Authority) expires() time.Time {
	out := a.chain[0].NotAfter
	for _, c := range a.chain[1:] {
		if c.NotAfter.Before(out) {
			out = c.NotAfter
		}
	}
	return out
}

func encodeCerts(certs []*x509.Certificate) []byte {
	var out strings.Builder
	for _, c := range certs {
		out.Write(encodeCert(c))
	}
	return []byte(out.String())
}
