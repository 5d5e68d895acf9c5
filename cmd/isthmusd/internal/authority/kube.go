package authority

import (
	"context"

	"github.com/isthmus-mesh/isthmus/federation/kubestate"
)

// Objects in the root namespace; the first two have Istio's names and form.
const (
	GivenSecret = "cacerts"
	OwnSecret   = "istio-ca-secret"
	rootsMap    = "isthmus-ca-roots"
	rootsKey    = "roots.json"
)

// kube keeps one authority for all replicas: the given one (Secret cacerts, or a folder), else one that the first replica
// made. It is a keeper.
type kube struct {
	client *kubestate.Client
	dir    string
}

// Given implements keeper.
func (k kube) Given(ctx context.Context) (map[string][]byte, string, error) {
	if k.dir != "" {
		if parts, err := ReadGiven(k.dir); err != nil || parts != nil {
			return parts, "in " + k.dir, err
		}
	}
	parts, err := k.client.Secret(ctx, GivenSecret)
	return parts, "in Secret " + k.client.Namespace() + "/" + GivenSecret, err
}

// Own implements keeper.
func (k kube) Own(ctx context.Context, change func(map[string][]byte) (bool, error)) (map[string][]byte, error) {
	if change == nil {
		return k.client.Secret(ctx, OwnSecret)
	}
	return k.client.UpdateSecret(ctx, OwnSecret, change)
}

// Roots implements keeper.
func (k kube) Roots(ctx context.Context, change func(string) (string, bool)) error {
	return k.client.UpdateConfigMap(ctx, rootsMap, func(data map[string]string) bool {
		text, write := change(data[rootsKey])
		if write {
			data[rootsKey] = text
		}
		return write
	})
}
