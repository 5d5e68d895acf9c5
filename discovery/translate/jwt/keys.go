package jwt

import (
	"crypto/ecdh"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"strings"
)

// nobodysKeys is a key that nobody has the private part of. It stands where an issuer's keys are not known, for Envoy
// takes no filter without a key.
const nobodysKeys = `{"keys":[{"kty":"EC","crv":"P-256","kid":"nobody","x":"vP8y3tLcUcU7DbFdLsta3mcnekI2wKn-eWRmAiDqO4g","y":"-_P2n8DgLCz1bS7xeW248zF8qMH1I0Xe0z0oUvvgAyY"}]}`

// key is what of a JSON web key (RFC 7517, RFC 7518 section 6, RFC 8037) says whether Envoy can use it.
type key struct {
	Type  string `json:"kty"`
	Alg   string `json:"alg"`
	Curve string `json:"crv"`
	N     string `json:"n"`
	E     string `json:"e"`
	X     string `json:"x"`
	Y     string `json:"y"`
	K     string `json:"k"`
}

// usable returns the keys of a set, or of a single key, that Envoy can use, as a set; none if there are none.
func usable(text string) (set string, ok bool) {
	var whole struct {
		Type string            `json:"kty"`
		Keys []json.RawMessage `json:"keys"`
	}
	if json.Unmarshal([]byte(text), &whole) != nil {
		return "", false
	}
	if whole.Keys == nil && whole.Type != "" {
		whole.Keys = []json.RawMessage{json.RawMessage(text)}
	}
	var good []string
	for _, raw := range whole.Keys {
		var k key
		if json.Unmarshal(raw, &k) == nil && k.usable() {
			good = append(good, string(raw))
		}
	}
	return `{"keys":[` + strings.Join(good, ",") + `]}`, len(good) > 0
}

// algorithms are the beginnings of the names of those that a type of key is for.
var algorithms = map[string][]string{"RSA": {"RS", "PS"}, "EC": {"ES"}, "oct": {"HS"}, "OKP": {"EdDSA"}}

func (k key) usable() bool {
	fits := k.Alg == ""
	for _, begin := range algorithms[k.Type] {
		fits = fits || strings.HasPrefix(k.Alg, begin)
	}
	if !fits {
		return false
	}
	switch k.Type {
	case "RSA":
		n, e := number(k.N), number(k.E)
		return n != nil && e != nil && n.BitLen() >= 1024 && n.BitLen() <= 8192 && n.Bit(0) == 1 &&
			e.Bit(0) == 1 && e.BitLen() > 1 && e.BitLen() <= 33 // as BoringSSL wants it
	case "EC":
		curve, size := map[string]ecdh.Curve{"P-256": ecdh.P256(), "P-384": ecdh.P384(), "P-521": ecdh.P521()}[k.Curve], map[string]int{"P-256": 32, "P-384": 48, "P-521": 66}[k.Curve]
		x, y := number(k.X), number(k.Y)
		if curve == nil || x == nil || y == nil || x.BitLen() > 8*size || y.BitLen() > 8*size {
			return false
		}
		point := append(append([]byte{4}, x.FillBytes(make([]byte, size))...), y.FillBytes(make([]byte, size))...)
		_, err := curve.NewPublicKey(point)
		return err == nil
	case "OKP":
		x, err := base64.RawURLEncoding.DecodeString(k.X)
		return err == nil && k.Curve == "Ed25519" && len(x) == 32
	case "oct":
		b, err := base64.RawURLEncoding.DecodeString(k.K)
		return err == nil && len(b) > 0
	}
	return false
}

func number(text string) *big.Int {
	b, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(text, "="))
	if err != nil || len(b) == 0 || len(b) > 2048 {
		return nil
	}
	return new(big.Int).SetBytes(b)
}
