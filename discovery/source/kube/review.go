package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Review implements identity.TokenReviewer: the API server of the cluster says whose the token is.
func (s *Source) Review(ctx context.Context, id mesh.ClusterID, token string, audience string) (identity.Reviewed, error) {
	c := s.cluster(id)
	if c == nil {
		return identity.Reviewed{}, diag.Hint(fmt.Errorf("%w: cluster %.80q is not read by this control plane", identity.ErrToken, id), "create its remote secret: isthmus create-remote-secret --name NAME")
	}
	c.mu.Lock()
	conn, up := c.conn, c.up
	c.mu.Unlock()
	if !up { // an answer would be waited for
		if who, err := c.offline(token, audience); err == nil {
			return who, nil
		}
	}
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
	answer := &authenticationv1.TokenReview{}
	err := conn.typed["authentication.k8s.io"].Post().Resource("tokenreviews").Body(review).Do(ctx).Into(answer)
	switch {
	case apierrors.IsForbidden(err):
		return identity.Reviewed{}, diag.Hint(fmt.Errorf("review token in cluster %s: %w", c.id, err), "allow create on tokenreviews.authentication.k8s.io to the account that isthmusd uses there")
	case err != nil && apierrors.ReasonForError(err) == metav1.StatusReasonUnknown: // nobody answered
		if who, offline := c.offline(token, audience); offline == nil || errors.Is(offline, identity.ErrToken) {
			return who, offline
		}
		fallthrough
	case err != nil:
		return identity.Reviewed{}, fmt.Errorf("review token in cluster %s: %w", c.id, err)
	}
	return reviewed(answer.Status, audience)
}

// podName is where Kubernetes says which Pod a token is bound to.
const podName = "authentication.kubernetes.io/pod-name"

func reviewed(st authenticationv1.TokenReviewStatus, audience string) (identity.Reviewed, error) {
	if !st.Authenticated {
		// st.Error may quote the token's claims, which is no secret, but tells the caller more than it needs.
		return identity.Reviewed{}, fmt.Errorf("%w: the API server does not know it, or it is not for audience %s", identity.ErrToken, audience)
	}
	if !slices.Contains(st.Audiences, audience) {
		return identity.Reviewed{}, fmt.Errorf("%w: it is not for audience %s", identity.ErrToken, audience)
	}
	out := identity.Reviewed{Username: st.User.Username}
	if p := st.User.Extra[podName]; len(p) == 1 {
		out.Pod = p[0]
	}
	return out, nil
}

var _ identity.TokenReviewer = (*Source)(nil)
