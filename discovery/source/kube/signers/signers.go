// Package signers checks service-account tokens by the keys that an API server publishes, for the time in which it
// cannot be asked. It knows signatures and times, not which Pods there are: whoever uses it must.
package signers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Limits of what is read.
const (
	maxBody = 256 << 10
	maxKeys = 64
)

// Set is what an API server publishes of those who sign its tokens (OpenID Connect Discovery 1.0, as Kubernetes serves
// it). It holds no secret.
type Set struct {
	Issuer string            `json:"issuer"`
	Keys   []jose.JSONWebKey `json:"keys"`
}

// Claims is whom a token speaks for.
type Claims struct {
	Namespace, ServiceAccount, Pod string
}

// ErrToken is wrapped by every refusal.
var ErrToken = errors.New("the token is not good")

// algorithms are those by which Kubernetes signs tokens.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.ES256, jose.ES384, jose.ES512}

// Fetch asks the API server at base. Service accounts may by default (ClusterRole system:service-account-issuer-discovery).
func Fetch(ctx context.Context, web *http.Client, base string) (*Set, error) {
	var about struct {
		Issuer string `json:"issuer"`
	}
	if err := get(ctx, web, base, "/.well-known/openid-configuration", &about); err != nil {
		return nil, err
	}
	var keys jose.JSONWebKeySet
	if err := get(ctx, web, base, "/openid/v1/jwks", &keys); err != nil {
		return nil, err
	}
	out := &Set{Issuer: about.Issuer}
	for _, k := range keys.Keys {
		if k.Valid() && k.IsPublic() && len(out.Keys) < maxKeys {
			out.Keys = append(out.Keys, k)
		}
	}
	if out.Issuer == "" || len(out.Keys) == 0 {
		return nil, errors.New("the API server names no signer of its tokens")
	}
	return out, nil
}

func get(ctx context.Context, web *http.Client, base, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(base, "/")+path, nil)
	if err != nil {
		return err
	}
	resp, err := web.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: the API server answers %s", path, resp.Status)
	}
	return json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(into)
}

// kubernetes are the claims of a token that is bound to a Pod.
type kubernetes struct {
	Namespace string `json:"namespace"`
	Pod       named  `json:"pod"`
	Account   named  `json:"serviceaccount"`
}

type named struct {
	Name string `json:"name"`
}

// Verify checks a token: signature, issuer, audience and time, and that it is bound to a Pod. No error holds any of it.
func (s *Set) Verify(token, audience string, now time.Time) (Claims, error) {
	refuse := func(why string) (Claims, error) { return Claims{}, fmt.Errorf("%w: %s", ErrToken, why) }
	parsed, err := jwt.ParseSigned(token, algorithms)
	if err != nil || len(parsed.Headers) != 1 {
		return refuse("it is no token of an API server")
	}
	var c struct {
		jwt.Claims
		Kubernetes kubernetes `json:"kubernetes.io"`
	}
	i := slices.IndexFunc(s.Keys, func(k jose.JSONWebKey) bool { return k.KeyID == parsed.Headers[0].KeyID })
	if i < 0 {
		return refuse("nobody known signed it")
	}
	if err := parsed.Claims(s.Keys[i].Key, &c); err != nil {
		return refuse("its signature or its claims are wrong")
	}
	if c.Expiry == nil {
		return refuse("it never expires")
	}
	if err := c.ValidateWithLeeway(jwt.Expected{Issuer: s.Issuer, AnyAudience: jwt.Audience{audience}, Time: now}, 0); err != nil {
		return refuse("it is of another issuer, for another audience, or not of this time")
	}
	k := c.Kubernetes
	if k.Pod.Name == "" || c.Subject != "system:serviceaccount:"+k.Namespace+":"+k.Account.Name {
		return refuse("it is not bound to a pod")
	}
	return Claims{Namespace: k.Namespace, ServiceAccount: k.Account.Name, Pod: k.Pod.Name}, nil
}
