package authority

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"time"
)

// Phases of a CA.
const (
	Steady  = "steady"  // one authority, its root trusted
	Telling = "telling" // another root is told to everybody, and does not sign yet
	Overlap = "overlap" // what signed before is trusted still
)

// Trusted is one root certificate that is trusted.
type Trusted struct {
	Subject     string
	Fingerprint string // SHA-256 of the certificate, hexadecimal
	State       string // signs, next, old
	NotAfter    time.Time
	Until       time.Time // of an old one: trusted for so long
}

// Status is where the CA stands.
type Status struct {
	Phase   string
	Given   string // where the CA comes from; empty: made here
	Roots   []Trusted
	Started time.Time // of a rotation under way
	By      string
	Lags    []Lag
	Expires time.Time // of the chain that signs
}

// Status returns where the CA stands.
func (a *Authority) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	by := a.ca.Authority()
	out := Status{Phase: Steady, Expires: by.Expires(), Lags: a.lags}
	if a.given != nil {
		out.Given = a.from
	}
	seen := map[string]bool{}
	add := func(pems []byte, state string, until time.Time) {
		for block, rest := pem.Decode(pems); block != nil; block, rest = pem.Decode(rest) {
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				continue
			}
			sum := sha256.Sum256(c.Raw)
			print := hex.EncodeToString(sum[:])
			if !seen[print] {
				seen[print] = true
				out.Roots = append(out.Roots, Trusted{Subject: c.Subject.String(), Fingerprint: print, State: state, NotAfter: c.NotAfter, Until: until})
			}
		}
	}
	add(by.Roots(), "signs", time.Time{})
	if a.next != nil {
		out.Phase, out.Started = Telling, a.since
		if a.own != nil {
			out.Started, out.By = a.own.Started, a.own.By
		}
		add(a.next.Roots(), "next", time.Time{})
	}
	for _, e := range a.roots {
		if e.ID != by.ID() && time.Now().Before(e.Until) {
			if out.Phase == Steady {
				out.Phase = Overlap
			}
			add([]byte(e.Roots), "old", e.Until)
		}
	}
	return out
}

// Fingerprints returns the SHA-256 of each certificate in PEM, hexadecimal.
func Fingerprints(pems []byte) []string {
	out := []string{}
	for block, rest := pem.Decode(pems); block != nil; block, rest = pem.Decode(rest) {
		sum := sha256.Sum256(block.Bytes)
		out = append(out, hex.EncodeToString(sum[:]))
	}
	return out
}
