// Package ca keeps the workload's certificate: it makes the key, has it signed, renews it at half of its life and keeps
// the last good one meanwhile. How a request is signed, and who watches the certificate, it does not know.
package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	mrand "math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/upstream"
)

// StateFile is the name of the file, in Config.Dir, that holds key and certificate of a machine.
const StateFile = "identity.pem"

// MaxChain is the most certificates accepted in a chain.
const MaxChain = 10

// KeyPEM is a private key. It prints as [redacted].
type KeyPEM []byte

// String hides the key.
func (KeyPEM) String() string { return "[redacted]" }

// GoString hides the key.
func (KeyPEM) GoString() string { return "[redacted]" }

// LogValue hides the key.
func (KeyPEM) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// Certificate is one signed key. It is immutable.
type Certificate struct {
	TLS   tls.Certificate
	Leaf  *x509.Certificate
	Chain []byte // PEM, leaf first, without the root
	Key   KeyPEM // PEM, PKCS #8
}

// Valid reports whether the certificate may be used at t.
func (c *Certificate) Valid(t time.Time) bool {
	return c != nil && !t.Before(c.Leaf.NotBefore.Add(-time.Minute)) && t.Before(c.Leaf.NotAfter)
}

// Sign has a certificate request (PEM) signed for ttl; current is the certificate to authenticate with, or nil. The
// answer is a chain of PEM certificates, leaf first.
type Sign func(ctx context.Context, csr []byte, ttl time.Duration, current *Certificate) ([]string, error)

// Config is what a Manager needs.
type Config struct {
	ID    string        // the SPIFFE id that the certificate must carry
	TTL   time.Duration // asked for; the CA may give less
	Sign  Sign
	Roots func() (*x509.CertPool, error) // the certificate must verify against them
	Dir   string                         // where key and certificate are kept over a restart; empty: in memory only
	Log   *slog.Logger
	// GraceRatio is the part of the certificate's life that is left when it is renewed; 0 means 0.5. More renews more
	// often, less leaves less time to a control plane that is away.
	GraceRatio float64
}

// Manager keeps one certificate. It is safe for concurrent use.
type Manager struct {
	c       Config
	mu      sync.Mutex
	current *Certificate
	changed chan struct{}
	renew   chan struct{} // holds one: renew now
}

// New returns a Manager, with the certificate kept in Config.Dir if there is a good one. It starts nothing.
func New(c Config) (*Manager, error) {
	if c.GraceRatio <= 0 || c.GraceRatio >= 1 {
		c.GraceRatio = 0.5
	}
	m := &Manager{c: c, changed: make(chan struct{}), renew: make(chan struct{}, 1)}
	if c.Dir == "" {
		return m, nil
	}
	path := filepath.Join(c.Dir, StateFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read kept certificate: %w", err)
	}
	cert, err := parseState(data)
	if err != nil {
		return nil, fmt.Errorf("kept certificate %s: %w", path, err)
	}
	m.current = cert
	return m, nil
}

// Current returns the newest certificate, nil before the first, and a channel that is closed when it is outdated.
func (m *Manager) Current() (*Certificate, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current, m.changed
}

// TLS returns the newest certificate for a TLS client, or nil.
func (m *Manager) TLS() *tls.Certificate {
	if c, _ := m.Current(); c != nil {
		return &c.TLS
	}
	return nil
}

// Ready reports whether there is a certificate that has not expired.
func (m *Manager) Ready() bool {
	c, _ := m.Current()
	return c.Valid(time.Now())
}

// Run obtains and renews until ctx ends; it then returns nil.
func (m *Manager) Run(ctx context.Context) error {
	var since time.Time // CAs date certificates back, which is no part of their life here
	for attempt := 0; ; {
		wait := time.Duration(0)
		current, _ := m.Current()
		switch {
		case attempt > 0:
			wait = upstream.Backoff(attempt-1, 200*time.Millisecond, 10*time.Second, mrand.Float64())
		case current != nil:
			from := current.Leaf.NotBefore
			if since.After(from) {
				from = since
			}
			wait = time.Until(RenewAt(from, current.Leaf.NotAfter, m.c.GraceRatio, mrand.Float64()))
		}
		timer := time.NewTimer(max(0, wait))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-m.renew:
			timer.Stop()
		}
		cert, err := m.obtain(ctx, current)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			attempt++
			m.c.Log.Warn("certificate not obtained", "attempt", attempt, "err", err)
			continue
		}
		attempt, since = 0, time.Now()
		m.c.Log.Info("certificate obtained", "id", m.c.ID, "serial", cert.Leaf.SerialNumber.Text(16), "expires", cert.Leaf.NotAfter)
		m.set(cert)
	}
}

// Renew has Run get another certificate now: this one is good, and will not be for as long as it says.
func (m *Manager) Renew() {
	select {
	case m.renew <- struct{}{}:
	default:
	}
}

// Obtain gets one certificate now and keeps it.
func (m *Manager) Obtain(ctx context.Context) error {
	current, _ := m.Current()
	cert, err := m.obtain(ctx, current)
	if err == nil {
		m.set(cert)
	}
	return err
}

func (m *Manager) set(cert *Certificate) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.current = cert
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *Manager) obtain(ctx context.Context, current *Certificate) (*Certificate, error) {
	key, csr, err := NewRequest(m.c.ID)
	if err != nil {
		return nil, err
	}
	if !current.Valid(time.Now()) {
		current = nil
	}
	chain, err := m.c.Sign(ctx, csr, m.c.TTL, current)
	if err != nil {
		return nil, err
	}
	roots, err := m.c.Roots()
	if err != nil {
		return nil, err
	}
	cert, err := Accept(chain, key, m.c.ID, roots)
	if err != nil {
		return nil, fmt.Errorf("certificate from the control plane: %w", err)
	}
	if m.c.Dir != "" {
		if err := Save(m.c.Dir, cert); err != nil {
			return nil, err
		}
	}
	return cert, nil
}

// RenewAt returns when a certificate is renewed: when ratio of its life is left, a tenth of its life earlier or later
// so that a fleet started at once spreads. random is in [0, 1).
func RenewAt(notBefore, notAfter time.Time, ratio, random float64) time.Time {
	life := notAfter.Sub(notBefore)
	left := ratio + (random-0.5)*0.1
	return notAfter.Add(-time.Duration(left * float64(life)))
}

// NewRequest makes an ECDSA P-256 key and a PEM certificate request for the SPIFFE id; an empty id leaves the name to
// the CA.
func NewRequest(id string) (crypto.Signer, []byte, error) {
	var template x509.CertificateRequest
	if id != "" {
		uri, err := url.Parse(id)
		if err != nil {
			return nil, nil, fmt.Errorf("identity %q: %w", id, err)
		}
		template.URIs = []*url.URL{uri}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate request: %w", err)
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// Accept checks a signed chain: it is for our key and identity and verifies against roots. An empty id takes any one
// SPIFFE id.
func Accept(chain []string, key crypto.Signer, id string, roots *x509.CertPool) (*Certificate, error) {
	var certs []*x509.Certificate
	for _, text := range chain {
		for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
			if block.Type != "CERTIFICATE" {
				continue
			}
			if len(certs) == MaxChain {
				return nil, fmt.Errorf("over %d certificates", MaxChain)
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, err
			}
			certs = append(certs, cert)
		}
	}
	if len(certs) == 0 {
		return nil, errors.New("empty")
	}
	leaf := certs[0]
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(leaf.PublicKey) {
		return nil, errors.New("made for another key")
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].Scheme != "spiffe" || id != "" && leaf.URIs[0].String() != id {
		return nil, fmt.Errorf("identity %v, wanted %s", leaf.URIs, id)
	}
	between := x509.NewCertPool()
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return nil, err
	}
	out := &Certificate{Leaf: leaf}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	out.Key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	out.TLS = tls.Certificate{PrivateKey: key, Leaf: leaf}
	for i, c := range certs {
		if i > 0 && bytes.Equal(c.RawSubject, c.RawIssuer) {
			continue // the root; peers have it
		}
		out.TLS.Certificate = append(out.TLS.Certificate, c.Raw)
		out.Chain = append(out.Chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out, nil
}

// Save writes key and certificate into dir as one file, so that a crash cannot leave halves of two.
func Save(dir string, cert *Certificate) error {
	return WriteFile(filepath.Join(dir, StateFile), append(bytes.Clone(cert.Key), cert.Chain...), 0o600)
}

func parseState(data []byte) (*Certificate, error) {
	pair, err := tls.X509KeyPair(data, data)
	if err != nil {
		return nil, err
	}
	cert := &Certificate{TLS: pair, Leaf: pair.Leaf}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			cert.Chain = append(cert.Chain, pem.EncodeToMemory(block)...)
		} else {
			cert.Key = pem.EncodeToMemory(block)
		}
	}
	return cert, nil
}

// WriteFile replaces the file as a whole: readers see the old or the new content.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
