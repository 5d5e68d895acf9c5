package install

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

const (
	manager        = "isthmus-install" // owner of the fields that are applied
	partOf         = "app.kubernetes.io/part-of"
	managedBy      = "app.kubernetes.io/managed-by"
	releaseName    = "meta.helm.sh/release-name"
	releaseSpace   = "meta.helm.sh/release-namespace"
	resourcePolicy = "helm.sh/resource-policy"
	networkLabel   = "topology.istio.io/network"
	madeByInstall  = "isthmus.io/made-by-install" // annotation of a namespace that was not there before
)

// State is what became of an object.
type State string

// The states. Kept objects are another installer's, or hold users' objects, and are left alone.
const (
	Created   State = "created"
	Changed   State = "changed"
	Unchanged State = "unchanged"
	Kept      State = "kept"
	Deleted   State = "deleted"
	Missing   State = "missing"
	Ready     State = "ready"
	NotReady  State = "not ready"
)

// Object is one object and what became of it.
type Object struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	State     State  `json:"state"`
	Note      string `json:"note,omitempty"`
}

func report(o *unstructured.Unstructured, s State, note string) Object {
	return Object{Kind: o.GetKind(), Namespace: o.GetNamespace(), Name: o.GetName(), State: s, Note: note}
}

func isDefinition(o *unstructured.Unstructured) bool {
	return o.GetKind() == "CustomResourceDefinition"
}

// marked is what has labels and annotations.
type marked interface {
	GetLabels() map[string]string
	GetAnnotations() map[string]string
}

// owner says whose o is: "" for ours in the namespace, else the one to name.
func owner(o marked, namespace string) string {
	a, l := o.GetAnnotations(), o.GetLabels()
	switch {
	case a[releaseName] == ReleaseName && a[releaseSpace] == namespace:
		return ""
	case a[releaseName] != "":
		return fmt.Sprintf("Helm release %s/%s", a[releaseSpace], a[releaseName])
	case l[partOf] == "isthmus":
		return ""
	case l[managedBy] != "":
		return l[managedBy]
	case l["install.operator.istio.io/owning-resource"] != "" || l["operator.istio.io/component"] != "":
		return "istioctl"
	}
	return "another installer"
}

// owned returns o with the marks by which Helm knows what belongs to a release.
func owned(o *unstructured.Unstructured, namespace string) *unstructured.Unstructured {
	o = o.DeepCopy()
	a := o.GetAnnotations()
	if a == nil {
		a = map[string]string{}
	}
	a[releaseName], a[releaseSpace] = ReleaseName, namespace
	o.SetAnnotations(a)
	l := o.GetLabels()
	if l == nil {
		l = map[string]string{}
	}
	l[managedBy] = "Helm"
	o.SetLabels(l)
	return o
}

// apply makes the cluster's object what o says, with the fields of others left as they are.
func (c *Cluster) apply(ctx context.Context, o *unstructured.Unstructured) (State, error) {
	client, err := c.heads(o)
	if err != nil {
		return "", err
	}
	there, err := head(ctx, client, o)
	if err != nil {
		return "", err
	}
	return patch(ctx, client, there, o)
}

// head returns the metadata of the cluster's object; nil when there is none.
func head(ctx context.Context, client metadata.ResourceInterface, o *unstructured.Unstructured) (*metav1.PartialObjectMetadata, error) {
	there, err := client.Get(ctx, o.GetName(), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("get %s: %w", title(o), err)
	}
	return there, nil
}

// patch applies o, and tells from what was there before whether that has changed anything.
func patch(ctx context.Context, client metadata.ResourceInterface, there *metav1.PartialObjectMetadata, o *unstructured.Unstructured) (State, error) {
	data, err := json.Marshal(o.Object)
	if err != nil {
		return "", fmt.Errorf("apply %s: %w", title(o), err)
	}
	force := true
	after, err := client.Patch(ctx, o.GetName(), types.ApplyPatchType, data, metav1.PatchOptions{FieldManager: manager, Force: &force})
	if err != nil {
		return "", applyError(o, err)
	}
	switch {
	case there == nil:
		return Created, nil
	case there.ResourceVersion == after.ResourceVersion:
		return Unchanged, nil
	}
	return Changed, nil
}

func applyError(o *unstructured.Unstructured, err error) error {
	err = fmt.Errorf("apply %s: %w", title(o), err)
	switch {
	case apierrors.IsForbidden(err):
		return diag.Hint(err, "install with an account that is cluster-admin")
	case apierrors.IsInvalid(err):
		return diag.Hint(err, "where the message says that a field is immutable: isthmus uninstall, then install again; else correct the value it names")
	}
	return err
}

// remove deletes the object; it is no error when it is gone already. What depends on it goes, too.
func (c *Cluster) remove(ctx context.Context, o *unstructured.Unstructured) (State, error) {
	client, err := c.object(o)
	if err != nil {
		return Missing, nil // its kind is gone, and it with it
	}
	policy := metav1.DeletePropagationBackground
	switch err = client.Delete(ctx, o.GetName(), metav1.DeleteOptions{PropagationPolicy: &policy}); {
	case apierrors.IsNotFound(err):
		return Missing, nil
	case err != nil:
		return "", fmt.Errorf("delete %s: %w", title(o), err)
	}
	return Deleted, nil
}

// established waits until the API server serves the definitions.
func (c *Cluster) established(ctx context.Context, crds []*unstructured.Unstructured) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, crd := range crds {
		for {
			why := ""
			if there, err := c.definition(ctx, crd.GetName()); err != nil {
				why = err.Error()
			} else if why = there.established(); why == "" {
				break
			}
			select {
			case <-ctx.Done():
				return diag.Hint(fmt.Errorf("%s is not served: %s", title(crd), why), "kubectl describe crd %s says why", crd.GetName())
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	c.mapper.Reset()
	return nil
}

// condition returns the status of one of the conditions of o.
func condition(o *unstructured.Unstructured, kind string) string {
	status, _ := conditionOf(o, kind)["status"].(string)
	return status
}

func conditionText(o *unstructured.Unstructured, kind string) string {
	c := conditionOf(o, kind)
	reason, _ := c["reason"].(string)
	if message, _ := c["message"].(string); message != "" {
		reason += ": " + message
	}
	return reason
}

func conditionOf(o *unstructured.Unstructured, kind string) map[string]any {
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	i := slices.IndexFunc(list, func(x any) bool {
		m, ok := x.(map[string]any)
		return ok && m["type"] == kind
	})
	if i < 0 {
		return nil
	}
	return list[i].(map[string]any)
}

// sorted returns the names in order.
func sorted(names []string) []string {
	slices.Sort(names)
	return names
}
