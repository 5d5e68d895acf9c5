package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Limits of workload tokens.
const (
	Audience    = "istio-ca" // the only audience they are minted and accepted for
	MaxToken    = 4 << 10    // bytes
	MaxTokenTTL = 30 * 24 * time.Hour
)

// ErrToken is wrapped by every error about a workload token.
var ErrToken = errors.New("workload token refused")

// Workload is whom a workload token speaks for.
type Workload struct {
	Namespace      string
	ServiceAccount string
	Pod            string // may be empty
}

// claims are those of Kubernetes' bound service-account tokens.
type claims struct {
	jwt.Claims
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		Pod            *named `json:"pod,omitempty"`
		ServiceAccount named  `json:"serviceaccount"`
	} `json:"kubernetes.io"`
}

type named struct {
	Name string `json:"name"`
}

// tokenKey signs workload tokens with ES256.
type tokenKey struct {
	key
	id string
}

func loadTokenKey(file string) (tokenKey, error) {
	const remedy = "remove it to have a new one made; workload tokens that were minted before are worthless then"
	if !exists(file) {
		signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return tokenKey{}, fmt.Errorf("make workload token key: %w", err)
		}
		if err := writeKey(file, signer); err != nil {
			return tokenKey{}, err
		}
	}
	data, err := readFile(file, remedy)
	if err != nil {
		return tokenKey{}, err
	}
	return parseTokenKey(file, data)
}

// NewTokenKey makes a key of workload tokens, in PEM.
func NewTokenKey() ([]byte, error) {
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make workload token key: %w", err)
	}
	return encodeKey(signer)
}

func parseTokenKey(file string, data []byte) (tokenKey, error) {
	const remedy = "remove it to have a new one made; workload tokens that were minted before are worthless then"
	signer, err := parseKeyPEM(file, data, remedy)
	if err != nil {
		return tokenKey{}, err
	}
	if k, ok := signer.(*ecdsa.PrivateKey); !ok || k.Curve != elliptic.P256() {
		return tokenKey{}, &Invalid{File: file, Reason: ReasonWeakKey, Message: "the key is not ECDSA P-256", Remedy: remedy}
	}
	der, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return tokenKey{}, fmt.Errorf("workload token key %s: %w", file, err)
	}
	digest := sha256.Sum256(der)
	return tokenKey{key: hide(signer), id: base64.RawURLEncoding.EncodeToString(digest[:12])}, nil
}

// Mint makes a workload token, for places where no Kubernetes API makes them. A longer ttl than MaxTokenTTL is cut.
func (ca *CA) Mint(w Workload, ttl time.Duration) (string, error) {
	if err := w.check(); err != nil {
		return "", fmt.Errorf("mint workload token: %w", err)
	}
	if ttl <= 0 {
		return "", fmt.Errorf("mint workload token for %s/%s: its life of %s is not positive", w.Namespace, w.ServiceAccount, ttl)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: ca.tokens.signer()}, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", ca.tokens.id))
	if err != nil {
		return "", fmt.Errorf("mint workload token: %w", err)
	}
	now := ca.config.Now()
	var c claims
	c.Claims = jwt.Claims{
		Issuer: ca.domain.IDString(), Subject: w.subject(), Audience: jwt.Audience{Audience}, IssuedAt: jwt.NewNumericDate(now),
		NotBefore: jwt.NewNumericDate(now.Add(-backdate)), Expiry: jwt.NewNumericDate(now.Add(min(ttl, MaxTokenTTL))),
	}
	c.Kubernetes.Namespace, c.Kubernetes.ServiceAccount.Name = w.Namespace, w.ServiceAccount
	if w.Pod != "" {
		c.Kubernetes.Pod = &named{Name: w.Pod}
	}
	return jwt.Signed(signer).Claims(c).Serialize()
}

// Verify checks a token that Mint made: signature, algorithm, issuer, audience and time. No error holds any of the token.
func (ca *CA) Verify(token string) (Workload, error) {
	if len(token) > MaxToken {
		return Workload{}, fmt.Errorf("%w: %d bytes, at most %d are allowed", ErrToken, len(token), MaxToken)
	}
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return Workload{}, fmt.Errorf("%w: it is not a JWT signed with ES256", ErrToken)
	}
	if len(parsed.Headers) != 1 || parsed.Headers[0].KeyID != ca.tokens.id {
		return Workload{}, fmt.Errorf("%w: it was not minted by the control plane of %s", ErrToken, ca.domain.Name())
	}
	var c claims
	if err := parsed.Claims(ca.tokens.signer().Public(), &c); err != nil {
		return Workload{}, fmt.Errorf("%w: its signature or its claims are wrong", ErrToken)
	}
	if c.Expiry == nil {
		return Workload{}, fmt.Errorf("%w: it never expires", ErrToken)
	}
	err = c.ValidateWithLeeway(jwt.Expected{Issuer: ca.domain.IDString(), AnyAudience: jwt.Audience{Audience}, Time: ca.config.Now()}, 0)
	switch {
	case errors.Is(err, jwt.ErrExpired):
		return Workload{}, fmt.Errorf("%w: it expired at %s; mint a new one", ErrToken, c.Expiry.Time().UTC().Format(time.RFC3339))
	case errors.Is(err, jwt.ErrInvalidAudience):
		return Workload{}, fmt.Errorf("%w: it is not for audience %s", ErrToken, Audience)
	case err != nil:
		return Workload{}, fmt.Errorf("%w: %w", ErrToken, err)
	}
	w := Workload{Namespace: c.Kubernetes.Namespace, ServiceAccount: c.Kubernetes.ServiceAccount.Name}
	if c.Kubernetes.Pod != nil {
		w.Pod = c.Kubernetes.Pod.Name
	}
	if err := w.check(); err != nil || c.Subject != w.subject() {
		return Workload{}, fmt.Errorf("%w: its subject is not the service account of its claims", ErrToken)
	}
	return w, nil
}

// TokenKey returns the public key that verifies workload tokens.
func (ca *CA) TokenKey() crypto.PublicKey { return ca.tokens.signer().Public() }

func (w Workload) subject() string {
	return "system:serviceaccount:" + w.Namespace + ":" + w.ServiceAccount
}

func (w Workload) check() error {
	if !isName(w.Namespace, 63) || strings.Contains(w.Namespace, ".") || !isName(w.ServiceAccount, 253) || w.Pod != "" && !isName(w.Pod, 253) {
		return fmt.Errorf("namespace %.64q, service account %.64q or pod %.64q is not a Kubernetes name", w.Namespace, w.ServiceAccount, w.Pod)
	}
	return nil
}

// isName reports whether s is a DNS subdomain in lower case, as names of Kubernetes objects are.
func isName(s string, limit int) bool {
	if len(s) > limit {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if c := label[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return false
			}
		}
	}
	return true
}
