package trust

import (
	"bytes"
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
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB, name string) authority {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	return authority{cert: create(t, tmpl, tmpl, key, key), key: key}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func create(t testing.TB, tmpl, parent *x509.Certificate, own, signer *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &own.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (a authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func (a authority) leaf(t testing.TB, change func(*x509.Certificate), uris ...string) tls.Certificate {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
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
	c := create(t, tmpl, a.cert, key, a.key)
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key, Leaf: c}
}

func local(c tls.Certificate) Local { return func() (*tls.Certificate, error) { return &c, nil } }

const (
	amberPeer = "spiffe://amber.mesh/isthmus/peer"
	birchPeer = "spiffe://birch.mesh/isthmus/peer"
)

// handshake runs TLS between the two and returns what each side says.
func handshake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error, cs tls.ConnectionState) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // not net.Pipe: both sides may write at once
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	_, _ = a.SetDeadline(deadline), b.SetDeadline(deadline)
	s, c := tls.Server(a, server), tls.Client(b, client)
	done := make(chan error, 1)
	go func() {
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte("x")) // the client of TLS 1.3 learns of a refusal when it reads
		}
		_ = a.Close()
		done <- err
	}()
	clientErr = c.Handshake()
	if clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1))
	}
	cs = c.ConnectionState()
	_ = b.Close()
	return <-done, clientErr, cs
}

func TestMutual(t *testing.T) {
	amber, birch := newAuthority(t, "amber"), newAuthority(t, "birch")
	var bundles Bundles
	both := map[mesh.TrustDomain][]byte{"amber.mesh": amber.pem(), "birch.mesh": birch.pem()}
	if err := bundles.Set(both); err != nil {
		t.Fatal(err)
	}
	side := func(a authority, id string) Config {
		return Config{Local: local(a.leaf(t, nil, id)), Bundles: &bundles, Authorize: Path("/isthmus/peer")}
	}
	cases := map[string]struct {
		client authority
		change func(*x509.Certificate)
		uris   []string
		want   string // empty: accepted
	}{
		"peer":           {birch, nil, []string{birchPeer}, ""},
		"own":            {amber, nil, []string{amberPeer}, ""},
		"workload":       {birch, nil, []string{"spiffe://birch.mesh/ns/default/sa/default"}, "not wanted"},
		"other's domain": {birch, nil, []string{amberPeer}, "not trusted"},
		"unknown domain": {birch, nil, []string{"spiffe://cedar.mesh/isthmus/peer"}, "no trust bundle"},
		"two URIs":       {birch, nil, []string{birchPeer, amberPeer}, "more than one URI"},
		"no URI":         {birch, nil, nil, "no URI"},
		"https":          {birch, nil, []string{"https://birch.mesh/isthmus/peer"}, "not trusted"},
		"query":          {birch, nil, []string{birchPeer + "?x=1"}, "not trusted"},
		"port":           {birch, nil, []string{"spiffe://birch.mesh:1/isthmus/peer"}, "not trusted"},
		"DNS SAN":        {birch, func(c *x509.Certificate) { c.DNSNames = []string{birchPeer} }, nil, "no URI"},
		"no EKU":         {birch, func(c *x509.Certificate) { c.ExtKeyUsage = nil }, []string{birchPeer}, "not made for"},
		"server only":    {birch, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, []string{birchPeer}, "not made for"},
		"CA flag":        {birch, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }, []string{birchPeer}, "CA flag"},
		"signs":          {birch, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, []string{birchPeer}, "KeyCertSign"},
		"expired":        {birch, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, []string{birchPeer}, "expired"},
		"not yet valid":  {birch, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }, []string{birchPeer}, "not yet valid"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			client := Config{Local: local(c.client.leaf(t, c.change, c.uris...)), Bundles: &bundles, Authorize: Exactly(amberPeer)}
			serverErr, clientErr, cs := handshake(t, ServerConfig(side(amber, amberPeer)), ClientConfig(client))
			if c.want == "" {
				if serverErr != nil || clientErr != nil {
					t.Fatalf("server %v, client %v", serverErr, clientErr)
				}
				if id, err := PeerID(cs); err != nil || id.String() != amberPeer || cs.Version != tls.VersionTLS13 {
					t.Errorf("peer %s, %v, version %x", id, err, cs.Version)
				}
				return
			}
			if serverErr == nil || !strings.Contains(serverErr.Error(), c.want) || clientErr == nil {
				t.Errorf("server %v, client %v, want %q", serverErr, clientErr, c.want)
			}
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		client := Config{Bundles: &bundles, Authorize: Path("/isthmus/peer")}
		if serverErr, _, _ := handshake(t, ServerConfig(side(amber, amberPeer)), ClientConfig(client)); serverErr == nil {
			t.Error("let in")
		}
		optional := side(amber, amberPeer)
		optional.Optional = true
		if serverErr, clientErr, _ := handshake(t, ServerConfig(optional), ClientConfig(client)); serverErr != nil || clientErr != nil {
			t.Errorf("optional: %v, %v", serverErr, clientErr)
		}
		client.Local = local(birch.leaf(t, nil, amberPeer))
		if serverErr, _, _ := handshake(t, ServerConfig(optional), ClientConfig(client)); !errors.Is(serverErr, ErrUntrusted) {
			t.Errorf("optional, but wrong: %v", serverErr)
		}
	})
	t.Run("server is another", func(t *testing.T) {
		client := side(birch, birchPeer)
		client.Authorize = Exactly("spiffe://cedar.mesh/isthmus/peer")
		if _, clientErr, _ := handshake(t, ServerConfig(side(amber, amberPeer)), ClientConfig(client)); clientErr == nil || !strings.Contains(clientErr.Error(), "want spiffe://cedar.mesh") {
			t.Errorf("client %v", clientErr)
		}
	})
	t.Run("nobody authorised", func(t *testing.T) {
		server := side(amber, amberPeer)
		server.Authorize = nil
		if serverErr, _, _ := handshake(t, ServerConfig(server), ClientConfig(side(birch, birchPeer))); !errors.Is(serverErr, ErrUntrusted) {
			t.Errorf("server %v", serverErr)
		}
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		client := ClientConfig(side(birch, birchPeer))
		client.MinVersion, client.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		if serverErr, _, _ := handshake(t, ServerConfig(side(amber, amberPeer)), client); serverErr == nil {
			t.Error("spoken")
		}
	})
	t.Run("removed bundle", func(t *testing.T) {
		server, client := ServerConfig(side(amber, amberPeer)), ClientConfig(side(birch, birchPeer))
		client.ClientSessionCache = tls.NewLRUClientSessionCache(4)
		for range 2 {
			if serverErr, clientErr, cs := handshake(t, server, client); serverErr != nil || clientErr != nil || cs.DidResume {
				t.Fatalf("server %v, client %v, resumed %t", serverErr, clientErr, cs.DidResume)
			}
		}
		if err := bundles.Set(map[mesh.TrustDomain][]byte{"amber.mesh": amber.pem()}); err != nil {
			t.Fatal(err)
		}
		if serverErr, _, _ := handshake(t, server, client); !errors.Is(serverErr, ErrNoBundle) {
			t.Errorf("server %v", serverErr)
		}
		if err := bundles.Set(both); err != nil {
			t.Fatal(err)
		}
		if serverErr, clientErr, _ := handshake(t, server, client); serverErr != nil || clientErr != nil {
			t.Errorf("given back: server %v, client %v", serverErr, clientErr)
		}
	})
}

func TestSet(t *testing.T) {
	amber, birch := newAuthority(t, "amber"), newAuthority(t, "birch")
	var b Bundles
	if len(b.TrustDomains()) != 0 {
		t.Error("the zero value is not empty")
	}
	err := b.Set(map[mesh.TrustDomain][]byte{"amber.mesh": amber.pem(), "birch.mesh": []byte("nonsense"), "Cedar Mesh": birch.pem()})
	if err == nil || !strings.Contains(err.Error(), "birch.mesh is ignored") || !strings.Contains(err.Error(), "Cedar Mesh") {
		t.Errorf("got %v", err)
	}
	if got := b.TrustDomains(); len(got) != 1 || got[0] != "amber.mesh" {
		t.Errorf("in force: %v", got)
	}
	if _, err := b.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("birch.mesh")); !errors.Is(err, ErrNoBundle) {
		t.Errorf("got %v", err)
	}
}

func TestParseBundle(t *testing.T) {
	a, b := newAuthority(t, "a"), newAuthority(t, "b")
	leaf := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.leaf(t, nil, amberPeer).Certificate[0]})
	cases := map[string]struct {
		data []byte
		n    int
		want string
	}{
		"one":         {a.pem(), 1, ""},
		"two":         {slicesJoin(a.pem(), b.pem()), 2, ""},
		"repeated":    {slicesJoin(a.pem(), b.pem(), a.pem()), 2, ""},
		"white space": {slicesJoin([]byte("\n \n"), a.pem(), []byte("\n\n")), 1, ""},
		"empty":       {nil, 0, "no certificate"},
		"text":        {[]byte("hello"), 0, "not PEM"},
		"text after":  {slicesJoin(a.pem(), []byte("hello")), 0, "not PEM"},
		"key":         {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}), 0, "not a certificate"},
		"cut":         {a.pem()[:200], 0, "not a certificate"},
		"garbage":     {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), 0, "certificate 1"},
		"leaf":        {leaf, 0, "not that of a CA"},
		"large":       {bytes.Repeat([]byte(" "), MaxBundle+1), 0, "at most"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := ParseBundle(c.data)
			if c.want == "" && (err != nil || len(got) != c.n) || c.want != "" && (!errors.Is(err, ErrBundle) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%d certificates, %v, want %d, %q", len(got), err, c.n, c.want)
			}
		})
	}
	t.Run("many", func(t *testing.T) {
		var data []byte
		for range MaxRoots + 1 {
			data = append(data, newAuthority(t, "x").pem()...)
		}
		if _, err := ParseBundle(data); !errors.Is(err, ErrBundle) {
			t.Errorf("got %v", err)
		}
	})
}

func slicesJoin(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestLocal(t *testing.T) {
	a := newAuthority(t, "a")
	svid, err := local(a.leaf(t, nil, amberPeer)).GetX509SVID()
	if err != nil || svid.ID.String() != amberPeer || len(svid.Certificates) != 1 {
		t.Errorf("%v, %v", svid, err)
	}
	for name, c := range map[string]tls.Certificate{"empty": {}, "no key": {Certificate: [][]byte{a.cert.Raw}}, "no id": {Certificate: [][]byte{a.cert.Raw}, PrivateKey: a.key}} {
		if _, err := local(c).GetX509SVID(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseBundle(f *testing.F) {
	a := newAuthority(f, "a")
	f.Add(a.pem())
	f.Add(append(a.pem(), a.pem()...))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		roots, err := ParseBundle(data)
		if (err == nil) != (len(roots) > 0) || len(roots) > MaxRoots {
			t.Errorf("%d roots, %v", len(roots), err)
		}
	})
}
