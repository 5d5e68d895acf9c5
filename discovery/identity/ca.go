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
	"sync/atomic"
	"time"

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

// crossCert is a part of a CA that was made here, after a rotation.
const crossCert = "cross-cert.pem"

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
	// shorter: more signing, and less time to repair a control plane that is down. 0: 24 h, or MaxTTL if that is less.
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

// CA signs the certificates of one trust domain. It is safe for concurrent use. Only Use changes it.
type CA struct {
	config Config
	domain spiffeid.TrustDomain
	tokens tokenKey
	state  *atomic.Pointer[state] // by pointer, so that a copy is the same CA
}

// LoadOrCreate loads the given CA, or the one made here before, or makes one. A file that is there and wrong is an
// error that wraps *Invalid; nothing that exists is ever overwritten.
func LoadOrCreate(c Config) (*CA, error) {
	ca, err := prepare(c)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("CA: make folder: %w", err)
	}
	var by *Authority
	if c.Given != "" {
		by, err = ca.loadGiven()
	} else {
		by, err = ca.loadOwn()
	}
	if err != nil {
		return nil, err
	}
	if ca.tokens, err = loadTokenKey(filepath.Join(c.Dir, tokenKeyFile)); err != nil {
		return nil, err
	}
	if err := ca.Use(by, nil); err != nil {
		return nil, err
	}
	return ca, nil
}

// prepare checks c and makes a CA that cannot sign yet.
func prepare(c Config) (*CA, error) {
	if c.DefaultTTL == 0 {
		c.DefaultTTL = 24 * time.Hour
		if c.MaxTTL > 0 {
			c.DefaultTTL = min(c.DefaultTTL, c.MaxTTL)
		}
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
	return &CA{config: c, domain: domain, state: new(atomic.Pointer[state])}, nil
}

// TrustDomain returns the trust domain that the CA signs for.
func (ca *CA) TrustDomain() mesh.TrustDomain { return ca.config.TrustDomain }

// String names the CA without its key.
func (ca *CA) String() string { return "CA of " + string(ca.config.TrustDomain) }

const remedyGiven = "put a matching set of ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem there, as for Istio's cacerts"

func (ca *CA) loadGiven() (*Authority, error) {
	file := func(name string) string { return filepath.Join(ca.config.Given, name) }
	var m Material
	for _, x := range []struct {
		to   *[]byte
		name string
	}{{&m.Cert, givenCert}, {&m.Key, givenKey}, {&m.Root, givenRoot}, {&m.Chain, givenChain}} {
		data, err := readFile(file(x.name), remedyGiven)
		if err != nil {
			return nil, err
		}
		if *x.to = data; len(bytes.TrimSpace(data)) == 0 {
			return nil, &Invalid{File: file(x.name), Reason: ReasonNotPEM, Message: "the file is empty", Remedy: remedyGiven}
		}
	}
	return ca.parse(file, m)
}

func (ca *CA) loadOwn() (*Authority, error) {
	certFile, keyFile := filepath.Join(ca.config.Dir, rootCertFile), filepath.Join(ca.config.Dir, rootKeyFile)
	remedy := "restore it from a backup; or, to start a new trust domain that peers must be told about, remove " + rootCertFile + " and " + rootKeyFile
	haveCert, haveKey := exists(certFile), exists(keyFile)
	if haveCert && !haveKey {
		return nil, &Invalid{File: keyFile, Reason: ReasonMissing, Message: "the root certificate is there, its key is not", Remedy: remedy}
	}
	if !haveKey {
		signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("CA: make root key: %w", err)
		}
		if err := writeKey(keyFile, signer); err != nil {
			return nil, err
		}
	}
	signer, err := readKey(keyFile, remedy)
	if err != nil {
		return nil, err
	}
	if !haveCert { // also after a crash between the two files
		der, err := ca.makeRoot(signer)
		if err != nil {
			return nil, err
		}
		if err := writeFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
			return nil, err
		}
		ca.config.Log.Info("made a root certificate", "file", certFile, "trustDomain", string(ca.config.TrustDomain))
	}
	roots, err := readCerts(certFile, remedy)
	if err != nil {
		return nil, err
	}
	if err := ca.check(certFile, roots[0], remedy); err != nil {
		return nil, err
	}
	if err := matches(keyFile, roots[0], signer, remedy); err != nil {
		return nil, err
	}
	if info, err := os.Stat(keyFile); err == nil && info.Mode().Perm()&0o077 != 0 {
		ca.config.Log.Warn("the root key is readable by others; run chmod 600", "file", keyFile, "mode", info.Mode().Perm().String())
	}
	return &Authority{chain: roots[:1], roots: roots, key: hide(signer)}, nil
}

func (ca *CA) makeRoot(signer crypto.Signer) ([]byte, error) {
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	now := ca.config.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{Organization: []string{"Isthmus"}, CommonName: "root of " + string(ca.config.TrustDomain), SerialNumber: fmt.Sprintf("%x", serial.Uint64()&0xffffffff)},
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
