package render

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"time"
)

// throwAway makes certificates that are good for nothing but a look: equal seeds give equal keys, so that a rendering is
// equal each time, and whoever knows the seed knows the keys.
type throwAway struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte // of root
}

// forever is how long they are good: a rendering does not know what time it is.
var forever = [2]time.Time{time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)}

// newThrowAway makes the authority of a trust domain.
func newThrowAway(trustDomain string) (*throwAway, error) {
	key, err := keyFrom("root " + trustDomain)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "throw-away root of " + trustDomain}, NotBefore: forever[0], NotAfter: forever[1],
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(nil, t, t, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make a throw-away root: %w", err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make a throw-away root: %w", err)
	}
	return &throwAway{root: root, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, nil
}

// issue makes a certificate for a SPIFFE id, or for a DNS name, and its key, as PEM.
func (a *throwAway) issue(name string) (cert, key []byte, err error) {
	k, err := keyFrom(name)
	if err != nil {
		return nil, nil, err
	}
	sum := sha256.Sum256([]byte(name))
	t := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(sum[:8]), NotBefore: forever[0], NotAfter: forever[1],
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if u, err := url.Parse(name); err == nil && u.Scheme == "spiffe" {
		t.URIs = []*url.URL{u}
	} else {
		t.Subject.CommonName, t.DNSNames = "throw-away", []string{"localhost"}
	}
	der, err := x509.CreateCertificate(nil, t, a.root, &k.PublicKey, a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("make a throw-away certificate for %s: %w", name, err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, fmt.Errorf("make a throw-away certificate for %s: %w", name, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), nil
}

// keyFrom derives a P-256 key from a seed.
func keyFrom(seed string) (*ecdsa.PrivateKey, error) {
	sum := sha256.Sum256([]byte("isthmus render, good for nothing: " + seed))
	sum[0] &= 0x7f // below the order of the curve
	return ecdsa.ParseRawPrivateKey(elliptic.P256(), sum[:])
}
