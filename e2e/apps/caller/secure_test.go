package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// pemFiles writes the certificate and the key of a test server.
func pemFiles(t *testing.T, c tls.Certificate) (cert, key string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(t.TempDir(), "crt"), filepath.Join(t.TempDir(), "key")
	for file, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: c.Certificate[0]}, key: {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// TestSecure: the server's certificate is checked for the URL's host, whatever is dialled, and the own one is shown.
func TestSecure(t *testing.T) {
	names := make(chan string, 10)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		names <- r.TLS.ServerName
	}))
	s.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	s.StartTLS()
	defer s.Close()
	at, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	cert, key := pemFiles(t, s.TLS.Certificates[0])
	ask := func(host string, files secure) *summary {
		c, err := files.config()
		if err != nil {
			t.Fatal(err)
		}
		return run(t.Context(), options{url: "https://" + host + "/", n: 2, timeout: 5 * time.Second, connect: at.Host, tls: c})
	}
	got := ask("example.com", secure{cert, cert, key})
	if got.Failed != 0 || got.Certificate["example.com"] != 2 {
		t.Errorf("got %v", got)
	}
	if name := <-names; name != "example.com" {
		t.Errorf("server name %q", name)
	}
	for what, got := range map[string]*summary{
		"other host":     ask("elsewhere.test", secure{cert, cert, key}),
		"no authority":   ask("example.com", secure{"", cert, key}),
		"no certificate": ask("example.com", secure{authority: cert}),
	} {
		if got.Failed != 2 || len(got.Error) == 0 {
			t.Errorf("%s: %v", what, got)
		}
	}
}

func TestSecureFiles(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for want, s := range map[string]secure{
		"no certificate": {authority: empty},
		"no such file":   {authority: empty + "x"},
		"go together":    {cert: empty},
	} {
		if _, err := s.config(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v", s, err)
		}
	}
	if c, err := (secure{}).config(); c != nil || err != nil {
		t.Errorf("got %v, %v", c, err)
	}
}
