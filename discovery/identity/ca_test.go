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
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newCA(t testing.TB, change func(*Config)) *CA {
	t.Helper()
	c := Config{Dir: t.TempDir(), TrustDomain: "amber.mesh"}
	if change != nil {
		change(&c)
	}
	ca, err := LoadOrCreate(c)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func csr(t testing.TB, key crypto.Signer, change func(*x509.CertificateRequest)) []byte {
	t.Helper()
	tmpl := new(x509.CertificateRequest)
	if change != nil {
		change(tmpl)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func parse(t testing.TB, text string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatalf("not PEM: %q", text)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const reviews = "spiffe://amber.mesh/ns/default/sa/reviews"

func TestCreateAndLoad(t *testing.T) {
	dir := t.TempDir()
	at := func(c *Config) { c.Dir = dir }
	first := newCA(t, at)
	second := newCA(t, at)
	if !bytes.Equal(first.Roots(), second.Roots()) || !first.TokenKey().(*ecdsa.PublicKey).Equal(second.TokenKey()) {
		t.Error("the second load gives another CA")
	}
	root := first.Root()
	if !root.IsCA || root.URIs[0].String() != "spiffe://amber.mesh" || time.Until(root.NotAfter) < 9*365*24*time.Hour {
		t.Errorf("root %+v", root.Subject)
	}
	for file, mode := range map[string]os.FileMode{rootKeyFile: 0o600, tokenKeyFile: 0o600, rootCertFile: 0o644} {
		if info, err := os.Stat(filepath.Join(dir, file)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", file, info.Mode(), err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	// A crash after the key was written: the certificate is made from it.
	if err := os.Remove(filepath.Join(dir, rootCertFile)); err != nil {
		t.Fatal(err)
	}
	if third := newCA(t, at); !third.Root().PublicKey.(*ecdsa.PublicKey).Equal(root.PublicKey) {
		t.Error("the key was replaced")
	}
}

// given makes a folder with an intermediate CA below a root.
type given struct {
	root, inter       *x509.Certificate
	rootKey, interKey *ecdsa.PrivateKey
	files             map[string][]byte
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
}

func newGiven(t testing.TB, change func(*x509.Certificate)) *given {
	t.Helper()
	g := &given{rootKey: ecKey(t), interKey: ecKey(t)}
	root := caTemplate("given root")
	g.root = create(t, root, root, &g.rootKey.PublicKey, g.rootKey)
	inter := caTemplate("given intermediate")
	if change != nil {
		change(inter)
	}
	g.inter = create(t, inter, g.root, &g.interKey.PublicKey, g.rootKey)
	der, err := x509.MarshalECPrivateKey(g.interKey)
	if err != nil {
		t.Fatal(err)
	}
	g.files = map[string][]byte{
		givenCert: encodeCert(g.inter), givenRoot: encodeCert(g.root), givenChain: append(encodeCert(g.inter), encodeCert(g.root)...),
		givenKey: pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
	}
	return g
}

func create(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
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

func (g *given) write(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range g.files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestGiven(t *testing.T) {
	g := newGiven(t, nil)
	expired := caTemplate("old root")
	expired.NotAfter = time.Now().Add(-time.Minute)
	g.files[givenRoot] = append(encodeCert(create(t, expired, expired, &g.rootKey.PublicKey, g.rootKey)), g.files[givenRoot]...)
	ca := newCA(t, func(c *Config) { c.Given = g.write(t) })
	chain, err := ca.Sign(csr(t, ecKey(t), nil), reviews, time.Hour)
	if err != nil || len(chain) != 3 {
		t.Fatalf("chain of %d, %v", len(chain), err)
	}
	_, err = parse(t, chain[0]).Verify(x509.VerifyOptions{Roots: pool([]*x509.Certificate{g.root}), Intermediates: pool([]*x509.Certificate{parse(t, chain[1])})})
	if err != nil || !parse(t, chain[2]).Equal(g.root) || !ca.Root().Equal(g.root) {
		t.Errorf("chain %v", err)
	}
	if !bytes.Equal(ca.Roots(), encodeCert(g.root)) {
		t.Error("the expired root is in the bundle")
	}
}

func TestGivenSelfSigned(t *testing.T) {
	g := newGiven(t, nil)
	der, err := x509.MarshalPKCS8PrivateKey(g.rootKey)
	if err != nil {
		t.Fatal(err)
	}
	g.files[givenCert], g.files[givenChain], g.files[givenKey] = encodeCert(g.root), encodeCert(g.root), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	ca := newCA(t, func(c *Config) { c.Given = g.write(t) })
	if chain, err := ca.Sign(csr(t, ecKey(t), nil), reviews, 0); err != nil || len(chain) != 2 {
		t.Errorf("chain of %d, %v", len(chain), err)
	}
}

func TestGivenRefused(t *testing.T) {
	other := newGiven(t, nil)
	cases := map[string]struct {
		inter  func(*x509.Certificate)
		change func(*given)
		file   string
		reason string
	}{
		"no certificate":    {change: func(g *given) { delete(g.files, givenCert) }, file: givenCert, reason: ReasonMissing},
		"no key":            {change: func(g *given) { delete(g.files, givenKey) }, file: givenKey, reason: ReasonMissing},
		"no root":           {change: func(g *given) { delete(g.files, givenRoot) }, file: givenRoot, reason: ReasonMissing},
		"no chain":          {change: func(g *given) { delete(g.files, givenChain) }, file: givenChain, reason: ReasonMissing},
		"not PEM":           {change: func(g *given) { g.files[givenCert] = []byte("hello") }, file: givenCert, reason: ReasonNotPEM},
		"text after":        {change: func(g *given) { g.files[givenRoot] = append(g.files[givenRoot], "x"...) }, file: givenRoot, reason: ReasonNotPEM},
		"key is no key":     {change: func(g *given) { g.files[givenKey] = g.files[givenCert] }, file: givenKey, reason: ReasonNotPEM},
		"certificate a key": {change: func(g *given) { g.files[givenCert] = g.files[givenKey] }, file: givenCert, reason: ReasonNotPEM},
		"other key":         {change: func(g *given) { g.files[givenKey] = other.files[givenKey] }, file: givenKey, reason: ReasonKeyMismatch},
		"other root":        {change: func(g *given) { g.files[givenRoot] = other.files[givenRoot] }, file: givenChain, reason: ReasonChain},
		"leaf":              {inter: func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }, file: givenCert, reason: ReasonNotCA},
		"may not sign":      {inter: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }, file: givenCert, reason: ReasonNotCA},
		"expired":           {inter: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, file: givenCert, reason: ReasonExpired},
		"not yet valid":     {inter: func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }, file: givenCert, reason: ReasonNotYetValid},
		"other domain": {inter: func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "birch.mesh"}}
		}, file: givenCert, reason: ReasonTrustDomain},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			g := newGiven(t, c.inter)
			if c.change != nil {
				c.change(g)
			}
			_, err := LoadOrCreate(Config{Dir: t.TempDir(), Given: g.write(t), TrustDomain: "amber.mesh"})
			var invalid *Invalid
			if !errors.As(err, &invalid) || invalid.Reason != c.reason || filepath.Base(invalid.File) != c.file || invalid.Remedy == "" {
				t.Errorf("got %v, want %s of %s", err, c.reason, c.file)
			}
		})
	}
}

func TestOwnRefused(t *testing.T) {
	cases := map[string]struct {
		change func(t *testing.T, dir string)
		config func(*Config)
		reason string
	}{
		"key lost":     {func(t *testing.T, dir string) { remove(t, dir, rootKeyFile) }, nil, ReasonMissing},
		"key garbage":  {func(t *testing.T, dir string) { put(t, dir, rootKeyFile, "x") }, nil, ReasonNotPEM},
		"cert garbage": {func(t *testing.T, dir string) { put(t, dir, rootCertFile, "x") }, nil, ReasonNotPEM},
		"cert a folder": {func(t *testing.T, dir string) {
			remove(t, dir, rootCertFile)
			if err := os.Mkdir(filepath.Join(dir, rootCertFile), 0o700); err != nil {
				t.Fatal(err)
			}
		}, nil, ReasonUnreadable},
		"other key": {func(t *testing.T, dir string) {
			remove(t, dir, rootKeyFile)
			copyFile(t, dir, tokenKeyFile, rootKeyFile)
		}, nil, ReasonKeyMismatch},
		"other domain": {nil, func(c *Config) { c.TrustDomain = "birch.mesh" }, ReasonTrustDomain},
		"expired":      {nil, func(c *Config) { c.Now = func() time.Time { return time.Now().Add(11 * 365 * 24 * time.Hour) } }, ReasonExpired},
		"clock wrong":  {nil, func(c *Config) { c.Now = func() time.Time { return time.Now().Add(-time.Hour) } }, ReasonNotYetValid},
		"token key":    {func(t *testing.T, dir string) { put(t, dir, tokenKeyFile, "x") }, nil, ReasonNotPEM},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			config := Config{Dir: t.TempDir(), TrustDomain: "amber.mesh"}
			if _, err := LoadOrCreate(config); err != nil {
				t.Fatal(err)
			}
			if c.change != nil {
				c.change(t, config.Dir)
			}
			if c.config != nil {
				c.config(&config)
			}
			before, _ := os.ReadFile(filepath.Join(config.Dir, rootCertFile))
			_, err := LoadOrCreate(config)
			var invalid *Invalid
			if !errors.As(err, &invalid) || invalid.Reason != c.reason || invalid.Remedy == "" {
				t.Errorf("got %v, want %s", err, c.reason)
			}
			if after, _ := os.ReadFile(filepath.Join(config.Dir, rootCertFile)); !bytes.Equal(before, after) {
				t.Error("a file was overwritten")
			}
		})
	}
	for name, c := range map[string]Config{
		"domain": {Dir: t.TempDir(), TrustDomain: "Amber Mesh"},
		"folder": {Dir: "/dev/null/x", TrustDomain: "amber.mesh"},
		"TTLs":   {Dir: t.TempDir(), TrustDomain: "amber.mesh", DefaultTTL: 2 * time.Hour, MaxTTL: time.Hour},
	} {
		if _, err := LoadOrCreate(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func remove(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, dir, from, to string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, from))
	if err != nil {
		t.Fatal(err)
	}
	put(t, dir, to, string(b))
}

func TestSign(t *testing.T) {
	ca := newCA(t, nil)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	greedy := func(r *x509.CertificateRequest) {
		r.Subject, r.DNSNames = pkix.Name{CommonName: "admin"}, []string{"istiod.istio-system.svc"}
		r.URIs = []*url.URL{{Scheme: "spiffe", Host: "amber.mesh", Path: "/isthmus/peer"}}
		r.ExtraExtensions = []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}} // CA: true
	}
	for name, key := range map[string]crypto.Signer{"P-256": ecKey(t), "P-384": p384, "RSA": rsaKey, "Ed25519": edKey} {
		t.Run(name, func(t *testing.T) {
			chain, err := ca.Sign(csr(t, key, greedy), reviews, time.Hour)
			if err != nil || len(chain) != 2 {
				t.Fatalf("chain of %d, %v", len(chain), err)
			}
			leaf := parse(t, chain[0])
			if len(leaf.URIs) != 1 || leaf.URIs[0].String() != reviews || len(leaf.DNSNames) > 0 || leaf.IsCA || leaf.Subject.CommonName != "" || len(leaf.ExtKeyUsage) != 2 {
				t.Errorf("the request chose: %v %v %t %q", leaf.URIs, leaf.DNSNames, leaf.IsCA, leaf.Subject)
			}
			if !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(leaf.PublicKey) {
				t.Error("another key was signed")
			}
			if left := time.Until(leaf.NotAfter); left > time.Hour || left < time.Hour-time.Minute || time.Since(leaf.NotBefore) < backdate {
				t.Errorf("valid from %s to %s", leaf.NotBefore, leaf.NotAfter)
			}
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool(ca.Authority().roots)}); err != nil {
				t.Error(err)
			}
		})
	}
	for name, c := range map[string]struct{ ask, want time.Duration }{"default": {0, 24 * time.Hour}, "negative": {-1, 24 * time.Hour}, "capped": {365 * 24 * time.Hour, 7 * 24 * time.Hour}, "short": {30 * time.Second, 30 * time.Second}} {
		chain, err := ca.Sign(csr(t, ecKey(t), nil), reviews, c.ask)
		if err != nil {
			t.Fatal(err)
		}
		if left := time.Until(parse(t, chain[0]).NotAfter); left > c.want || left < c.want-10*time.Second {
			t.Errorf("%s: %s, want %s", name, left, c.want)
		}
	}
	for _, id := range []string{"", "reviews", "spiffe://amber.mesh", "spiffe://birch.mesh/ns/default/sa/reviews", reviews + "?x", reviews + "/../peer"} {
		if _, err := ca.Sign(csr(t, ecKey(t), nil), id, 0); err == nil {
			t.Errorf("signed for %q", id)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	ca := newCA(t, nil)
	good := csr(t, ecKey(t), nil)
	block, _ := pem.Decode(good)
	broken := bytes.Clone(block.Bytes)
	broken[len(broken)-1] ^= 1
	p521, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	wrap := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	cases := map[string]struct {
		csr  []byte
		want string
	}{
		"empty":     {nil, "not a certificate request"},
		"text":      {[]byte("hello"), "not a certificate request"},
		"cut":       {good[:100], "not a certificate request"},
		"kind":      {wrap("CERTIFICATE", block.Bytes), "not a certificate request"},
		"two":       {append(bytes.Clone(good), good...), "more than one"},
		"garbage":   {wrap("CERTIFICATE REQUEST", []byte("garbage")), "refused"},
		"signature": {wrap("CERTIFICATE REQUEST", broken), "not signed by its own key"},
		"large":     {bytes.Repeat([]byte("a"), MaxCSR+1), "at most 16384"},
		"weak RSA":  {weakRSA(t), "2048 to 8192"},
		"P-521":     {csr(t, p521, nil), "P-256 and P-384"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if _, err := ca.Sign(c.csr, reviews, 0); !errors.Is(err, ErrCSR) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// weakRSA is a request with an RSA key of 1024 bits; Go makes such keys only when asked with insistence.
func weakRSA(t testing.TB) []byte {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	k, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	return csr(t, k, nil)
}

func TestCAEnds(t *testing.T) {
	now := time.Now()
	g := newGiven(t, func(c *x509.Certificate) { c.NotAfter = now.Add(time.Hour) })
	ca := newCA(t, func(c *Config) { c.Given, c.Now = g.write(t), func() time.Time { return now } })
	chain, err := ca.Sign(csr(t, ecKey(t), nil), reviews, 0)
	if err != nil || parse(t, chain[0]).NotAfter.After(ca.Expires()) {
		t.Errorf("a leaf outlives its CA, %v", err)
	}
	now = now.Add(2 * time.Hour)
	if _, err := ca.Sign(csr(t, ecKey(t), nil), reviews, 0); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("an expired CA signs: %v", err)
	}
}

func TestRotating(t *testing.T) {
	var mu sync.Mutex
	now := time.Now()
	ca := newCA(t, func(c *Config) {
		c.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	})
	const id = "spiffe://amber.mesh/isthmus/controlplane"
	r, err := ca.Rotating(id, []string{"xds.amber.mesh", "istiod.istio-system.svc"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	get := func() *x509.Certificate {
		c, err := r.GetCertificate(nil)
		if err != nil || len(c.Certificate) != 2 {
			t.Fatal(err)
		}
		return c.Leaf
	}
	first := get()
	if first.URIs[0].String() != id || len(first.DNSNames) != 2 {
		t.Errorf("%v %v", first.URIs, first.DNSNames)
	}
	for at, same := range map[time.Duration]bool{29 * time.Minute: true, 31 * time.Minute: false} {
		mu.Lock()
		start := now
		now = now.Add(at)
		mu.Unlock()
		if got := get(); got.Equal(first) != same {
			t.Errorf("after %s: same is %t", at, !same)
		}
		first = func() *x509.Certificate { // start over for the other case
			mu.Lock()
			now = start.Add(24 * time.Hour)
			mu.Unlock()
			return get()
		}()
	}
	// A CA that ended leaves the last certificate in use until it ends too.
	mu.Lock()
	now = ca.Expires().Add(-time.Minute)
	mu.Unlock()
	last := get()
	mu.Lock()
	now = last.NotAfter.Add(time.Second)
	mu.Unlock()
	if _, err := r.GetClientCertificate(nil); err == nil {
		t.Error("an expired certificate is given out")
	}
	if _, err := ca.Rotating("spiffe://birch.mesh/isthmus/peer", nil, 0); err == nil {
		t.Error("another trust domain is accepted")
	}
}

func TestKeysAreNeverPrinted(t *testing.T) {
	ca := newCA(t, nil)
	hidden := struct{ ca CA }{*ca}
	var out bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).Info("m", "ca", ca, "value", *ca, "key", ca.Authority().key, "hidden", hidden)
	}
	for _, v := range []any{ca, *ca, ca.Authority(), *ca.Authority(), ca.Authority().key, Material{Key: []byte("x")}, ca.tokens, hidden, &hidden} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
	}
	b, err := json.Marshal(ca.Authority().key)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(b)
	for _, k := range []key{ca.Authority().key, ca.tokens.key} {
		d, err := k.signer().(*ecdsa.PrivateKey).Bytes()
		if err != nil {
			t.Fatal(err)
		}
		for _, form := range []string{string(d), fmt.Sprint(d), fmt.Sprintf("%x", d), new(big.Int).SetBytes(d).String()} {
			if strings.Contains(out.String(), form) {
				t.Errorf("a key is printed as %q", form)
			}
		}
	}
	if !strings.Contains(out.String(), redacted) {
		t.Error("nothing says that it was left out")
	}
}

func FuzzCSR(f *testing.F) {
	ca := newCA(f, nil)
	good := csr(f, ecKey(f), nil)
	block, _ := pem.Decode(good)
	f.Add(good)
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"))
	f.Add(block.Bytes)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, in := range [][]byte{data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: data})} {
			chain, err := ca.Sign(in, reviews, time.Hour)
			if err != nil {
				continue
			}
			if leaf := parse(t, chain[0]); leaf.IsCA || len(leaf.URIs) != 1 || leaf.URIs[0].String() != reviews {
				t.Errorf("signed %v", leaf.URIs)
			}
		}
	})
}
