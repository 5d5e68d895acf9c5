package roots

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/catest"
)

func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// response is what a control plane sends: a secret of that name with the roots of each trust domain.
func response(t *testing.T, delta bool, name string, domains map[string][]byte) []byte {
	t.Helper()
	v := new(tlsv3.SPIFFECertValidatorConfig)
	for td, pems := range domains {
		v.TrustDomains = append(v.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name: td, TrustBundle: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: string(pems)}},
		})
	}
	secret := pack(t, &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: "spiffe", TypedConfig: pack(t, v)},
	}}})
	other := pack(t, &tlsv3.Secret{Name: "default"})
	var m proto.Message = &discoveryv3.DiscoveryResponse{Resources: []*anypb.Any{other, secret}}
	if delta {
		m = &discoveryv3.DeltaDiscoveryResponse{Resources: []*discoveryv3.Resource{{Resource: other}, {Resource: secret}, {Name: "gone"}}}
	}
	out, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// trusted says which of the roots a pool consists of, by their place in all.
func trusted(t *testing.T, r *Roots, all ...*catest.Authority) (out string) {
	t.Helper()
	pool, err := r.Pool()
	if err != nil {
		t.Fatal(err)
	}
	for i, a := range all {
		if _, err := a.Cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
			out += string(rune('0' + i))
		}
	}
	return out
}

// TestPeek: what the control plane tells of the own trust domain is taken, and nothing else.
func TestPeek(t *testing.T) {
	given, told, foreign := catest.New(t), catest.New(t), catest.New(t)
	both := append(bytes.Clone(told.PEM), given.PEM...)
	for _, c := range []struct {
		name     string
		delta    bool
		response []byte
		want     string // of given, told, foreign
	}{
		{"state of the world", false, response(t, false, "ROOTCA", map[string][]byte{"amber.mesh": told.PEM, "birch.mesh": foreign.PEM}), "1"},
		{"delta", true, response(t, true, "ROOTCA", map[string][]byte{"amber.mesh": both, "birch.mesh": foreign.PEM}), "01"},
		{"no own trust domain", true, response(t, true, "ROOTCA", map[string][]byte{"birch.mesh": foreign.PEM}), "0"},
		{"another secret", true, response(t, true, "ROOTCA2", map[string][]byte{"amber.mesh": told.PEM}), "0"},
		{"no certificates", true, response(t, true, "ROOTCA", map[string][]byte{"amber.mesh": []byte("BEGIN CERTIFICATE")}), "0"},
		{"too large", true, response(t, true, "ROOTCA", map[string][]byte{"amber.mesh": append(bytes.Clone(told.PEM), bytes.Repeat([]byte("\n"), maxRoots)...)}), "0"},
		{"the other form", true, response(t, false, "ROOTCA", map[string][]byte{"amber.mesh": told.PEM})[:40], "0"},
		{"no message", false, []byte("ROOTCA -----BEGIN CERTIFICATE-----"), "0"},
		{"nothing", false, nil, "0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := New(Config{File: given.RootFile(t), Dir: t.TempDir(), TrustDomain: "amber.mesh"})
			if err != nil {
				t.Fatal(err)
			}
			signer, changed := r.Signer()
			if signer != nil {
				t.Error("somebody signs before anything is told")
			}
			r.Peek(c.delta, c.response)
			if got := trusted(t, r, given, told, foreign); got != c.want {
				t.Errorf("trusted: %q, want %q", got, c.want)
			}
			signer, _ = r.Signer()
			select {
			case <-changed:
				if c.want == "0" || !signer.Equal(told.Cert) {
					t.Errorf("changed: %v signs", signer)
				}
			default:
				if c.want != "0" || signer != nil {
					t.Error("the change is not told")
				}
			}
		})
	}
}

// TestKept: what was told is there after a restart, unless the file is newer.
func TestKept(t *testing.T) {
	given, told, newer := catest.New(t), catest.New(t), catest.New(t)
	c := Config{File: given.RootFile(t), Dir: t.TempDir(), TrustDomain: "amber.mesh"}
	start := func() *Roots {
		t.Helper()
		r, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	start().Peek(false, response(t, false, "ROOTCA", map[string][]byte{c.TrustDomain: told.PEM}))
	kept := filepath.Join(c.Dir, keptFile)
	now := time.Now()
	if err := os.Chtimes(kept, now, now); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(c.File, now, now.Add(-time.Minute)); err != nil {
		t.Fatal(err)
	}
	r := start()
	if got := trusted(t, r, given, told, newer); got != "1" {
		t.Errorf("after a restart: %q", got)
	}
	if s, _ := r.Signer(); !s.Equal(told.Cert) {
		t.Errorf("%v signs", s)
	}
	if err := os.WriteFile(c.File, newer.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(c.File, now, now.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if got := trusted(t, r, given, told, newer); !strings.Contains(got, "2") {
		t.Errorf("with a newer file: %q", got)
	}
	if err := os.Remove(c.File); err != nil { // what was told is enough
		t.Fatal(err)
	}
	if got := trusted(t, start(), given, told, newer); got != "1" {
		t.Errorf("without a file: %q", got)
	}
	if err := os.WriteFile(kept, []byte("cut"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(c); err == nil || !strings.Contains(err.Error(), "read root certificate") {
		t.Errorf("without any: %v", err)
	}
	if err := os.WriteFile(c.File, []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(c); err == nil || !strings.Contains(err.Error(), "no PEM certificate") {
		t.Errorf("with a file without one: %v", err)
	}
}

// TestUnder: whether a certificate is to be renewed because another root signs now.
func TestUnder(t *testing.T) {
	old, next := catest.New(t), catest.New(t)
	signed := func(a *catest.Authority, ttl time.Duration) *ca.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), key)
		if err != nil {
			t.Fatal(err)
		}
		chain, err := a.Sign(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), "spiffe://amber.mesh/ns/a/sa/b", ttl)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode([]byte(chain[0]))
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return &ca.Certificate{Leaf: leaf, Chain: []byte(strings.Join(chain, ""))}
	}
	for _, c := range []struct {
		name string
		root *x509.Certificate
		cert *ca.Certificate
		want bool
	}{
		{"under it", next.Cert, signed(next, time.Hour), true},
		{"under the one before", next.Cert, signed(old, time.Hour), false},
		{"expired", next.Cert, signed(next, -time.Minute), true},
		{"no certificate yet", next.Cert, nil, true},
		{"nothing told", nil, signed(old, time.Hour), true},
	} {
		if got := Under(c.root, c.cert); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}
