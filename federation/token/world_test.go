package token

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
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
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const issuerID = "spiffe://amber.mesh/isthmus/join"

// authority is a CA that signs join certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) authority {
	t.Helper()
	key := ecKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	return authority{cert: sign(t, tmpl, tmpl, &key.PublicKey, key), key: key}
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// leaf returns a server certificate with these URIs, its chain ending with the root.
func (a authority) leaf(t testing.TB, change func(*x509.Certificate), uris ...string) tls.Certificate {
	t.Helper()
	key := ecKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, DNSNames: []string{"join.amber.mesh"},
	}
	for _, u := range uris {
		parsed, err := url.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = append(tmpl.URIs, parsed)
	}
	if change != nil {
		change(tmpl)
	}
	c := sign(t, tmpl, a.cert, &key.PublicKey, a.key)
	return tls.Certificate{Certificate: [][]byte{c.Raw, a.cert.Raw}, PrivateKey: key, Leaf: c}
}

func (a authority) pins() []Pin { return []Pin{PinOf(a.cert)} }

// world is one issuer behind a TLS listener on loopback.
type world struct {
	t      testing.TB
	ca     authority
	key    ed25519.PrivateKey
	grants *Grants
	issuer *Issuer
	addr   string

	mu     sync.Mutex
	clock  time.Duration // how far the issuer's clock is ahead
	reuses int
	admit  func(Grant) error
	admits map[string]int // by key in hex and token
}

func newWorld(t testing.TB) *world {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, ca: newAuthority(t), key: key, grants: NewGrants(new(Memory)), admits: make(map[string]int)}
	w.issuer = w.newIssuer()
	w.addr = w.listen(w.ca.leaf(t, nil, issuerID), w.issuer.Serve)
	return w
}

func (w *world) newIssuer() *Issuer {
	w.t.Helper()
	result := func(g Grant) (*federationv1.JoinResult, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.admit != nil {
			if err := w.admit(g); err != nil {
				return nil, err
			}
		}
		for _, r := range g.Redemptions {
			w.admits[g.ID+string(r.Key)]++
		}
		return &federationv1.JoinResult{Pending: !g.AutoApprove}, nil
	}
	issuer, err := NewIssuer(IssuerConfig{
		TrustDomain: "amber.mesh", Key: w.key, Grants: w.grants, Now: w.now,
		VerifyRecord: func(r *federationv1.Record, pub ed25519.PublicKey) error {
			if !ed25519.Verify(pub, r.GetBody(), r.GetSignature()) {
				return errors.New("wrong signature")
			}
			return nil
		},
		AdmitCluster: func(_ context.Context, g Grant, _ *federationv1.ClusterJoin) (*federationv1.JoinResult, error) {
			return result(g)
		},
		AdmitMachine: func(_ context.Context, g Grant, _ *federationv1.MachineJoin) (*federationv1.JoinResult, error) {
			return result(g)
		},
		OnReuse: func(Grant, Redemption) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.reuses++
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return issuer
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.clock)
}

// set changes the world while connections are served.
func (w *world) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

// listen serves TLS with cert on loopback until the test ends.
func (w *world) listen(cert tls.Certificate, serve func(context.Context, *tls.Conn)) string {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				serve(ctx, tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{ALPN}, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true}))
			})
		}
	})
	w.t.Cleanup(func() {
		cancel()
		_ = l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// issue makes a token for cluster birch and stores its grant.
func (w *world) issue(change func(*IssueConfig)) (string, Grant) {
	w.t.Helper()
	c := IssueConfig{Kind: Cluster, TrustDomain: "amber.mesh", Key: w.key, Pins: w.ca.pins(), Endpoints: []string{w.addr}, Subject: "birch"}
	if change != nil {
		change(&c)
	}
	token, grant, err := Issue(c)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.grants.Put(grant); err != nil {
		w.t.Fatal(err)
	}
	return token, grant
}

func (w *world) issueVM(change func(*IssueConfig)) (string, Grant) {
	w.t.Helper()
	return w.issue(func(c *IssueConfig) {
		c.Kind, c.Machine = VM, &Machine{Name: "ratings", Namespace: "default", ServiceAccount: "ratings", Ports: map[string]uint32{"http": 9080}}
		if change != nil {
			change(c)
		}
	})
}

func (w *world) redeem(token string, body proto.Message) (*federationv1.JoinResult, error) {
	return Redeem(context.Background(), token, RedeemConfig{Body: body})
}

func (w *world) stored(id string) Grant {
	w.t.Helper()
	g, err := w.grants.Get(id)
	if err != nil {
		w.t.Fatal(err)
	}
	return g
}

func clusterJoin(t testing.TB, name string) *federationv1.ClusterJoin {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	body, err := proto.Marshal(&federationv1.Cluster{TrustDomain: name + ".mesh", FederationKey: pub})
	if err != nil {
		t.Fatal(err)
	}
	return &federationv1.ClusterJoin{Name: name, Cluster: &federationv1.Record{Origin: name, Kind: "cluster", Body: body, Signature: ed25519.Sign(key, body)}}
}

func machineJoin(t testing.TB, host string) *federationv1.MachineJoin {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, ecKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return &federationv1.MachineJoin{Hostname: host, CsrPem: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))}
}
