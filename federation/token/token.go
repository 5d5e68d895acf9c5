// Package token knows join tokens: how one is issued, read, redeemed over the network, and remembered by its issuer.
// It does not know what a redeemed token gives; the issuer's Admit functions decide that.
//
// # The token
//
// A token is one line, isth1_PAYLOAD.SIGNATURE, both parts base64url without padding. The payload is one JSON object of
// at most 1 KiB in canonical form: the members of Payload in their order, no white space, nothing unknown or twice. The
// signature is Ed25519 by the issuer's federation key over the payload's bytes. The payload's seed is the secret: an
// Ed25519 seed that only the holder of the token has. The issuer keeps a Grant with the seed's public half, so nothing
// in its store joins.
//
// # What crosses the wire
//
// The joiner never sends the seed. Field token of JoinRequest is the token's reference: isth1_PAYLOAD.SIGNATURE again,
// where PAYLOAD is the canonical payload without its member "seed" and SIGNATURE is the token's own, over the payload
// with the seed. The issuer cannot check that signature and need not: its Grant holds the SHA-256 of the reference, so
// any edit shows. The reference names the grant (tid); the Grant decides everything else.
//
// The joiner dials one of the token's endpoints with TLS 1.3, ALPN isthmus-join and SNI join.ISSUER. Before it sends a
// byte it checks that the certificate carries exactly the SPIFFE id spiffe://ISSUER/isthmus/join and that a pin of the
// token is the SHA-256 of the leaf's public key, or of a CA certificate in the presented chain that the leaf verifies
// against. Then each side sends one frame, a 32-bit big-endian length and that many bytes: a JoinRequest of at most
// 64 KiB and a JoinReply of at most 8 MiB. With E the 32 bytes that TLS exports under "EXPORTER-isthmus-join",
//
//	proof     = Ed25519(seed,           "isthmus join request v1\x00" || E || SHA-256(request body))
//	signature = Ed25519(federation key, "isthmus join reply v1\x00"   || E || SHA-256(reply body))
//
// so neither frame means anything on another connection.
package token

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Limits of a token.
const (
	MaxPayload      = 1024             // bytes of JSON
	MaxLifetime     = 24 * time.Hour   // from nbf to exp
	DefaultLifetime = 15 * time.Minute // when IssueConfig.Lifetime is zero
	MaxUses         = 100              // of a token for machines; one for clusters is good once

	version      = 1
	prefix       = "isth1_"
	signatureLen = 86 // base64url of 64 bytes
	maxToken     = len(prefix) + (MaxPayload*4+2)/3 + 1 + signatureLen
	maxPins      = 2
	maxEndpoints = 4
	idLen        = 16 // bytes of a token id
)

// What can be wrong with a token, found without asking its issuer. Errors of Parse wrap exactly one of them.
var (
	ErrCut          = errors.New("the token is cut short")
	ErrMalformed    = errors.New("this is not a join token")
	ErrSignature    = errors.New("the token was edited: its signature does not fit")
	ErrVersion      = errors.New("the token is of a version that this program does not know")
	ErrTooLarge     = errors.New("the token is too long")
	ErrUnknownKey   = errors.New("the token holds a key that this program does not know")
	ErrDuplicateKey = errors.New("the token holds a key twice")
	ErrExpired      = errors.New("the token has expired")
	ErrNotYetValid  = errors.New("the token is not valid yet")
)

// Kind says who may redeem a token.
type Kind string

// The kinds of tokens.
const (
	Cluster Kind = "cluster"
	VM      Kind = "vm"
)

// Scopes that a token may be narrowed to. A token without scopes has both.
const (
	ScopeExports = "exports"
	ScopeImports = "imports"
)

// Seed is the secret of a token, an Ed25519 seed. It prints as [redacted] in every format; only the token itself
// carries it. The bytes stand inside a closure because fmt looks through pointers, and into unexported fields of other
// types without asking methods.
type Seed struct{ bytes func() []byte }

const redacted = "[redacted]"

func newSeed(b []byte) Seed {
	b = bytes.Clone(b)
	return Seed{bytes: func() []byte { return b }}
}

// String returns [redacted].
func (Seed) String() string { return redacted }

// GoString returns [redacted].
func (Seed) GoString() string { return redacted }

// Format prints [redacted] for every verb.
func (Seed) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns [redacted].
func (Seed) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns [redacted]; JSON and YAML encoders use it.
func (Seed) MarshalText() ([]byte, error) { return []byte(redacted), nil }

func (s Seed) key() ed25519.PrivateKey {
	if s.bytes == nil {
		return nil
	}
	return ed25519.NewKeyFromSeed(s.bytes())
}

// Pin is the SHA-256 of a certificate's public key (SubjectPublicKeyInfo).
type Pin [sha256.Size]byte

// PinOf returns the pin of a certificate.
func PinOf(c *x509.Certificate) Pin { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// String returns the pin in hex.
func (p Pin) String() string { return hex.EncodeToString(p[:]) }

// MarshalText returns the pin in hex.
func (p Pin) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// Payload is what a token says. Printing or marshalling it never shows the seed, so it is what inspection shows.
type Payload struct {
	Version   int               `json:"version"`
	Kind      Kind              `json:"kind"`
	ID        string            `json:"id"`
	Issuer    mesh.TrustDomain  `json:"issuer"`
	IssuerKey ed25519.PublicKey `json:"issuerKey"`
	Pins      []Pin             `json:"pins"`
	Endpoints []string          `json:"endpoints"` // host:port, in the order to try them
	Subject   string            `json:"subject"`   // the cluster's name, or NAMESPACE/NAME of the machine
	Seed      Seed              `json:"seed"`
	NotBefore time.Time         `json:"notBefore"`
	Expires   time.Time         `json:"expires"`
	Uses      int               `json:"uses"`
	Scopes    []string          `json:"scopes,omitempty"`

	reference string
}

// Reference is the form of the token that may be shown, stored and sent: all of it but the seed.
func (p Payload) Reference() string { return p.reference }

// CheckTime says whether the token is valid at now, by the clock of whoever asks. The issuer's clock decides.
func (p Payload) CheckTime(now time.Time) error {
	switch {
	case now.Before(p.NotBefore):
		return fmt.Errorf("join token %s: %w: it is valid from %s; check this machine's clock", p.ID, ErrNotYetValid, stamp(p.NotBefore))
	case !now.Before(p.Expires):
		return fmt.Errorf("join token %s: %w at %s; %s", p.ID, ErrExpired, stamp(p.Expires), remedy(p.Kind, p.Subject))
	}
	return nil
}

// payloadJSON is the payload as it stands in the token; the order of fields is the canonical order of members.
type payloadJSON struct {
	V    int      `json:"v"`
	K    string   `json:"k"`
	TID  string   `json:"tid"`
	ISS  string   `json:"iss"`
	IK   string   `json:"ik"`
	Pin  []string `json:"pin"`
	EP   []string `json:"ep"`
	Sub  string   `json:"sub"`
	Seed string   `json:"seed,omitempty"`
	NBF  int64    `json:"nbf"`
	Exp  int64    `json:"exp"`
	N    int      `json:"n"`
	SC   []string `json:"sc,omitempty"`
}

func (j *payloadJSON) members() map[string]any {
	return map[string]any{
		"v": &j.V, "k": &j.K, "tid": &j.TID, "iss": &j.ISS, "ik": &j.IK, "pin": &j.Pin, "ep": &j.EP, "sub": &j.Sub,
		"seed": &j.Seed, "nbf": &j.NBF, "exp": &j.Exp, "n": &j.N, "sc": &j.SC,
	}
}

func (j payloadJSON) encode() ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(j); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n")), nil
}

var b64 = base64.RawURLEncoding.Strict()

// Parse reads a token and checks everything that can be checked without its issuer and without a clock: form, keys,
// values and signature. White space around the token is ignored. No error shows any part of the token's payload.
func Parse(token string) (Payload, error) {
	raw, sig, err := split(token)
	if err != nil {
		return Payload{}, err
	}
	j, err := decode(raw)
	if err != nil {
		return Payload{}, err
	}
	ik, err := b64.DecodeString(j.IK)
	if err != nil || len(ik) != ed25519.PublicKeySize {
		return Payload{}, malformed("ik is not an Ed25519 public key")
	}
	if !ed25519.Verify(ik, raw, sig) {
		return Payload{}, problem(ErrSignature, "")
	}
	p, err := j.payload(true)
	if err != nil {
		return Payload{}, err
	}
	p.IssuerKey = ik
	if p.reference, err = reference(j, sig); err != nil {
		return Payload{}, err
	}
	return p, nil
}

// parseReference reads what Reference wrote. It checks the form only: the issuer compares it with its Grant.
func parseReference(ref string) (Payload, error) {
	raw, _, err := split(ref)
	if err != nil {
		return Payload{}, err
	}
	j, err := decode(raw)
	if err != nil {
		return Payload{}, err
	}
	return j.payload(false)
}

// reference makes the form without the seed.
func reference(j payloadJSON, sig []byte) (string, error) {
	j.Seed = ""
	raw, err := j.encode()
	if err != nil {
		return "", fmt.Errorf("encode join token: %w", err)
	}
	return join(raw, sig), nil
}

func join(raw, sig []byte) string {
	return prefix + b64.EncodeToString(raw) + "." + b64.EncodeToString(sig)
}

// split takes a token apart by its outer form.
func split(token string) (raw, sig []byte, err error) {
	token = strings.TrimSpace(token)
	if len(token) > maxToken {
		return nil, nil, problem(ErrTooLarge, fmt.Sprintf(" (%d characters, at most %d)", len(token), maxToken))
	}
	rest, ok := strings.CutPrefix(token, prefix)
	if !ok {
		switch number, _, underscore := strings.Cut(strings.TrimPrefix(token, "isth"), "_"); {
		case token != "" && strings.HasPrefix(prefix, token):
			return nil, nil, problem(ErrCut, "")
		case strings.HasPrefix(token, "isth") && underscore && isNumber(number):
			return nil, nil, problem(ErrVersion, " (isth"+number+"_, known: "+prefix+")")
		}
		return nil, nil, malformed("it must begin with " + prefix)
	}
	head, tail, dot := strings.Cut(rest, ".")
	if !dot || len(tail) < signatureLen {
		return nil, nil, problem(ErrCut, "")
	}
	if strings.ContainsAny(rest, "\r\n") { // the decoder would skip them
		return nil, nil, malformed("there is a line break inside")
	}
	if raw, err = b64.DecodeString(head); err != nil {
		return nil, nil, malformed("its first part is not base64url")
	}
	if sig, err = b64.DecodeString(tail); err != nil || len(sig) != ed25519.SignatureSize {
		return nil, nil, malformed("its second part is not a signature")
	}
	if len(raw) > MaxPayload {
		return nil, nil, problem(ErrTooLarge, fmt.Sprintf(" (payload of %d bytes, at most %d)", len(raw), MaxPayload))
	}
	return raw, sig, nil
}

// decode reads the canonical JSON of a payload.
func decode(raw []byte) (payloadJSON, error) {
	var j payloadJSON
	if !utf8.Valid(raw) {
		return j, malformed("its payload is not UTF-8")
	}
	members, seen := j.members(), make(map[string]bool)
	dec := json.NewDecoder(bytes.NewReader(raw))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return j, malformed("its payload is not a JSON object")
	}
	for dec.More() {
		t, err := dec.Token()
		key, isString := t.(string)
		if err != nil || !isString {
			return j, malformed("its payload is not JSON")
		}
		dst, known := members[key]
		switch {
		case !known:
			return j, problem(ErrUnknownKey, fmt.Sprintf(" (%.32q)", key))
		case seen[key]:
			return j, problem(ErrDuplicateKey, fmt.Sprintf(" (%q)", key))
		}
		seen[key] = true
		if err := dec.Decode(dst); err != nil {
			return j, malformed("its payload has a wrong value under " + key)
		}
		if key == "v" && j.V != version {
			return j, problem(ErrVersion, fmt.Sprintf(" (%d, known: %d)", j.V, version))
		}
	}
	if again, err := j.encode(); err != nil || !bytes.Equal(again, raw) {
		return j, malformed("its payload is not in canonical form")
	}
	return j, nil
}

// payload checks the values. withSeed says whether the seed must be there or must not.
func (j payloadJSON) payload(withSeed bool) (Payload, error) {
	p := Payload{
		Version: j.V, Kind: Kind(j.K), ID: j.TID, Issuer: mesh.TrustDomain(j.ISS), Endpoints: j.EP, Subject: j.Sub,
		NotBefore: time.Unix(j.NBF, 0).UTC(), Expires: time.Unix(j.Exp, 0).UTC(), Uses: j.N, Scopes: j.SC,
	}
	for _, pin := range j.Pin {
		b, err := b64.DecodeString(pin)
		if err != nil || len(b) != sha256.Size {
			return Payload{}, malformed("a pin is not a SHA-256")
		}
		p.Pins = append(p.Pins, Pin(b))
	}
	if seed, err := b64.DecodeString(j.Seed); withSeed {
		if err != nil || len(seed) != ed25519.SeedSize {
			return Payload{}, malformed("its seed is not 32 bytes")
		}
		p.Seed = newSeed(seed)
	} else if j.Seed != "" {
		return Payload{}, malformed("it carries a seed, which must never be sent")
	}
	if what := p.check(); what != "" {
		return Payload{}, malformed(what)
	}
	return p, nil
}

// check returns what is wrong with the values that a token and its reference share.
func (p Payload) check() string {
	id, err := b64.DecodeString(p.ID)
	switch {
	case p.Version != version:
		return "v is not 1"
	case err != nil || len(id) != idLen:
		return "tid is not 16 bytes in base64url"
	case !isTrustDomain(string(p.Issuer)):
		return "iss is not a trust domain"
	case len(p.Pins) < 1 || len(p.Pins) > maxPins:
		return "it needs one or two pins"
	case len(p.Endpoints) < 1 || len(p.Endpoints) > maxEndpoints:
		return "it needs one to four endpoints"
	case !isSubject(p.Kind, p.Subject):
		return "k and sub do not name a cluster or a machine"
	case !p.Expires.After(p.NotBefore) || p.Expires.Sub(p.NotBefore) > MaxLifetime || p.NotBefore.Unix() < 0:
		return "nbf and exp are not at most 24 hours apart"
	case p.Uses < 1 || p.Uses > MaxUses || p.Kind == Cluster && p.Uses != 1:
		return "n is out of range"
	case !slices.IsSorted(p.Scopes) || len(slices.Compact(slices.Clone(p.Scopes))) != len(p.Scopes):
		return "sc is not sorted"
	}
	for _, ep := range p.Endpoints {
		if !isHostPort(ep) {
			return "an endpoint is not HOST:PORT"
		}
	}
	for _, sc := range p.Scopes {
		if sc != ScopeExports && sc != ScopeImports {
			return "sc holds an unknown scope"
		}
	}
	return ""
}

// problem is an error about a token; it says what to do.
func problem(err error, detail string) error {
	return fmt.Errorf("join token: %w%s; copy the whole line again, or ask the issuer for a new token: isthmus token create", err, detail)
}

func malformed(what string) error { return problem(ErrMalformed, ": "+what) }

// remedy tells the user how to get another token for the same subject.
func remedy(k Kind, sub string) string {
	if ns, name, ok := strings.Cut(sub, "/"); ok && k == VM {
		return "ask the issuer for a new token: isthmus token create --vm " + name + " --namespace " + ns
	}
	return "ask the issuer for a new token: isthmus token create --for " + sub
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}

func isTrustDomain(s string) bool {
	td, err := spiffeid.TrustDomainFromString(s)
	return err == nil && td.Name() == s && !strings.Contains(s, "_")
}

// isSubject accepts a cluster name (a DNS label) or NAMESPACE/NAME of a machine.
func isSubject(k Kind, sub string) bool {
	switch k {
	case Cluster:
		return mesh.IsLabel(sub)
	case VM:
		ns, name, ok := strings.Cut(sub, "/")
		return ok && mesh.IsLabel(ns) && mesh.IsLabel(name)
	}
	return false
}

func isHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	if err != nil || host == "" || len(s) > 260 || net.JoinHostPort(host, port) != s {
		return false
	}
	for i := range len(host) {
		if c := host[i]; !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte(".-:%", c) >= 0) {
			return false
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0 && strconv.FormatUint(n, 10) == port
}
