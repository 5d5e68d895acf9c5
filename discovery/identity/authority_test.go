package identity

import (
	"bytes"
	"crypto/x509"
	"errors"
	"testing"
	"time"
)

func material(t *testing.T) Material {
	t.Helper()
	m, err := MakeRoot(Config{TrustDomain: "amber.mesh"})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// newFromMaterial makes a CA that is not kept in files.
func newFromMaterial(t *testing.T, m Material) *CA {
	t.Helper()
	token, err := NewTokenKey()
	if err != nil {
		t.Fatal(err)
	}
	ca, err := New(Config{TrustDomain: "amber.mesh"}, "Secret istio-system/cacerts", m, token)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func TestUseAnotherAuthority(t *testing.T) {
	one, two := material(t), material(t)
	ca, other := newFromMaterial(t, one), newFromMaterial(t, two)
	r, err := ca.Rotating("spiffe://amber.mesh/isthmus/peer", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	before, _ := r.Certificate()
	next, err := ca.Parse("Secret istio-system/cacerts", two)
	if err != nil {
		t.Fatal(err)
	}
	verifies := func(leaf *x509.Certificate) bool {
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(ca.Roots())
		_, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err == nil
	}

	// The new root is trusted before anything is signed under it.
	if err := ca.Use(ca.Authority(), next.Roots()); err != nil {
		t.Fatal(err)
	}
	if same, _ := r.Certificate(); same != before {
		t.Error("the own certificate was renewed although the same authority signs")
	}
	theirs, err := other.Issue("spiffe://amber.mesh/ns/a/sa/b", nil, 0)
	if err != nil || !verifies(theirs.Leaf) {
		t.Errorf("a certificate under the coming root is not trusted: %v", err)
	}

	if err := ca.Use(next, one.Root); err != nil {
		t.Fatal(err)
	}
	after, _ := r.Certificate()
	if after == before || after.Leaf.CheckSignatureFrom(next.chain[0]) != nil {
		t.Error("the own certificate is not under the new root")
	}
	if !verifies(before.Leaf) || !verifies(after.Leaf) {
		t.Error("one of the two generations is not trusted during the overlap")
	}
	if !bytes.HasPrefix(ca.Roots(), two.Root) {
		t.Error("the root that signs is not the first: agents do not see that they are to renew")
	}

	if err := ca.Use(next, nil); err != nil {
		t.Fatal(err)
	}
	if verifies(before.Leaf) || !verifies(after.Leaf) {
		t.Error("after the overlap, only the new root must be trusted")
	}
}

// TestCross: who knows only the root before takes what the next one signs, as long as the chain is shown.
func TestCross(t *testing.T) {
	one, two := material(t), material(t)
	ca := newFromMaterial(t, one)
	var err error
	if two.Cross, err = ca.Authority().Cross(two.Cert); err != nil {
		t.Fatal(err)
	}
	next, err := ca.Parse("next", MaterialOf(two.Data()))
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.Use(next, nil); err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Issue("spiffe://amber.mesh/ns/a/sa/b", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for name, root := range map[string][]byte{"old": one.Root, "new": two.Root} {
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		roots.AppendCertsFromPEM(root)
		for _, raw := range cert.Certificate[1:] {
			c, err := x509.ParseCertificate(raw)
			if err != nil {
				t.Fatal(err)
			}
			between.AddCert(c)
		}
		if _, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
			t.Errorf("known by the %s root: %v", name, err)
		}
	}
	other := material(t)
	other.Cross = two.Cross
	if _, err := ca.Parse("other", other); err == nil {
		t.Error("a cross certificate of another key is taken")
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	good, other := material(t), material(t)
	ca := newFromMaterial(t, good)
	for name, c := range map[string]struct {
		m    Material
		want string
	}{
		"nothing":           {Material{}, ReasonMissing},
		"no key":            {Material{Cert: good.Cert, Root: good.Root}, ReasonMissing},
		"another's key":     {Material{Cert: good.Cert, Key: other.Key, Root: good.Root, Chain: good.Chain}, ReasonKeyMismatch},
		"another's root":    {Material{Cert: good.Cert, Key: good.Key, Root: other.Root}, ReasonChain},
		"text":              {Material{Cert: []byte("hello"), Key: good.Key}, ReasonNotPEM},
		"a leaf":            {leaf(t, ca), ReasonNotCA},
		"another domain":    {foreign(t), ReasonTrustDomain},
		"no root, no chain": {Material{Cert: good.Cert, Key: good.Key}, ""},
		"as cert-manager":   {MaterialOf(map[string][]byte{"tls.crt": good.Cert, "tls.key": good.Key, "ca.crt": good.Root}), ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ca.Parse("Secret istio-system/cacerts", c.m)
			var invalid *Invalid
			if c.want == "" && err != nil || c.want != "" && (!errors.As(err, &invalid) || invalid.Reason != c.want) {
				t.Errorf("got %v, want reason %q", err, c.want)
			}
			if lines := bytes.Split(c.m.Key, []byte("\n")); err != nil && len(lines) > 1 && bytes.Contains([]byte(err.Error()), lines[1]) {
				t.Error("the error holds key material")
			}
		})
	}
}

func leaf(t *testing.T, ca *CA) Material {
	t.Helper()
	c, err := ca.Issue("spiffe://amber.mesh/ns/a/sa/b", nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	m := material(t)
	m.Cert = encodeCert(c.Leaf)
	return m
}

func foreign(t *testing.T) Material {
	t.Helper()
	m, err := MakeRoot(Config{TrustDomain: "birch.mesh"})
	if err != nil {
		t.Fatal(err)
	}
	return m
}
