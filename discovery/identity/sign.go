package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxCSR is the largest certificate request, in bytes of PEM.
const MaxCSR = 16 << 10

// ErrCSR is wrapped by every error about a certificate request.
var ErrCSR = errors.New("certificate request refused")

// Sign makes a certificate for id with the public key of a certificate request in PEM. Nothing else of the request is
// used: the identity is what the caller of Sign says. ttl 0 means the default; a longer one than allowed is cut. It
// returns the chain in PEM, leaf first and root last.
func (ca *CA) Sign(csr []byte, id string, ttl time.Duration) ([]string, error) {
	pub, err := parseCSR(csr)
	if err != nil {
		return nil, err
	}
	by := ca.Authority()
	leaf, err := ca.sign(by, pub, id, nil, ttl)
	if err != nil {
		return nil, err
	}
	out := []string{string(encodeCert(leaf))}
	for _, c := range by.presented() {
		out = append(out, string(encodeCert(c)))
	}
	return out, nil
}

// parseCSR returns the public key of a request that is signed by it.
func parseCSR(data []byte) (crypto.PublicKey, error) {
	if len(data) > MaxCSR {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are allowed", ErrCSR, len(data), MaxCSR)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
		return nil, fmt.Errorf("%w: it is not a certificate request in PEM", ErrCSR)
	}
	if strings.TrimSpace(string(rest)) != "" {
		return nil, fmt.Errorf("%w: there is more than one request", ErrCSR)
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCSR, err)
	}
	if err := checkKey(csr.PublicKey); err != nil { // before the signature: checking one of a huge key is costly
		return nil, fmt.Errorf("%w: %w", ErrCSR, err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: it is not signed by its own key: %w", ErrCSR, err)
	}
	return csr.PublicKey, nil
}

// Issue makes a key and a certificate for id, for this process's own use. The chain includes the root.
func (ca *CA) Issue(id string, dns []string, ttl time.Duration) (tls.Certificate, error) {
	return ca.issue(ca.Authority(), id, dns, ttl)
}

func (ca *CA) issue(by *Authority, id string, dns []string, ttl time.Duration) (tls.Certificate, error) {
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make key for %s: %w", id, err)
	}
	leaf, err := ca.sign(by, &own.PublicKey, id, dns, ttl)
	if err != nil {
		return tls.Certificate{}, err
	}
	out := tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: own, Leaf: leaf}
	for _, c := range by.presented() {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out, nil
}

func (ca *CA) sign(by *Authority, pub crypto.PublicKey, id string, dns []string, ttl time.Duration) (*x509.Certificate, error) {
	sid, err := spiffeid.FromString(id)
	if err != nil || sid.TrustDomain() != ca.domain || sid.Path() == "" {
		return nil, fmt.Errorf("sign a certificate for %.256q: it is not an identity of trust domain %s", id, ca.domain.Name())
	}
	if ttl <= 0 {
		ttl = ca.config.DefaultTTL
	}
	now := ca.config.Now()
	until := now.Add(min(ttl, ca.config.MaxTTL))
	if end := by.expires(); until.After(end) {
		until = end
	}
	if !until.After(now) {
		return nil, fmt.Errorf("sign a certificate for %s: the CA expired at %s; rotate it", id, by.expires().UTC().Format(time.RFC3339))
	}
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	usage := x509.KeyUsageDigitalSignature
	if _, ok := pub.(*rsa.PublicKey); ok {
		usage |= x509.KeyUsageKeyEncipherment
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, NotBefore: now.Add(-backdate), NotAfter: until, URIs: []*url.URL{sid.URL()}, DNSNames: dns,
		KeyUsage: usage, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.chain[0], pub, by.key.signer())
	if err != nil {
		return nil, fmt.Errorf("sign a certificate for %s: %w", id, err)
	}
	return x509.ParseCertificate(der)
}

// Rotating is a certificate of this process's own that is renewed when half of its life is over, or when another
// authority signs, by whoever asks for it then. It is safe for concurrent use.
type Rotating struct {
	ca  *CA
	id  string
	dns []string
	ttl time.Duration

	mu      sync.Mutex
	current *tls.Certificate
	by      *Authority
	renew   time.Time
}

// Rotating returns a certificate for id that renews itself; ttl 0 means the default. It makes the first one at once, so
// that a wrong id shows here.
func (ca *CA) Rotating(id string, dns []string, ttl time.Duration) (*Rotating, error) {
	r := &Rotating{ca: ca, id: id, dns: dns, ttl: ttl}
	_, err := r.Certificate()
	return r, err
}

// Certificate returns the current certificate. A renewal that fails leaves the old one in use for as long as it is valid.
func (r *Rotating) Certificate() (*tls.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now, by := r.ca.config.Now(), r.ca.Authority()
	if r.current != nil && r.by == by && now.Before(r.renew) {
		return r.current, nil
	}
	next, err := r.ca.issue(by, r.id, r.dns, r.ttl)
	if err != nil {
		if r.current != nil && now.Before(r.current.Leaf.NotAfter) {
			r.ca.config.Log.Warn("could not renew own certificate, the old one stays in use", "id", r.id, "until", r.current.Leaf.NotAfter, "err", err)
			r.renew = now.Add(r.current.Leaf.NotAfter.Sub(now) / 2)
			return r.current, nil
		}
		return nil, err
	}
	r.current, r.by, r.renew = &next, by, now.Add(next.Leaf.NotAfter.Sub(now)/2)
	return r.current, nil
}

// GetCertificate is for tls.Config of a server.
func (r *Rotating) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return r.Certificate()
}

// GetClientCertificate is for tls.Config of a client.
func (r *Rotating) GetClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return r.Certificate()
}
