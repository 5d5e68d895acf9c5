package kubeplane

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// authority signs the certificates of one control plane.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

const lifetime = 7 * 24 * time.Hour // longer than a lab is kept

func newAuthority(name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := template(pkix.Name{CommonName: name})
	t.IsCA, t.BasicConstraintsValid, t.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key, pem: block("CERTIFICATE", der)}, nil
}

func template(subject pkix.Name) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)) // rand.Reader never fails
	now := time.Now()
	return &x509.Certificate{SerialNumber: serial, Subject: subject, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(lifetime)}
}

// issue signs a certificate for a new key. With names or addresses it is a server's, else a client's.
func (a *authority) issue(subject pkix.Name, names []string, addresses []netip.Addr) (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	t := template(subject)
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if len(names)+len(addresses) > 0 {
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	t.DNSNames = names
	for _, addr := range addresses {
		t.IPAddresses = append(t.IPAddresses, net.IP(addr.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, k.Public(), a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("sign the certificate of %s: %w", subject.CommonName, err)
	}
	key, err = keyPEM(k)
	return block("CERTIFICATE", der), key, err
}

func keyPEM(k *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		return nil, err
	}
	return block("EC PRIVATE KEY", der), nil
}

func block(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// writeKeys writes what the programs read: the authority, the API server's certificate and the keys of tokens.
func (p *Plane) writeKeys() error {
	var err error
	if p.ca, err = newAuthority("kubernetes of " + p.cfg.Name); err != nil {
		return err
	}
	caKey, err := keyPEM(p.ca.key)
	if err != nil {
		return err
	}
	names := append([]string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"}, p.cfg.Names...)
	addresses := append([]netip.Addr{p.cfg.Address, netip.MustParseAddr("127.0.0.1")}, p.cfg.Addresses...)
	for _, s := range p.cfg.ServiceCIDRs {
		addresses = append(addresses, s.Masked().Addr().Next()) // of the Service kubernetes
	}
	cert, key, err := p.ca.issue(pkix.Name{CommonName: "kube-apiserver"}, names, addresses)
	if err != nil {
		return err
	}
	client, clientKey, err := p.ca.issue(pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}}, nil, nil)
	if err != nil {
		return err
	}
	tokens, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tokenKey, err := keyPEM(tokens)
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		"ca.crt": p.ca.pem, "ca.key": caKey, "apiserver.crt": cert, "apiserver.key": key, "tokens.key": tokenKey,
		"kubelet-client.crt": client, "kubelet-client.key": clientKey,
	} {
		if err := os.WriteFile(filepath.Join(p.cfg.Dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// KubeletTLS returns what the cluster's kubelets serve with, at these addresses: a certificate of the authority, for the
// API server alone.
func (p *Plane) KubeletTLS(addresses []netip.Addr) (*tls.Config, error) {
	cert, key, err := p.ca.issue(pkix.Name{CommonName: "system:node", Organization: []string{"system:nodes"}}, nil, addresses)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(p.ca.cert)
	return &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		VerifyConnection: func(s tls.ConnectionState) error { // service accounts and users have certificates of it, too
			if name := s.PeerCertificates[0].Subject.CommonName; name != "kube-apiserver-kubelet-client" {
				return fmt.Errorf("%s is not the API server", name)
			}
			return nil
		},
	}, nil
}
