package socket

import (
	"errors"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestWhoGetsCredentials: only a gateway that proves its namespace is given the Secrets in it.
func TestWhoGetsCredentials(t *testing.T) {
	snap := &mesh.Snapshot{Credentials: []*mesh.Credential{
		{Object: mesh.ObjectRef{Kind: "Secret", Namespace: "gw", Name: "cert"}, Certificate: []byte("c"), Key: mesh.PrivateKey("k")},
		{Object: mesh.ObjectRef{Kind: "Secret", Namespace: "other", Name: "cert"}, Certificate: []byte("c"), Key: mesh.PrivateKey("k")},
	}}
	for _, c := range []struct {
		proxy mesh.Proxy
		name  string
		want  error
	}{
		{mesh.Proxy{Type: mesh.Router, Namespace: "gw", Identity: "spiffe://td/ns/gw/sa/x"}, "cert", nil},
		{mesh.Proxy{Type: mesh.Router, Namespace: "gw", Identity: "spiffe://td/ns/gw/sa/x"}, "kubernetes://cert", nil},
		{mesh.Proxy{Type: mesh.Router, Namespace: "gw", Identity: "spiffe://td/ns/gw/sa/x"}, "none", ErrNoSecret},
		{mesh.Proxy{Type: mesh.Router, Namespace: "empty", Identity: "spiffe://td/ns/empty/sa/x"}, "cert", ErrNoSecret},
		{mesh.Proxy{Type: mesh.Router, Namespace: "gw"}, "cert", ErrUnverified},
		{mesh.Proxy{Type: mesh.Router, Namespace: "gw", Identity: "spiffe://td/ns/other/sa/x"}, "cert", ErrUnverified},
		{mesh.Proxy{Type: mesh.Sidecar, Namespace: "gw", Identity: "spiffe://td/ns/gw/sa/x"}, "cert", ErrUnverified},
		{mesh.Proxy{Type: mesh.Router, Namespace: "gw", Identity: "spiffe://td/ns/gw/sa/x"}, "kubernetes-gateway://other/cert", ErrNoSecret},
	} {
		from := CredentialsOf(snap, &c.proxy)
		_, err := from.certificate(c.name)
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s %s asks for %s: %v, want %v", c.proxy.Type, c.proxy.Identity, c.name, err, c.want)
		}
		if (len(from.Secrets()) == 1) != (c.want == nil) {
			t.Errorf("%s %s is served %d secrets", c.proxy.Type, c.proxy.Identity, len(from.Secrets()))
		}
	}
}
