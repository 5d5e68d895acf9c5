// Package identity is the workload CA of one cluster: it keeps or makes the root, signs certificate requests with
// identities that the server builds, mints and checks workload tokens, and serves istio.v1.auth. It does not know which
// workloads exist, nor how bundles reach proxies and peers.
package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Files of a CA that was made here, in Config.Dir.
const (
	rootCertFile = "root-cert.pem"
	rootKeyFile  = "root-key.pem"
	tokenKeyFile = "workload-token-key.pem"
)

// Files of a CA that was given, in Config.Given; the names are Istio's.
const (
	givenCert  = "ca-cert.pem"
	givenKey   = "ca-key.pem"
	givenRoot  = "root-cert.pem"
	givenChain = "cert-chain.pem"
)

const (
	rootLifetime = 10 * 365 * 24 * time.Hour
	backdate     = time.Minute // clocks of workloads may be behind
	maxFile      = 1 << 20
	maxChain     = 16
)

// Reasons for which the files of a CA are refused, in Invalid.Reason.
const (
	ReasonMissing     = "FileMissing"
	ReasonUnreadable  = "FileUnreadable"
	ReasonNotPEM      = "NotPEM"
	ReasonNotCA       = "NotCA"
	ReasonKeyMismatch = "KeyMismatch"
	ReasonWeakKey     = "WeakKey"
	ReasonExpired     = "Expired"
	ReasonNotYetValid = "NotYetValid"
	ReasonChain       = "ChainBroken"
	ReasonTrustDomain = "TrustDomainMismatch"
)

// Invalid says what is wrong with one file of a CA.
type Invalid struct {
	File, Reason, Message, Remedy string
}

// Error returns the one line shown to users.
func (i *Invalid) Error() string {
	return fmt.Sprintf("CA file %s: %s: %s; %s", i.File, i.Reason, i.Message, i.Remedy)
}

// Config says where the CA is and how long it signs for.
type Config struct {
	// Dir is where files that are made here are kept: the root, unless one is given, and the key of workload tokens.
	Dir string
	// Given is a folder with ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem. Empty: the root is made in Dir.
	Given       string
	TrustDomain mesh.TrustDomain
	// DefaultTTL is the life of a certificate whose request asks for none. Longer: a stolen key is useful for longer;
	// shorter: more signing, and less time to repair a control plane that is down. 0: 24 h.
	DefaultTTL time.Duration
	// MaxTTL caps what requests may ask for. 0: 7 days.
	MaxTTL time.Duration
	Now    func() time.Time // nil: time.Now
	Log    *slog.Logger     // nil: none
}

// key hides a private key from every way of printing: fmt looks through pointers and unexported fields, not into closures.
type key struct{ signer func() crypto.Signer }

const redacted = "[redacted]"

func hide(s crypto.Signer) key { return key{signer: func() crypto.Signer { return s }} }

// String returns [redacted].
func (key) String() string { return redacted }

// Format prints [redacted] for every verb.
func (key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns [redacted].
func (key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns [redacted].
func (key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// CA signs the certificates of one trust domain. It is immutable and safe for concurrent use.
type CA struct {
	config   Config
	domain   spiffeid.TrustDomain
	key      key
	chain    []*x509.Certificate // signer first, root last
	roots    []*x509.Certificate
	rootsPEM []byte
	bundle   *x509bundle.Bundle
	tokens   tokenKey
}

// LoadOrCreate loads the given CA, or the one made here before, or makes one. A file that is there and wrong is an
// error that wraps *Invalid; nothing that exists is ever overwritten.
func LoadOrCreate(c Config) (*CA, error) {
	if c.DefaultTTL == 0 {
		c.DefaultTTL = 24 * time.Hour
	}
	if c.MaxTTL == 0 {
		c.MaxTTL = max(7*24*time.Hour, c.DefaultTTL)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.DefaultTTL < 0 || c.MaxTTL < c.DefaultTTL {
		return nil, fmt.Errorf("CA: the default life of certificates, %s, is not between 0 and the longest, %s", c.DefaultTTL, c.MaxTTL)
	}
	domain, err := spiffeid.TrustDomainFromString(string(c.TrustDomain))
	if err != nil || domain.Name() != string(c.TrustDomain) {
		return nil, fmt.Errorf("CA: %q is not a trust domain: use lower case letters, digits, dots and hyphens", c.TrustDomain)
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("CA: make folder: %w", err)
	}
	ca := &CA{config: c, domain: domain}
	if c.Given != "" {
		err = ca.loadGiven()
	} else {
		err = ca.loadOwn()
	}
	if err != nil {
		return nil, err
	}
	for _, r := range ca.roots {
		ca.rootsPEM = append(ca.rootsPEM, encodeCert(r)...)
	}
	ca.bundle = x509bundle.FromX509Authorities(domain, ca.roots)
	if ca.tokens, err = loadTokenKey(filepath.Join(c.Dir, tokenKeyFile)); err != nil {
		return nil, err
	}
	if left := ca.Expires().Sub(c.Now()); left < 30*24*time.Hour {
		c.Log.Warn("the CA expires soon; rotate it", "expires", ca.Expires(), "trustDomain", string(c.TrustDomain))
	}
	return ca, nil
}

// TrustDomain returns the trust domain that the CA signs for.
func (ca *CA) TrustDomain() mesh.TrustDomain { return ca.config.TrustDomain }

// Roots returns the roots in PEM: the trust domain's bundle.
func (ca *CA) Roots() []byte { return bytes.Clone(ca.rootsPEM) }

// Chain returns what signs, signer first and root last.
func (ca *CA) Chain() []*x509.Certificate { return slices.Clone(ca.chain) }

// Root returns the root at the end of the chain. Every certificate that Issue makes carries it, so a join token may pin it.
func (ca *CA) Root() *x509.Certificate { return ca.chain[len(ca.chain)-1] }

// Expires says when the first certificate of the chain ends.
func (ca *CA) Expires() time.Time {
	out := ca.chain[0].NotAfter
	for _, c := range ca.chain[1:] {
		if c.NotAfter.Before(out) {
			out = c.NotAfter
		}
	}
	return out
}

// String names the CA without its key.
func (ca *CA) String() string { return "CA of " + string(ca.config.TrustDomain) }

const remedyGiven = "put a matching set of ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem there, as for Istio's cacerts"

func (ca *CA) loadGiven() error {
	file := func(name string) string { return filepath.Join(ca.config.Given, name) }
	certs, err := readCerts(file(givenCert), remedyGiven)
	if err != nil {
		return err
	}
	signer, err := readKey(file(givenKey), remedyGiven)
	if err != nil {
		return err
	}
	if ca.roots, err = readCerts(file(givenRoot), remedyGiven); err != nil {
		return err
	}
	between, err := readCerts(file(givenChain), remedyGiven)
	if err != nil {
		return err
	}
	if err := ca.check(file(givenCert), certs[0], remedyGiven); err != nil {
		return err
	}
	if err := matches(file(givenKey), certs[0], signer, remedyGiven); err != nil {
		return err
	}
	if ca.roots, err = ca.usable(file(givenRoot), ca.roots); err != nil {
		return err
	}
	for _, c := range between {
		if err := ca.check(file(givenChain), c, remedyGiven); err != nil {
			return err
		}
	}
	chains, err := certs[0].Verify(x509.VerifyOptions{
		Roots: pool(ca.roots), Intermediates: pool(between), CurrentTime: ca.config.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return &Invalid{File: file(givenChain), Reason: ReasonChain, Message: fmt.Sprintf("%s does not lead from %s to a root in %s: %v", givenChain, givenCert, givenRoot, err), Remedy: remedyGiven}
	}
	ca.chain, ca.key = chains[0], hide(signer)
	return nil
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

func (ca *CA) loadOwn() error {
	certFile, keyFile := filepath.Join(ca.config.Dir, rootCertFile), filepath.Join(ca.config.Dir, rootKeyFile)
	remedy := "restore it from a backup; or, to start a new trust domain that peers must be told about, remove " + rootCertFile + " and " + rootKeyFile
	haveCert, haveKey := exists(certFile), exists(keyFile)
	if haveCert && !haveKey {
		return &Invalid{File: keyFile, Reason: ReasonMissing, Message: "the root certificate is there, its key is not", Remedy: remedy}
	}
	if !haveKey {
		signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return fmt.Errorf("CA: make root key: %w", err)
		}
		if err := writeKey(keyFile, signer); err != nil {
			return err
		}
	}
	signer, err := readKey(keyFile, remedy)
	if err != nil {
		return err
	}
	if !haveCert { // also after a crash between the two files
		der, err := ca.makeRoot(signer)
		if err != nil {
			return err
		}
		if err := writeFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
			return err
		}
		ca.config.Log.Info("made a root certificate", "file", certFile, "trustDomain", string(ca.config.TrustDomain))
	}
	if ca.roots, err = readCerts(certFile, remedy); err != nil {
		return err
	}
	if err := ca.check(certFile, ca.roots[0], remedy); err != nil {
		return err
	}
	if err := matches(keyFile, ca.roots[0], signer, remedy); err != nil {
		return err
	}
	if info, err := os.Stat(keyFile); err == nil && info.Mode().Perm()&0o077 != 0 {
		ca.config.Log.Warn("the root key is readable by others; run chmod 600", "file", keyFile, "mode", info.Mode().Perm().String())
	}
	ca.chain, ca.key = ca.roots[:1], hide(signer)
	return nil
}

func (ca *CA) makeRoot(signer crypto.Signer) ([]byte, error) {
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	now := ca.config.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{Organization: []string{"Isthmus"}, CommonName: "root of " + string(ca.config.TrustDomain)},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(rootLifetime), URIs: []*url.URL{ca.domain.ID().URL()},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, signer.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("CA: make root certificate: %w", err)
	}
	return der, nil
}

// check says whether a certificate may be part of a CA now.
func (ca *CA) check(file string, c *x509.Certificate, remedy string) error {
	bad := func(reason, format string, args ...any) error {
		return &Invalid{File: file, Reason: reason, Message: fmt.Sprintf("certificate %q ", c.Subject) + fmt.Sprintf(format, args...), Remedy: remedy}
	}
	now := ca.config.Now()
	switch {
	case !c.IsCA || !c.BasicConstraintsValid:
		return bad(ReasonNotCA, "is not that of a CA (basic constraints)")
	case c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0:
		return bad(ReasonNotCA, "may not sign certificates (key usage)")
	case now.After(c.NotAfter):
		return bad(ReasonExpired, "expired at %s", c.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(c.NotBefore):
		return bad(ReasonNotYetValid, "is valid from %s, and by this machine's clock it is %s", c.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if err := checkKey(c.PublicKey); err != nil {
		return bad(ReasonWeakKey, "has a weak key: %v", err)
	}
	for _, u := range c.URIs {
		if id, err := spiffeid.FromURI(u); err == nil && id.TrustDomain() != ca.domain {
			return bad(ReasonTrustDomain, "is of trust domain %s, not of %s", id.TrustDomain().Name(), ca.domain.Name())
		}
	}
	return nil
}

// checkKey accepts RSA of 2048 to 8192 bits, ECDSA P-256 and P-384, and Ed25519.
func checkKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 8192 {
			return fmt.Errorf("RSA of %d bits; 2048 to 8192 are accepted", n)
		}
		return nil
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return fmt.Errorf("ECDSA on %s; P-256 and P-384 are accepted", k.Curve.Params().Name)
		}
		return nil
	case ed25519.PublicKey:
		return nil
	}
	return fmt.Errorf("a key of kind %T; RSA, ECDSA and Ed25519 are accepted", pub)
}

func matches(file string, c *x509.Certificate, signer crypto.Signer, remedy string) error {
	if pub, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); ok && pub.Equal(c.PublicKey) {
		return nil
	}
	return &Invalid{File: file, Reason: ReasonKeyMismatch, Message: fmt.Sprintf("the key does not belong to certificate %q", c.Subject), Remedy: remedy}
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

func encodeCert(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func serialNumber() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("CA: no randomness: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}
