// Package catest is a control plane for tests: a certificate authority, its signing service and a TLS port.
package catest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	securityv1alpha1 "istio.io/api/security/v1alpha1"
)

// Authority signs certificates.
type Authority struct {
	Cert   *x509.Certificate
	PEM    []byte
	key    *ecdsa.PrivateKey
	serial atomic.Int64
}

// New makes a root.
func New(t testing.TB) *Authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	a := &Authority{key: key, PEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
	a.serial.Store(1)
	if a.Cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

// Pool returns the root as a pool.
func (a *Authority) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.Cert)
	return p
}

// RootFile writes the root into a file of the test.
func (a *Authority) RootFile(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "root-cert.pem")
	if err := os.WriteFile(path, a.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Sign signs a PEM request for the identity and returns leaf and root.
func (a *Authority) Sign(csr []byte, id string, ttl time.Duration) ([]string, error) {
	block, _ := pem.Decode(csr)
	if block == nil {
		return nil, errors.New("no request")
	}
	r, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	uri, err := url.Parse(id)
	if err != nil {
		return nil, err
	}
	leaf, err := a.leaf(r.PublicKey, ttl, []*url.URL{uri}, nil)
	if err != nil {
		return nil, err
	}
	return []string{string(leaf), string(a.PEM)}, nil
}

// leaf is backdated by a minute as those of isthmusd are.
func (a *Authority) leaf(public any, ttl time.Duration, uris []*url.URL, names []string) ([]byte, error) {
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(a.serial.Add(1)), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(ttl), URIs: uris, DNSNames: names,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, a.Cert, public, a.key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// Server is the control plane's TLS port.
type Server struct {
	securityv1alpha1.UnimplementedIstioCertificateServiceServer
	*Authority
	Address string
	ID      string        // what it signs for
	Token   string        // what it takes
	TTL     time.Duration // overrides the one asked for when set
	Tokens  atomic.Int64  // requests with the token
	Certs   atomic.Int64  // requests with a certificate
	grpc    *grpc.Server
}

// Serve listens on a free loopback port until the test ends; register adds services.
func (a *Authority) Serve(t testing.TB, name, id, token string, register func(*grpc.Server)) *Server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := a.leaf(&key.PublicKey, time.Hour, nil, []string{name})
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(leaf)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Authority: a, Address: l.Addr().String(), ID: id, Token: token}
	s.grpc = grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{block.Bytes}, PrivateKey: key}}, MinVersion: tls.VersionTLS13,
		ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: a.Pool(), SessionTicketsDisabled: true,
	})))
	securityv1alpha1.RegisterIstioCertificateServiceServer(s.grpc, s)
	if register != nil {
		register(s.grpc)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.grpc.Serve(l)
	}()
	t.Cleanup(func() {
		s.grpc.Stop()
		<-done
	})
	return s
}

// Stop ends the server at once.
func (s *Server) Stop() { s.grpc.Stop() }

// PeerID returns the SPIFFE id of the caller's certificate, "" without one.
func PeerID(ctx context.Context) string {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 || len(info.State.PeerCertificates[0].URIs) == 0 {
		return ""
	}
	return info.State.PeerCertificates[0].URIs[0].String()
}

// CreateCertificate signs for callers with the token or with a certificate of the identity.
func (s *Server) CreateCertificate(ctx context.Context, r *securityv1alpha1.IstioCertificateRequest) (*securityv1alpha1.IstioCertificateResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	switch auth := md.Get("authorization"); {
	case PeerID(ctx) == s.ID:
		s.Certs.Add(1)
	case len(auth) == 1 && auth[0] == "Bearer "+s.Token:
		s.Tokens.Add(1)
	default:
		return nil, status.Error(codes.Unauthenticated, "neither certificate nor token")
	}
	ttl := time.Duration(r.GetValidityDuration()) * time.Second
	if s.TTL > 0 {
		ttl = s.TTL
	}
	chain, err := s.Sign([]byte(r.GetCsr()), s.ID, ttl)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &securityv1alpha1.IstioCertificateResponse{CertChain: chain}, nil
}
