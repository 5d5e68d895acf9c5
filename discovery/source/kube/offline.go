package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube/signers"
)

// kindSigners names in what is remembered the keys by which tokens are checked.
const kindSigners = "token signers"

// signersAfter is the time between two looks at who signs tokens.
const signersAfter = 10 * time.Minute

// learnSigners asks who signs the tokens of the cluster, now and then. A server that does not tell it is no problem:
// tokens are only checked so while it cannot be asked itself.
func (c *cluster) learnSigners(ctx context.Context, conn *connection) {
	c.mu.Lock()
	due := time.Since(c.copy.looked) > signersAfter
	if due {
		c.copy.looked = time.Now()
	}
	c.mu.Unlock()
	if !due {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	set, err := signers.Fetch(ctx, conn.http, conn.base)
	if err != nil {
		c.log.Debug("who signs tokens is not known", "err", err)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.copy.signers = set
	c.copy.revision++
}

// offline judges a token while the API server is away: it must be signed by one of its keys, and bound to a Pod that
// is known, of that service account. That is all that can be known of it; what was deleted since cannot have been.
func (c *cluster) offline(token, audience string) (identity.Reviewed, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.up || c.copy.signers == nil {
		return identity.Reviewed{}, fmt.Errorf("it cannot be judged without the API server of cluster %s", c.id)
	}
	who, err := c.copy.signers.Verify(token, audience, time.Now())
	if err != nil {
		return identity.Reviewed{}, fmt.Errorf("%w: %w", identity.ErrToken, err)
	}
	for _, t := range c.tables {
		if t.name != kindPod {
			continue
		}
		if e := t.entries[who.Namespace+"/"+who.Pod]; e != nil {
			if p, ok := e.kept.(*placeless); ok && p.workload != nil && p.workload.ServiceAccount == who.ServiceAccount {
				return identity.Reviewed{Username: "system:serviceaccount:" + who.Namespace + ":" + who.ServiceAccount, Pod: who.Pod}, nil
			}
		}
	}
	return identity.Reviewed{}, fmt.Errorf("%w: its pod is not known, and the API server of cluster %s is away", identity.ErrToken, c.id)
}

// rememberSigners takes what an earlier process learnt. The caller holds mu.
func (c *cluster) rememberSigners(o Object) {
	set := &signers.Set{}
	if err := json.Unmarshal(o.Body, set); err != nil {
		c.log.Warn("who signs tokens is not remembered", "err", err)
		return
	}
	if c.copy.signers == nil {
		c.copy.signers = set
	}
}
