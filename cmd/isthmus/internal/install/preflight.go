package install

import (
	"context"
	"fmt"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/version"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// oldest is the first Kubernetes whose API has all that the chart uses.
const oldest = "1.28"

// Preflight finds out whether the manifest can be installed, before anything is changed. It returns what to tell the
// operator beside errors.
func (c *Cluster) Preflight(ctx context.Context, m *Manifest) (warnings []string, err error) {
	if err := c.supported(); err != nil {
		return nil, err
	}
	if err := c.namespaceUsable(ctx, m); err != nil {
		return nil, err
	}
	if err := c.rights(ctx, m); err != nil {
		return nil, err
	}
	if err := c.noIstio(ctx, m.Namespace); err != nil {
		return nil, err
	}
	return c.conflicts(ctx, m)
}

func (c *Cluster) supported() error {
	have, err := version.ParseGeneric(c.Version)
	if err != nil {
		return fmt.Errorf("context %s: the API server's version %q cannot be read: %w", c.Context, c.Version, err)
	}
	if have.LessThan(version.MustParseGeneric(oldest)) {
		return diag.Hint(fmt.Errorf("context %s: Kubernetes %s is older than %s", c.Context, c.Version, oldest), "upgrade the cluster first")
	}
	return nil
}

func (c *Cluster) namespaceUsable(ctx context.Context, m *Manifest) error {
	ns, err := c.get(ctx, namespaces, "", m.Namespace)
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return diag.Hint(fmt.Errorf("get namespace %s: %w", m.Namespace, err), "install with an account that is cluster-admin")
	case ns.GetDeletionTimestamp() != nil:
		return diag.Hint(fmt.Errorf("namespace %s is being deleted", m.Namespace), "wait until it is gone: kubectl wait --for=delete namespace/%s", m.Namespace)
	}
	have, want := ns.GetLabels()[networkLabel], m.network()
	if have != "" && want != "" && have != want {
		return diag.Hint(fmt.Errorf("namespace %s has the label %s=%s, the values say network %s", m.Namespace, networkLabel, have, want),
			"set cluster.network=%s, or remove the label", have)
	}
	return nil
}

// network returns the network that the values name.
func (m *Manifest) network() string {
	if n, _, _ := unstructured.NestedString(m.Values, "cluster", "network"); n != "" {
		return n
	}
	n, _, _ := unstructured.NestedString(m.Values, "cluster", "name")
	return n
}

// rights asks whether the account may do all that an installation does.
func (c *Cluster) rights(ctx context.Context, m *Manifest) error {
	if ok, err := c.may(ctx, "*", "*", "*", ""); err != nil || ok {
		return err
	}
	type right struct{ group, resource, namespace string }
	need := map[right]bool{{"", "namespaces", ""}: true, {"", "secrets", m.Namespace}: true}
	for _, o := range m.Objects {
		gvk := o.GroupVersionKind()
		mapping, err := c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
		if err != nil {
			return diag.Hint(fmt.Errorf("%s: %w", title(o), err), "the API server does not serve %s %s", gvk.GroupVersion(), gvk.Kind)
		}
		r := right{mapping.Resource.Group, mapping.Resource.Resource, ""}
		if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
			r.namespace = m.Namespace
		}
		need[r] = true
	}
	var missing []string
	for r := range need {
		for _, verb := range []string{"get", "create", "patch"} {
			ok, err := c.may(ctx, verb, r.group, r.resource, r.namespace)
			if err != nil {
				return err
			}
			if !ok {
				missing = append(missing, verb+" "+strings.TrimSuffix(r.resource+"."+r.group, "."))
			}
		}
	}
	if len(missing) > 0 {
		return diag.Hint(fmt.Errorf("context %s: the account may not %s", c.Context, strings.Join(sorted(missing), ", ")), "install with an account that is cluster-admin")
	}
	return nil
}

func (c *Cluster) may(ctx context.Context, verb, group, resource, namespace string) (bool, error) {
	out, err := c.dynamic.Resource(reviews).Create(ctx, &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
		"spec": map[string]any{"resourceAttributes": map[string]any{"verb": verb, "group": group, "resource": resource, "namespace": namespace}},
	}}, metav1.CreateOptions{})
	if err != nil {
		return false, fmt.Errorf("context %s: ask for the account's rights: %w", c.Context, err)
	}
	allowed, _, err := unstructured.NestedBool(out.Object, "status", "allowed")
	return allowed, err
}

// noIstio refuses a namespace in which Istio's own control plane runs: the names are the same.
func (c *Cluster) noIstio(ctx context.Context, namespace string) error {
	list, err := c.dynamic.Resource(deployments).Namespace(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=istiod"})
	if err != nil {
		return fmt.Errorf("list deployments in %s: %w", namespace, err)
	}
	for i := range list.Items {
		return diag.Hint(fmt.Errorf("Istio runs in namespace %s: %s", namespace, title(&list.Items[i])), "choose another namespace (--namespace NAME), or uninstall Istio first")
	}
	return nil
}

// conflicts finds objects of others under the names of ours. Definitions of others are used as they are.
func (c *Cluster) conflicts(ctx context.Context, m *Manifest) (warnings []string, err error) {
	var taken []string
	var who string
	for _, o := range m.Objects {
		client, err := c.heads(o)
		if err != nil {
			return nil, err
		}
		there, err := head(ctx, client, o)
		if err != nil {
			return nil, err
		} else if there == nil {
			continue
		}
		other := owner(there, m.Namespace)
		if other != "" && isDefinition(o) {
			d, err := c.definition(ctx, o.GetName())
			if err != nil {
				return nil, fmt.Errorf("get %s: %w", title(o), err)
			}
			warnings = append(warnings, unserved(o, d, other)...)
		} else if other != "" {
			taken, who = append(taken, title(o)), other
		}
	}
	if len(taken) > 0 {
		hint := "remove them, or choose another namespace (--namespace NAME)"
		if slices.ContainsFunc(taken, func(t string) bool { return strings.HasPrefix(t, "MutatingWebhookConfiguration/") }) {
			hint = "one injector serves a cluster: uninstall that one, or set injection.enabled=false"
		}
		return nil, diag.Hint(fmt.Errorf("%s of %s", strings.Join(taken, ", "), who), "%s", hint)
	}
	return warnings, nil
}

// unserved says which of the versions that we know a definition of another installer lacks.
func unserved(want *unstructured.Unstructured, there *definition, other string) []string {
	served := there.served()
	var out []string
	for v, on := range versions(want) {
		if on && !served[v] {
			out = append(out, fmt.Sprintf("%s of %s lacks version %s: upgrade it there", title(want), other, v))
		}
	}
	return sorted(out)
}

// versions returns the versions of a definition, and which are served.
func versions(crd *unstructured.Unstructured) map[string]bool {
	out := map[string]bool{}
	list, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
	for _, x := range list {
		m, _ := x.(map[string]any)
		name, _ := m["name"].(string)
		out[name], _ = m["served"].(bool)
	}
	return out
}
