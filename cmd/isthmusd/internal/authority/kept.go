package authority

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Kept is what a start without the API needs: what signs, and whom to trust.
type Kept struct {
	// Given: the operator gave it.
	Given bool `json:"given,omitempty"`
	// Data is the content of its Secret, private key and all.
	Data  map[string][]byte `json:"data"`
	Roots []Root            `json:"roots"`
}

// String keeps the key out of every kind of output.
func (Kept) String() string { return "[redacted]" }

// GoString returns [redacted].
func (Kept) GoString() string { return "[redacted]" }

// Kept returns what a start without the API needs. It is not to be called while Run runs, which tells its Listener.
func (a *Authority) Kept() Kept {
	return Kept{Given: a.given != nil, Data: a.used, Roots: slices.Clone(a.roots)}
}

// Resume returns the CA to start with while the API is away.
func (a *Authority) Resume(k Kept, tokenKey []byte) (*identity.CA, error) {
	conf := a.cfg.identity()
	var err error
	if a.ca, err = identity.New(conf, "as it was kept", identity.MaterialOf(k.Data), tokenKey); err != nil {
		return nil, err
	}
	a.from, a.used, a.roots = "as it was kept", k.Data, k.Roots
	if k.Given {
		a.given = k.Data
	}
	return a.ca, a.ca.Use(a.ca.Authority(), a.others(a.ca.Authority()))
}

// told has what is needed for a start kept.
func (a *Authority) told() {
	if a.l.Keep != nil {
		a.l.Keep(a.Kept())
	}
}

// Confirm brings what Resume began with in line with the API, which is back. It fails with ErrOther when the API has
// another CA than was kept.
func (a *Authority) Confirm(ctx context.Context) error {
	if a.given == nil {
		given, _, err := a.keeper.Given(ctx)
		if err != nil {
			return err
		}
		if given == nil {
			held, err := a.cfg.Client.EnsureSecret(ctx, OwnSecret, func(held map[string][]byte) (map[string][]byte, error) {
				if len(held) > 0 {
					return nil, nil
				}
				return a.used, nil
			})
			if err != nil {
				return err
			}
			if !bytes.Equal(held[PartCert], a.used[PartCert]) {
				return diag.Hint(fmt.Errorf("%w: Secret %s/%s", ErrOther, a.cfg.Client.Namespace(), OwnSecret), "it is used when isthmusd has started again")
			}
		}
	}
	return a.note(ctx, a.ca.Authority())
}

// ErrOther is wrapped when the API has other keys than were kept.
var ErrOther = errors.New("the API server has other keys than were kept")
