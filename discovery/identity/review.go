package identity

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TokenReviewer has a service-account token judged by the API server of a cluster.
type TokenReviewer interface {
	// Review fails with ErrToken when the token is refused, and otherwise when nobody could be asked. An empty cluster is
	// the local one. No error holds any of the token.
	Review(ctx context.Context, cluster mesh.ClusterID, token, audience string) (Reviewed, error)
}

// Reviewed is whom a token belongs to.
type Reviewed struct {
	Username string // system:serviceaccount:NAMESPACE:NAME
	Pod      string // that the token is bound to; may be empty
}

// ReviewConfig describes an Authenticator by service-account tokens of Kubernetes.
type ReviewConfig struct {
	Reviewer    TokenReviewer
	TrustDomain mesh.TrustDomain
	// Keep is how long an answer is used again. Raising it saves requests to API servers and lets a token that was
	// revoked live on for so long. 0 means 10 s.
	Keep time.Duration
	// Timeout bounds one review. 0 means 5 s.
	Timeout time.Duration
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// MetadataCluster is the header of a call that says whose cluster's token it carries, as Istio's agents write it.
const MetadataCluster = "clusterid"

// Bounds of what is kept of reviews.
const (
	maxReviews  = 4096
	keepRefusal = 2 * time.Second
)

// Reviews is an Authenticator by service-account tokens of Kubernetes, made for audience istio-ca.
type Reviews struct {
	c    ReviewConfig
	mu   sync.Mutex
	kept map[[sha256.Size]byte]kept
}

type kept struct {
	caller Caller
	err    error
	until  time.Time
}

// NewReviews returns the Authenticator; it starts nothing.
func NewReviews(c ReviewConfig) *Reviews {
	if c.Keep <= 0 {
		c.Keep = 10 * time.Second
	}
	if c.Timeout <= 0 {
		c.Timeout = 5 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Reviews{c: c, kept: map[[sha256.Size]byte]kept{}}
}

// Authenticate implements Authenticator.
func (r *Reviews) Authenticate(ctx context.Context) (Caller, error) {
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(values) == 0 {
		return Caller{}, ErrNoCredentials
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if len(values) > 1 || !ok || !strings.EqualFold(scheme, "bearer") {
		return Caller{}, fmt.Errorf("%w: want exactly one authorization: Bearer TOKEN", ErrToken)
	}
	token = strings.TrimSpace(token)
	if len(token) > MaxToken {
		return Caller{}, fmt.Errorf("%w: %d bytes, at most %d are allowed", ErrToken, len(token), MaxToken)
	}
	if strings.Count(token, ".") != 2 {
		return Caller{}, fmt.Errorf("%w: it is not a JWT", ErrToken) // nobody needs to be asked
	}
	var cluster mesh.ClusterID
	if ids := metadata.ValueFromIncomingContext(ctx, MetadataCluster); len(ids) > 0 {
		if cluster = mesh.ClusterID(ids[0]); len(cluster) > 253 {
			return Caller{}, fmt.Errorf("%w: the header %s has %d bytes", ErrToken, MetadataCluster, len(cluster))
		}
	}
	key := sha256.Sum256([]byte(string(cluster) + "\x00" + token))
	now := r.c.Now()
	r.mu.Lock()
	k, have := r.kept[key]
	r.mu.Unlock()
	if have && now.Before(k.until) {
		return k.caller, k.err
	}
	caller, err := r.review(ctx, cluster, token)
	switch {
	case err == nil:
		r.keep(key, kept{caller: caller, until: now.Add(r.c.Keep)}, now)
	case errors.Is(err, ErrToken):
		r.keep(key, kept{err: err, until: now.Add(keepRefusal)}, now)
	}
	return caller, err
}

// keep remembers an answer; the oldest go when there are too many.
func (r *Reviews) keep(key [sha256.Size]byte, k kept, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.kept) >= maxReviews {
		for key, old := range r.kept {
			if !now.Before(old.until) {
				delete(r.kept, key)
			}
		}
	}
	for key := range r.kept {
		if len(r.kept) < maxReviews {
			break
		}
		delete(r.kept, key) // any: it will be asked for again
	}
	r.kept[key] = k
}

func (r *Reviews) review(ctx context.Context, cluster mesh.ClusterID, token string) (Caller, error) {
	ctx, cancel := context.WithTimeout(ctx, r.c.Timeout)
	defer cancel()
	who, err := r.c.Reviewer.Review(ctx, cluster, token, Audience)
	if err != nil {
		return Caller{}, err
	}
	rest, ok := strings.CutPrefix(who.Username, "system:serviceaccount:")
	namespace, account, both := strings.Cut(rest, ":")
	w := Workload{Namespace: namespace, ServiceAccount: account, Pod: who.Pod}
	if !ok || !both || w.check() != nil {
		return Caller{}, fmt.Errorf("%w: it is %.80q's, who is no service account", ErrToken, who.Username)
	}
	return Caller{Identity: mesh.SPIFFE(r.c.TrustDomain, namespace, account), Namespace: namespace, ServiceAccount: account, Pod: who.Pod, By: ByToken}, nil
}

// Kept returns how many answers are remembered, the outdated ones among them.
func (r *Reviews) Kept() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.kept)
}
