package token

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Errors of Grants.
var (
	ErrNoGrant = errors.New("no such token")
	ErrExists  = errors.New("the token exists already")
)

// State is what has become of a token.
type State string

// The states of a grant.
const (
	Issued   State = "issued"
	Redeemed State = "redeemed" // as often as it may be
	Revoked  State = "revoked"
	Expired  State = "expired" // and not redeemed
)

// Machine is the identity that a token for a machine stands for. The joiner cannot change it.
type Machine struct {
	Name           string            `json:"name"`
	Namespace      string            `json:"namespace"`
	ServiceAccount string            `json:"serviceAccount"`
	Labels         map[string]string `json:"labels,omitempty"`
	Ports          map[string]uint32 `json:"ports,omitempty"`
	Network        mesh.NetworkID    `json:"network,omitempty"` // empty: the cluster's
}

// Redemption says who redeemed a token.
type Redemption struct {
	Key  []byte    `json:"key"`  // SHA-256 of the joiner's public key: the federation key, or that of the CSR (PKIX)
	Name string    `json:"name"` // the cluster's name, or the machine's host name as it says
	From string    `json:"from"` // address of the connection
	At   time.Time `json:"at"`   // by the issuer's clock
}

// String returns who redeemed and when, as shown to users.
func (r Redemption) String() string {
	return fmt.Sprintf("%q (key %.4x) from %s at %s", r.Name, r.Key, r.From, stamp(r.At))
}

// Grant is the issuer's half of a token. It holds nothing that joins.
type Grant struct {
	ID          string            `json:"id"`
	Kind        Kind              `json:"kind"`
	Subject     string            `json:"subject"`
	Issuer      mesh.TrustDomain  `json:"issuer"`
	SeedPublic  ed25519.PublicKey `json:"seedPublic"` // public half of the seed
	Reference   []byte            `json:"reference"`  // SHA-256 of the token's reference
	NotBefore   time.Time         `json:"notBefore"`
	Expires     time.Time         `json:"expires"`
	Uses        int               `json:"uses"`
	Scopes      []string          `json:"scopes,omitempty"`
	AutoApprove bool              `json:"autoApprove,omitempty"`
	Machine     *Machine          `json:"machine,omitempty"` // of kind VM
	CreatedBy   string            `json:"createdBy,omitempty"`
	Redemptions []Redemption      `json:"redemptions,omitempty"`
	RevokedAt   time.Time         `json:"revokedAt,omitzero"`
	RevokedBy   string            `json:"revokedBy,omitempty"`
}

// State says what has become of the grant at now.
func (g Grant) State(now time.Time) State {
	switch {
	case !g.RevokedAt.IsZero():
		return Revoked
	case len(g.Redemptions) >= g.Uses:
		return Redeemed
	case !now.Before(g.Expires):
		return Expired
	}
	return Issued
}

// redeemedBy returns the redemption by key, or nil.
func (g Grant) redeemedBy(key []byte) *Redemption {
	for i := range g.Redemptions {
		if bytes.Equal(g.Redemptions[i].Key, key) {
			return &g.Redemptions[i]
		}
	}
	return nil
}

// Store keeps grants as bytes. It uses builtin types only, so that any package implements it without importing this
// one. Versions are the store's own; each write of a key gives it a version it never had.
type Store interface {
	// Get returns nil and version 0 for a key that is not there.
	Get(key string) (value []byte, version uint64, err error)
	// CAS writes value if the key still has that version (0: it must not be there), durably before it returns.
	CAS(key string, value []byte, version uint64) error
	// List returns every key with that prefix and its value; with an error, those that it could read.
	List(prefix string) (map[string][]byte, error)
	// Delete removes a key; one that is not there is no error.
	Delete(key string) error
}

const grantPrefix = "grant/"

// Grants are the tokens that an issuer gave out.
type Grants struct{ store Store }

// NewGrants keeps grants in store under keys that begin with "grant/".
func NewGrants(store Store) *Grants { return &Grants{store: store} }

// Put stores a new grant; it fails with ErrExists when there is one with the same ID.
func (g *Grants) Put(grant Grant) error {
	if old, _, err := g.get(grant.ID); err == nil {
		return fmt.Errorf("token %s: %w", old.ID, ErrExists)
	} else if !errors.Is(err, ErrNoGrant) {
		return err
	}
	return g.cas(grant, 0)
}

// Get returns a grant; it fails with ErrNoGrant when there is none.
func (g *Grants) Get(id string) (Grant, error) {
	grant, _, err := g.get(id)
	return grant, err
}

// List returns all grants, those that expire last first. Those that cannot be read are left out and named in the error.
func (g *Grants) List() ([]Grant, error) {
	values, err := g.store.List(grantPrefix)
	var out []Grant
	var errs []error
	if err != nil {
		errs = append(errs, fmt.Errorf("list tokens: %w", err))
	}
	for key, value := range values {
		var grant Grant
		if err := json.Unmarshal(value, &grant); err != nil {
			errs = append(errs, fmt.Errorf("token %s in the store does not decode: %w", strings.TrimPrefix(key, grantPrefix), err))
			continue
		}
		out = append(out, grant)
	}
	slices.SortFunc(out, func(a, b Grant) int {
		if c := b.Expires.Compare(a.Expires); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out, errors.Join(errs...)
}

// Revoke makes the token worthless from now on; who redeemed it before stays a member. Revoking twice changes nothing.
func (g *Grants) Revoke(ctx context.Context, id, by string, now time.Time) (Grant, error) {
	return g.update(ctx, id, func(grant *Grant) (bool, error) {
		if !grant.RevokedAt.IsZero() {
			return false, nil
		}
		grant.RevokedAt, grant.RevokedBy = now.UTC(), by
		return true, nil
	})
}

// Delete forgets a grant: its token becomes unknown.
func (g *Grants) Delete(id string) error {
	if err := g.store.Delete(grantPrefix + id); err != nil {
		return fmt.Errorf("delete token %s: %w", id, err)
	}
	return nil
}

func (g *Grants) get(id string) (Grant, uint64, error) {
	value, version, err := g.store.Get(grantPrefix + id)
	if err != nil {
		return Grant{}, 0, fmt.Errorf("look up token %s: %w", id, err)
	}
	if version == 0 {
		return Grant{}, 0, fmt.Errorf("token %s: %w", id, ErrNoGrant)
	}
	var grant Grant
	if err := json.Unmarshal(value, &grant); err != nil {
		return Grant{}, 0, fmt.Errorf("token %s in the store does not decode: %w", id, err)
	}
	return grant, version, nil
}

func (g *Grants) cas(grant Grant, version uint64) error {
	value, err := json.Marshal(grant)
	if err != nil {
		return fmt.Errorf("encode token %s: %w", grant.ID, err)
	}
	if err := g.store.CAS(grantPrefix+grant.ID, value, version); err != nil {
		return fmt.Errorf("write token %s: %w", grant.ID, err)
	}
	return nil
}

// update changes a grant by compare-and-swap. change works on a fresh copy each time and says whether to write.
func (g *Grants) update(ctx context.Context, id string, change func(*Grant) (bool, error)) (Grant, error) {
	for {
		grant, version, err := g.get(id)
		if err != nil {
			return Grant{}, err
		}
		write, err := change(&grant)
		if err != nil || !write {
			return grant, err
		}
		failed := g.cas(grant, version)
		if failed == nil {
			return grant, nil
		}
		// Somebody else was first, or the store is broken: the version tells.
		if _, now, err := g.get(id); err != nil || now == version {
			return Grant{}, failed
		}
		if err := ctx.Err(); err != nil {
			return Grant{}, fmt.Errorf("write token %s: %w", id, err)
		}
	}
}

// Memory is a Store that is lost with the process.
type Memory struct {
	mu      sync.Mutex
	version uint64
	values  map[string]memoryValue
}

type memoryValue struct {
	bytes   []byte
	version uint64
}

// Get implements Store.
func (m *Memory) Get(key string) ([]byte, uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.values[key]
	return bytes.Clone(v.bytes), v.version, nil
}

// CAS implements Store.
func (m *Memory) CAS(key string, value []byte, version uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now := m.values[key].version; now != version {
		return fmt.Errorf("key %s has version %d, not %d", key, now, version)
	}
	if m.values == nil {
		m.values = make(map[string]memoryValue)
	}
	m.version++
	m.values[key] = memoryValue{bytes: bytes.Clone(value), version: m.version}
	return nil
}

// List implements Store.
func (m *Memory) List(prefix string) (map[string][]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make(map[string][]byte)
	for key, v := range m.values {
		if strings.HasPrefix(key, prefix) {
			out[key] = bytes.Clone(v.bytes)
		}
	}
	return out, nil
}

// Delete implements Store.
func (m *Memory) Delete(key string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.values, key)
	return nil
}
