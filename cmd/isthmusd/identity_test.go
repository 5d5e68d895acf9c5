package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// certificate asks for one as an agent does.
func (d *daemonTest) certificate(t *testing.T, token string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), key)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	reply, err := securityv1alpha1.NewIstioCertificateServiceClient(d.dial(t, d.dialOptions(t, token))).CreateCertificate(ctx, &securityv1alpha1.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), ValidityDuration: 3600,
	})
	if err != nil {
		t.Fatal(err)
	}
	out := tls.Certificate{PrivateKey: key}
	for rest := []byte(strings.Join(reply.GetCertChain(), "\n")); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		out.Certificate = append(out.Certificate, block.Bytes)
	}
	if out.Leaf, err = x509.ParseCertificate(out.Certificate[0]); err != nil {
		t.Fatal(err)
	}
	return out
}

// open opens a stream, says who the node is, and returns what the first answer is: nil or the refusal.
func open(t *testing.T, conn *grpc.ClientConn, node *corev3.Node) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	_ = stream.Send(&discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType, ResourceNamesSubscribe: []string{"*"}})
	_, err = stream.Recv()
	return err
}

// TestIdentity is who may do what at the workloads' port.
func TestIdentity(t *testing.T) {
	cfg := testConfig(t, "amber")
	bookstore(t, cfg)
	d := start(t, cfg)
	token := d.workloadToken(t, "default", "productpage", "productpage-1")
	cert := d.certificate(t, token)
	const id = "spiffe://amber.mesh/ns/default/sa/productpage"
	if len(cert.Leaf.URIs) != 1 || cert.Leaf.URIs[0].String() != id {
		t.Fatalf("certificate of %v, want %s", cert.Leaf.URIs, id)
	}
	if left := time.Until(cert.Leaf.NotAfter); left > time.Hour+time.Minute {
		t.Errorf("an hour was asked for, it lives %v", left)
	}

	p := connect(t, d, sidecar(t, cfg, "productpage", "default"), d.dialOptions(t, "", cert), nil)
	p.waitFor(t, xds.ClusterType, reviewsAll, nil)
	if got := d.status(t).Proxies; len(got) != 1 || got[0].Identity != id {
		t.Errorf("proxies %+v, want one that is %s", got, id)
	}

	// Another control plane, of the same names, knows none of this.
	foreignCfg := testConfig(t, "amber")
	foreign := start(t, foreignCfg)
	foreignToken := foreign.workloadToken(t, "default", "productpage", "productpage-1")
	foreignCert := foreign.certificate(t, foreignToken)

	node := sidecar(t, cfg, "productpage", "default")
	other := sidecar(t, cfg, "vault", "secrets")
	for name, c := range map[string]struct {
		options []grpc.DialOption
		node    *corev3.Node
		code    codes.Code
		text    string
	}{
		"token":                             {d.dialOptions(t, token), node, codes.OK, ""},
		"certificate":                       {d.dialOptions(t, "", cert), node, codes.OK, ""},
		"nothing":                           {d.dialOptions(t, ""), node, codes.Unauthenticated, "no credentials"},
		"no token":                          {d.dialOptions(t, "nonsense"), node, codes.Unauthenticated, "token"},
		"token of another cluster":          {d.dialOptions(t, foreignToken), node, codes.Unauthenticated, "token"},
		"certificate of another cluster":    {d.dialOptions(t, "", foreignCert), node, codes.Unavailable, ""},
		"token for another namespace":       {d.dialOptions(t, token), other, codes.PermissionDenied, "of another namespace"},
		"certificate for another namespace": {d.dialOptions(t, "", cert), other, codes.PermissionDenied, "of another namespace"},
		"no node":                           {d.dialOptions(t, token), nil, codes.InvalidArgument, "node"},
	} {
		t.Run(name, func(t *testing.T) {
			err := open(t, d.dial(t, c.options), c.node)
			if got := status.Code(err); got != c.code || c.text != "" && !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %s with %q", err, c.code, c.text)
			}
		})
	}
	t.Run("no certificate without credentials", func(t *testing.T) {
		_, err := securityv1alpha1.NewIstioCertificateServiceClient(d.dial(t, d.dialOptions(t, ""))).CreateCertificate(t.Context(), &securityv1alpha1.IstioCertificateRequest{Csr: "x"})
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("got %v", err)
		}
	})
	t.Run("plaintext on the port", func(t *testing.T) {
		if err := open(t, d.dial(t, []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}), node); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
	})
}

// TestPeerPort is about what only members may use: without a peer's certificate no session comes about.
func TestPeerPort(t *testing.T) {
	cfg := testConfig(t, "amber")
	d := start(t, cfg)
	workload := d.certificate(t, d.workloadToken(t, "default", "mallory", "mallory"))
	for _, service := range []struct{ name, sni, alpn string }{{"peer", "peer.amber.mesh", "h2"}, {"gossip", "gossip.amber.mesh", alpnGossip}} {
		for name, certs := range map[string][]tls.Certificate{"without certificate": nil, "with a workload's": {workload}} {
			t.Run(service.name+" "+name, func(t *testing.T) {
				if err := session(d.cfg.Listen, &tls.Config{RootCAs: d.roots(t), ServerName: service.sni, NextProtos: []string{service.alpn}, Certificates: certs}); err == nil {
					t.Error("a session came about")
				} else if !strings.Contains(err.Error(), "remote error: tls") {
					t.Errorf("got %v, want a TLS alert", err)
				}
			})
		}
	}
	for name, c := range map[string]*tls.Config{
		"unknown protocol": {ServerName: "xds.amber.mesh", NextProtos: []string{"http/1.1"}},
		"no protocol":      {ServerName: "xds.amber.mesh"},
		"TLS 1.2":          {ServerName: "xds.amber.mesh", NextProtos: []string{"h2"}, MaxVersion: tls.VersionTLS12},
	} {
		t.Run(name, func(t *testing.T) {
			c.RootCAs = d.roots(t)
			if err := session(d.cfg.Listen, c); err == nil {
				t.Error("a session came about")
			}
		})
	}
}

// session makes a handshake and waits for the server's first byte, since a server judges a client's certificate last.
func session(addr string, cfg *tls.Config) error {
	conn, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if cfg.NextProtos[0] == "h2" {
		fmt.Fprint(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}
