package token

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// IssueConfig says what a new token is for.
type IssueConfig struct {
	Kind        Kind
	TrustDomain mesh.TrustDomain // of the issuer
	Key         crypto.Signer    // the issuer's federation key, Ed25519
	Pins        []Pin            // of the join endpoint: its own key, or better the CA that signs it (see PinOf)
	Endpoints   []string         // host:port of the issuer's gateways, at most four
	Subject     string           // the cluster's name; for a machine it is taken from Machine
	Machine     *Machine         // of kind VM
	Lifetime    time.Duration    // a longer one leaves a leaked token useful for longer; 0: 15 minutes; at most 24 hours
	Uses        int              // 0: 1; more only for machines, at most 100
	Scopes      []string         // empty: exports and imports
	AutoApprove bool             // the peer is admitted without waiting for an operator
	CreatedBy   string           // shown in lists
	Now         time.Time        // zero: time.Now()
	Rand        io.Reader        // nil: crypto/rand
}

// Issue makes a token and its grant. It stores nothing: put the grant before the token is shown.
func Issue(c IssueConfig) (string, Grant, error) {
	if c.Now.IsZero() {
		c.Now = time.Now()
	}
	if c.Lifetime == 0 {
		c.Lifetime = DefaultLifetime
	}
	if c.Rand == nil {
		c.Rand = rand.Reader
	}
	c.Uses = max(c.Uses, 1)
	if c.Kind == VM {
		if c.Machine == nil || !mesh.IsLabel(c.Machine.ServiceAccount) {
			return "", Grant{}, fmt.Errorf("token for a machine: it needs a name, a namespace and a service account, each a DNS label: isthmus token create --vm NAME --namespace NS --service-account SA")
		}
		c.Subject = c.Machine.Namespace + "/" + c.Machine.Name
	}
	j, err := c.payload()
	if err != nil {
		return "", Grant{}, err
	}
	raw, err := j.encode()
	if err != nil {
		return "", Grant{}, fmt.Errorf("encode token for %s: %w", c.Subject, err)
	}
	if len(raw) > MaxPayload {
		return "", Grant{}, fmt.Errorf("token for %s: its payload has %d bytes, %d are allowed; give fewer or shorter endpoints: %w", c.Subject, len(raw), MaxPayload, ErrTooLarge)
	}
	sig, err := c.Key.Sign(c.Rand, raw, crypto.Hash(0))
	if err != nil {
		return "", Grant{}, fmt.Errorf("sign token for %s: %w", c.Subject, err)
	}
	token := join(raw, sig)
	p, err := Parse(token) // whatever is wrong with the configuration shows here, before anybody gets the token
	if err != nil {
		return "", Grant{}, fmt.Errorf("token for %s: %w", c.Subject, err)
	}
	digest := sha256.Sum256([]byte(p.reference))
	return token, Grant{
		ID: p.ID, Kind: p.Kind, Subject: p.Subject, Issuer: p.Issuer, SeedPublic: p.Seed.key().Public().(ed25519.PublicKey),
		Reference: digest[:], NotBefore: p.NotBefore, Expires: p.Expires, Uses: p.Uses, Scopes: p.Scopes,
		AutoApprove: c.AutoApprove, Machine: c.Machine, CreatedBy: c.CreatedBy,
	}, nil
}

func (c IssueConfig) payload() (payloadJSON, error) {
	var public ed25519.PublicKey
	if c.Key != nil {
		public, _ = c.Key.Public().(ed25519.PublicKey)
	}
	secret := make([]byte, idLen+ed25519.SeedSize)
	_, err := io.ReadFull(c.Rand, secret)
	j := payloadJSON{
		V: version, K: string(c.Kind), TID: b64.EncodeToString(secret[:idLen]), ISS: string(c.TrustDomain),
		IK: b64.EncodeToString(public), Pin: []string{}, EP: slices.Clone(c.Endpoints), Sub: c.Subject,
		Seed: b64.EncodeToString(secret[idLen:]), NBF: c.Now.Unix(), N: c.Uses, SC: slices.Compact(slices.Sorted(slices.Values(c.Scopes))),
	}
	j.Exp = j.NBF + int64(c.Lifetime/time.Second)
	for _, pin := range c.Pins {
		j.Pin = append(j.Pin, b64.EncodeToString(pin[:]))
	}
	var what string
	switch {
	case err != nil:
		return j, fmt.Errorf("token for %s: no randomness: %w", c.Subject, err)
	case public == nil:
		what = "the issuer's federation key is not Ed25519"
	case c.Kind != Cluster && c.Kind != VM:
		what = fmt.Sprintf("kind %q is neither cluster nor vm", c.Kind)
	case !isSubject(c.Kind, c.Subject):
		what = "the name must be a DNS label: lower case letters, digits and hyphens, at most 63"
	case c.Lifetime < time.Second || c.Lifetime > MaxLifetime:
		what = fmt.Sprintf("lifetime %s is not between 1s and %s", c.Lifetime, MaxLifetime)
	case c.Kind == Cluster && c.Uses != 1:
		what = "a token for a cluster is good once; create one for each cluster"
	case c.Uses > MaxUses:
		what = fmt.Sprintf("%d uses, at most %d are allowed", c.Uses, MaxUses)
	case len(c.Endpoints) == 0:
		what = "this cluster has no east-west gateway address to put into it; set gateways in isthmusd's configuration"
	case len(c.Endpoints) > maxEndpoints:
		what = fmt.Sprintf("%d endpoints, at most %d are allowed", len(c.Endpoints), maxEndpoints)
	}
	if what != "" {
		return j, fmt.Errorf("token for %s %q: %s", c.Kind, c.Subject, what)
	}
	return j, nil
}
