package translate_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

const claimRules = `apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: gw, namespace: a}
spec: {selector: {istio: ingressgateway}, servers: [{port: {number: 8080, name: http, protocol: HTTP}, hosts: ["*"]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: app, namespace: a}
spec:
  hosts: [app.example.com]
  gateways: [gw, mesh]
  http:
  - match: [{headers: {"@request.auth.claims[realm][roles]": {exact: admin}}}]
    directResponse: {status: 210}
  - match: [{headers: {"@request.auth.claims.tier": {prefix: gold}}, withoutHeaders: {"@request.auth.claims.blocked": {exact: "yes"}}}]
    directResponse: {status: 211}
  - match: [{uri: {prefix: /open}}]
    directResponse: {status: 212}
`

// TestEnvoyClaims routes by what tokens say, at a gateway. Sidecars, which check no tokens on the way out, never take such
// a rule; without a token, or with a forged one, nobody does.
func TestEnvoyClaims(t *testing.T) {
	envoytest.Path(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	b := base64.RawURLEncoding
	token := func(signer *rsa.PrivateKey, claims map[string]any) string {
		claims["iss"], claims["exp"] = "issuer", time.Now().Add(time.Hour).Unix()
		body, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		text := b.EncodeToString([]byte(`{"alg":"RS256"}`)) + "." + b.EncodeToString(body)
		sum := sha256.Sum256([]byte(text))
		sig, err := rsa.SignPKCS1v15(rand.Reader, signer, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return text + "." + b.EncodeToString(sig)
	}
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	v1 := startBackend(t, "v1", nil)
	yaml := entry("app", v1) + claimRules + fmt.Sprintf(`---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: istio-system}
spec: {selector: {matchLabels: {istio: ingressgateway}}, jwtRules: [{issuer: issuer, jwks: '{"keys":[{"kty":"RSA","n":%q,"e":%q}]}'}]}
`, b.EncodeToString(key.N.Bytes()), b.EncodeToString(big.NewInt(int64(key.E)).Bytes()))
	snap, problems := fromYAML(t, yaml, nil)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	r, problems := translate.Translate(snap, proxyNamed(t, "router-istio-system-gw", "istio=ingressgateway"))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	port, out := freePort(t), freePort(t)
	cp, addr := serve(t, bindAt(r, map[string]uint32{"0.0.0.0_8080": port}))
	startEnvoy(t, addr)
	sidecar, _ := translate.Translate(snap, proxyNamed(t, "sidecar-a-client", ""))
	cp2, addr := serve(t, bindAt(sidecar, map[string]uint32{"0.0.0.0_80": out}))
	startEnvoy(t, addr)
	ask := func(port uint32, path, token string) int {
		header := ""
		if token != "" {
			header = "authorization: Bearer " + token
		}
		status, _, err := get(port, path, "app.example.com", header)
		if err != nil {
			return 0
		}
		return status
	}
	for _, at := range []uint32{port, out} {
		eventually(t, "first answer", func() error {
			if n := ask(at, "/open", ""); n != 212 {
				return fmt.Errorf("status %d", n)
			}
			return nil
		})
	}
	if n := cp.refused() + cp2.refused(); n != "" {
		t.Fatalf("envoy refused: %s", n)
	}
	admin := map[string]any{"realm": map[string]any{"roles": []string{"user", "admin"}}}
	for what, c := range map[string]struct {
		port  uint32
		token string
		want  int
	}{
		"in a list":         {port, token(key, admin), 210},
		"a text":            {port, token(key, map[string]any{"tier": "gold-2"}), 211},
		"another text":      {port, token(key, map[string]any{"tier": "silver"}), 404},
		"without the other": {port, token(key, map[string]any{"tier": "gold", "blocked": "yes"}), 404},
		"no token":          {port, "", 404},
		"forged":            {port, token(stranger, admin), 401},
		"at a sidecar":      {out, token(key, admin), 404},
	} {
		if got := ask(c.port, "/", c.token); got != c.want {
			t.Errorf("%s: %d, want %d", what, got, c.want)
		}
	}
	// The gateway's metadata has no HTTP10, so it does not speak HTTP/1.0.
	c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(c, "GET /open HTTP/1.0\r\nHost: app.example.com\r\n\r\n")
	if answer, err := io.ReadAll(c); !strings.Contains(string(answer), fmt.Sprint(http.StatusUpgradeRequired)) {
		t.Errorf("HTTP/1.0 without its switch: %q %v", answer, err)
	}
}
