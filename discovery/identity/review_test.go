package identity_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// fakeReviewer knows tokens by cluster.
type fakeReviewer struct {
	mu    sync.Mutex
	users map[string]identity.Reviewed // "CLUSTER/TOKEN"
	fail  error
	asked int
}

func (f *fakeReviewer) Review(_ context.Context, cluster mesh.ClusterID, token, audience string) (identity.Reviewed, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	if f.fail != nil {
		return identity.Reviewed{}, f.fail
	}
	if u, ok := f.users[string(cluster)+"/"+token]; ok && audience == identity.Audience {
		return u, nil
	}
	return identity.Reviewed{}, fmt.Errorf("%w: unknown", identity.ErrToken)
}

func call(pairs ...string) context.Context {
	return metadata.NewIncomingContext(context.Background(), metadata.Pairs(pairs...))
}

func TestReviews(t *testing.T) {
	f := &fakeReviewer{users: map[string]identity.Reviewed{
		"/a.b.c":      {Username: "system:serviceaccount:shop:caller", Pod: "caller-1"},
		"birch/a.b.c": {Username: "system:serviceaccount:far:other"},
		"/u.s.r":      {Username: "admin"},
		"/e.v.l":      {Username: "system:serviceaccount:shop:../../ns/x"},
	}}
	now := time.Unix(1000, 0)
	r := identity.NewReviews(identity.ReviewConfig{Reviewer: f, TrustDomain: "amber.mesh", Now: func() time.Time { return now }})
	for _, c := range []struct {
		name    string
		ctx     context.Context
		want    string // identity
		refused error
	}{
		{"local", call("authorization", "Bearer a.b.c"), "spiffe://amber.mesh/ns/shop/sa/caller", nil},
		{"of another cluster", call("authorization", "bearer a.b.c", "clusterid", "birch"), "spiffe://amber.mesh/ns/far/sa/other", nil},
		{"of a cluster that is not read", call("authorization", "Bearer a.b.c", "clusterid", "cedar"), "", identity.ErrToken},
		{"of no service account", call("authorization", "Bearer u.s.r"), "", identity.ErrToken},
		{"of a name that is none", call("authorization", "Bearer e.v.l"), "", identity.ErrToken},
		{"no token", call(), "", identity.ErrNoCredentials},
		{"two tokens", call("authorization", "Bearer a.b.c", "authorization", "Bearer a.b.c"), "", identity.ErrToken},
		{"another scheme", call("authorization", "Basic a.b.c"), "", identity.ErrToken},
		{"no JWT", call("authorization", "Bearer abc"), "", identity.ErrToken},
		{"too long", call("authorization", "Bearer a.b."+strings.Repeat("c", identity.MaxToken)), "", identity.ErrToken},
		{"a cluster name too long", call("authorization", "Bearer a.b.c", "clusterid", strings.Repeat("c", 254)), "", identity.ErrToken},
	} {
		got, err := r.Authenticate(c.ctx)
		if got.Identity != c.want || !errors.Is(err, c.refused) || (c.refused == nil) != (err == nil) {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
	if got, _ := r.Authenticate(call("authorization", "Bearer a.b.c")); got.Pod != "caller-1" || got.By != identity.ByToken {
		t.Errorf("the caller is %+v", got)
	}

	// Answers are used again for a while, failures to ask are not.
	asked := f.asked
	_, _ = r.Authenticate(call("authorization", "Bearer a.b.c"))
	if f.asked != asked {
		t.Error("an answer is asked for again at once")
	}
	now = now.Add(11 * time.Second)
	delete(f.users, "/a.b.c")
	if _, err := r.Authenticate(call("authorization", "Bearer a.b.c")); !errors.Is(err, identity.ErrToken) {
		t.Errorf("a token that was revoked: %v", err)
	}
	f.fail = errors.New("the API server is away")
	for range 2 {
		asked = f.asked
		if _, err := r.Authenticate(call("authorization", "Bearer x.y.z")); err == nil || errors.Is(err, identity.ErrToken) || f.asked == asked {
			t.Errorf("while nobody can be asked: %v, asked %d times", err, f.asked-asked)
		}
	}
}

// TestReviewsBounded shows more tokens than are kept.
func TestReviewsBounded(t *testing.T) {
	f := &fakeReviewer{users: map[string]identity.Reviewed{}}
	r := identity.NewReviews(identity.ReviewConfig{Reviewer: f, TrustDomain: "amber.mesh"})
	for i := range 10_000 {
		_, _ = r.Authenticate(call("authorization", fmt.Sprintf("Bearer a.%d.c", i)))
	}
	if n := r.Kept(); n > 4096 {
		t.Errorf("%d answers are kept", n)
	}
}
