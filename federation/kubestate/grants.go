package kubestate

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/api/isthmus/v1alpha1"
)

// ErrVersion is wrapped by CAS when the key has another version than the caller believed.
var ErrVersion = errors.New("changed by somebody else")

const grantPrefix = "grant/"

// Grants keeps the grants of join tokens as JoinGrant objects. It is a token.Store: keys are "grant/ID", values the
// JSON of a grant, versions the resource versions of the objects, which the API server gives out once and in order.
// It is safe for concurrent use, also by several replicas.
type Grants struct{ c *Client }

// Grants returns the store of grants.
func (c *Client) Grants() *Grants { return &Grants{c} }

// objectName gives the name of the object for a key: an ID is base64url, which names of objects are not.
func objectName(key string) (string, error) {
	id, ok := strings.CutPrefix(key, grantPrefix)
	raw, err := base64.RawURLEncoding.DecodeString(id)
	if !ok || err != nil || len(raw) != 16 {
		return "", fmt.Errorf("%.80q is not the key of a grant: want grant/ and 16 bytes in base64url", key)
	}
	return "token-" + hex.EncodeToString(raw), nil
}

// grant is the JSON of a grant: both halves of the object in one.
type grant struct {
	v1alpha1.JoinGrantSpec
	v1alpha1.JoinGrantStatus
}

// Get implements token.Store.
func (g *Grants) Get(key string) ([]byte, uint64, error) {
	name, err := objectName(key)
	if err != nil {
		return nil, 0, err
	}
	o, err := g.get(name)
	if apierrors.IsNotFound(err) && !isMissingResource(err) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, g.c.explain("read", "JoinGrant", name, err)
	}
	version, err := strconv.ParseUint(o.ResourceVersion, 10, 64)
	if err != nil || version == 0 {
		return nil, 0, g.c.explain("read", "JoinGrant", name, fmt.Errorf("its resource version %.40q is not a number", o.ResourceVersion))
	}
	value, err := json.Marshal(grant{o.Spec, o.Status})
	return value, version, err
}

func (g *Grants) get(name string) (*v1alpha1.JoinGrant, error) {
	ctx, cancel := timeout()
	defer cancel()
	o := new(v1alpha1.JoinGrant)
	err := g.c.resources.Get().Namespace(g.c.namespace).Resource(v1alpha1.JoinGrantResource).Name(name).Do(ctx).Into(o)
	return o, err
}

// CAS implements token.Store. What was granted never changes: only the status of an object that exists is written.
func (g *Grants) CAS(key string, value []byte, version uint64) error {
	name, err := objectName(key)
	if err != nil {
		return err
	}
	var in grant
	if err := json.Unmarshal(value, &in); err != nil {
		return fmt.Errorf("JoinGrant %s/%s: the grant does not decode: %w", g.c.namespace, name, err)
	}
	o := &v1alpha1.JoinGrant{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "JoinGrant"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: g.c.namespace, Labels: managedBy}, Spec: in.JoinGrantSpec, Status: in.JoinGrantStatus,
	}
	ctx, cancel := timeout()
	defer cancel()
	at := func(verb string, err error) error {
		if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) || apierrors.IsNotFound(err) && !isMissingResource(err) {
			err = fmt.Errorf("%w: %w", ErrVersion, err)
		}
		return g.c.explain(verb, "JoinGrant", name, err)
	}
	if version == 0 {
		if len(in.Redemptions) > 0 || !in.RevokedAt.IsZero() {
			return at("create", errors.New("a new grant has a history already"))
		}
		if err := g.c.resources.Post().Namespace(g.c.namespace).Resource(v1alpha1.JoinGrantResource).Body(o).Do(ctx).Error(); err != nil {
			return at("create", err)
		}
		return nil
	}
	o.ResourceVersion = strconv.FormatUint(version, 10)
	if err := g.c.resources.Put().Namespace(g.c.namespace).Resource(v1alpha1.JoinGrantResource).Name(name).SubResource("status").Body(o).Do(ctx).Error(); err != nil {
		return at("write", err)
	}
	return nil
}

// List implements token.Store.
func (g *Grants) List(prefix string) (map[string][]byte, error) {
	ctx, cancel := timeout()
	defer cancel()
	out := map[string][]byte{}
	err := list(ctx, g.c, v1alpha1.JoinGrantResource, func(l *v1alpha1.JoinGrantList) error {
		for i := range l.Items {
			o := &l.Items[i]
			value, err := json.Marshal(grant{o.Spec, o.Status})
			if key := grantPrefix + o.Spec.ID; err == nil && strings.HasPrefix(key, prefix) {
				out[key] = value
			}
		}
		return nil
	})
	if err != nil {
		return nil, g.c.explain("list", "JoinGrants", "", err)
	}
	return out, nil
}

// Delete implements token.Store.
func (g *Grants) Delete(key string) error {
	name, err := objectName(key)
	if err != nil {
		return err
	}
	ctx, cancel := timeout()
	defer cancel()
	err = g.c.resources.Delete().Namespace(g.c.namespace).Resource(v1alpha1.JoinGrantResource).Name(name).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return g.c.explain("delete", "JoinGrant", name, err)
	}
	return nil
}
