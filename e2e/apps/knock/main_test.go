package main

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// gateway is a server that takes clients with the server name and protocol of a mesh, and any certificate.
func gateway(t *testing.T) (address, root string) {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s at %s\nby HTTP/%d", r.URL.Path, r.Host, r.ProtoMajor)
	}))
	cert, err := stranger()
	if err != nil {
		t.Fatal(err)
	}
	s.TLS = &tls.Config{
		ClientAuth: tls.RequireAnyClientCert,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			if h.ServerName != "outbound_.80_._.web.shop.global" {
				return nil, errors.New("no such name")
			}
			return &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"http/1.1"}}, nil
		},
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	root = filepath.Join(t.TempDir(), "root.pem")
	if err := os.WriteFile(root, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return s.Listener.Addr().String(), root
}

func TestKnock(t *testing.T) {
	address, other := gateway(t)
	for _, c := range []struct {
		name       string
		change     func(*options)
		want, step string
	}{
		{"answered", func(*options) {}, `answered 200 by spiffe://c1.mesh/ns/sample/sa/sleep over "http/1.1": /hello at knock by HTTP/1`, ""},
		{"unknown name", func(o *options) { o.sni = "example.com" }, "", "handshake"},
		{"no name", func(o *options) { o.sni = "" }, "", "handshake"},
		{"no protocol in common", func(o *options) { o.alpn = "spdy" }, "", "handshake"},
		{"no certificate", func(o *options) { o.as = "nobody" }, "", "request"},
		{"server of another root", func(o *options) { o.roots = other }, "", "identity"},
		{"nobody there", func(o *options) { o.gateway = "127.0.0.1:1" }, "", "dial"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := options{gateway: address, sni: "outbound_.80_._.web.shop.global", alpn: "istio,http/1.1", as: "stranger", path: "/hello", host: "knock"}
			c.change(&o)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			got, err := knock(ctx, o)
			var at *closed
			switch errors.As(err, &at); {
			case got != c.want:
				t.Errorf("%q, want %q (%v)", got, c.want, err)
			case c.step != "" && (at == nil || at.step != c.step):
				t.Errorf("%v, want closed at %s", err, c.step)
			}
		})
	}
	// Plain HTTP to a TLS server is answered by Go with 400: an answer is said as it is.
	if got, err := knock(t.Context(), options{gateway: address, plain: true, path: "/", host: "knock"}); err != nil || got == "" {
		t.Errorf("plain: %q %v", got, err)
	}
}
