package signers

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// sign makes a token with those claims.
func sign(t *testing.T, key *ecdsa.PrivateKey, id string, claims map[string]any) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", id))
	if err != nil {
		t.Fatal(err)
	}
	out, err := jwt.Signed(s).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestVerify(t *testing.T) {
	mine, other, now := newKey(t), newKey(t), time.Unix(1790000000, 0)
	set := &Set{Issuer: "https://api", Keys: []jose.JSONWebKey{{Key: mine.Public(), KeyID: "k"}}}
	good := func() map[string]any {
		return map[string]any{
			"iss": "https://api", "aud": []string{"istio-ca"}, "exp": now.Unix() + 60, "nbf": now.Unix() - 60, "sub": "system:serviceaccount:shop:caller",
			"kubernetes.io": map[string]any{"namespace": "shop", "pod": map[string]any{"name": "caller-1"}, "serviceaccount": map[string]any{"name": "caller"}},
		}
	}
	got, err := set.Verify(sign(t, mine, "k", good()), "istio-ca", now)
	if err != nil || got != (Claims{"shop", "caller", "caller-1"}) {
		t.Fatalf("%+v, %v", got, err)
	}
	for what, change := range map[string]func(map[string]any){
		"another issuer":    func(c map[string]any) { c["iss"] = "https://evil" },
		"another audience":  func(c map[string]any) { c["aud"] = []string{"api"} },
		"no audience":       func(c map[string]any) { delete(c, "aud") },
		"expired":           func(c map[string]any) { c["exp"] = now.Unix() - 1 },
		"not valid yet":     func(c map[string]any) { c["nbf"] = now.Unix() + 60 },
		"never expires":     func(c map[string]any) { delete(c, "exp") },
		"not bound":         func(c map[string]any) { delete(c["kubernetes.io"].(map[string]any), "pod") },
		"of another":        func(c map[string]any) { c["sub"] = "system:serviceaccount:shop:admin" },
		"without namespace": func(c map[string]any) { delete(c["kubernetes.io"].(map[string]any), "namespace") },
	} {
		c := good()
		change(c)
		if who, err := set.Verify(sign(t, mine, "k", c), "istio-ca", now); !errors.Is(err, ErrToken) || who != (Claims{}) {
			t.Errorf("%s: %+v, %v", what, who, err)
		}
	}
	for what, token := range map[string]string{
		"another key": sign(t, other, "k", good()), "an unknown key": sign(t, mine, "x", good()), "nothing": "", "rubbish": "a.b.c",
		"no signature": "eyJhbGciOiJub25lIn0." + strings.Split(sign(t, mine, "k", good()), ".")[1] + ".",
	} {
		if _, err := set.Verify(token, "istio-ca", now); !errors.Is(err, ErrToken) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestFetch(t *testing.T) {
	key := newKey(t)
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: key.Public(), KeyID: "k", Algorithm: "ES256"}, {Key: []byte("a shared secret is no key of anybody"), KeyID: "s"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	answers := map[string]string{"/.well-known/openid-configuration": `{"issuer":"https://api"}`, "/openid/v1/jwks": string(keys)}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a, ok := answers[r.URL.Path]; ok {
			_, _ = w.Write([]byte(a))
			return
		}
		http.Error(w, "no", http.StatusForbidden)
	}))
	defer srv.Close()
	set, err := Fetch(t.Context(), srv.Client(), srv.URL+"/")
	if err != nil || set.Issuer != "https://api" || len(set.Keys) != 1 || set.Keys[0].KeyID != "k" {
		t.Fatalf("%+v, %v", set, err)
	}
	data, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	back := &Set{}
	if err := json.Unmarshal(data, back); err != nil || len(back.Keys) != 1 || !key.PublicKey.Equal(back.Keys[0].Key) {
		t.Errorf("%+v, %v", back, err)
	}
	for _, path := range []string{"/openid/v1/jwks", "/.well-known/openid-configuration"} {
		was := answers[path]
		answers[path] = "{}"
		if _, err := Fetch(t.Context(), srv.Client(), srv.URL); err == nil {
			t.Errorf("%s is empty, and taken", path)
		}
		delete(answers, path)
		if _, err := Fetch(t.Context(), srv.Client(), srv.URL); err == nil {
			t.Errorf("%s is forbidden, and taken", path)
		}
		answers[path] = was
	}
}
