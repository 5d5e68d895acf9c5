package install

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"helm.sh/helm/v3/pkg/release"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// Plan is what an installation is to make of a cluster.
type Plan struct {
	Manifest *Manifest
	// Warnings are for the operator to read; none keeps the installation from working.
	Warnings []string

	history []*release.Release
}

// Prepare renders the chart for the cluster with the given values. Without any, those of the installation that is there
// are used again; a name and a network of the cluster that the values do not say are those it had, or, at first,
// the name given and the namespace's label.
func (c *Cluster) Prepare(ctx context.Context, from ValuesFrom, reuse bool, namespace, name string) (*Plan, error) {
	ch, err := Chart()
	if err != nil {
		return nil, err
	}
	p := &Plan{}
	if p.history, err = c.history(ctx, namespace, false); err != nil && !apierrors.IsForbidden(err) {
		return nil, err
	}
	values, err := from.Read()
	if err != nil {
		return nil, err
	}
	forget(values)
	before := last(p.history)
	if before != nil {
		old, err := plain(before.Config)
		if err != nil {
			return nil, err
		}
		if from.None() || reuse {
			values = merge(values, old)
		} else {
			p.Warnings = append(p.Warnings, dropped("", old, values)...)
		}
		old = map[string]any{"cluster": pick(old["cluster"], "name", "network", "trustDomain")}
		values = merge(values, old)
	}
	network := ""
	if ns, err := c.get(ctx, namespaces, "", namespace); err == nil && before == nil {
		network = ns.GetLabels()[networkLabel] // later it may be ours
	}
	Name(values, name, network)
	if p.Manifest, err = Render(ch, values, namespace, before != nil); err != nil {
		return nil, err
	}
	warnings, err := c.Preflight(ctx, p.Manifest)
	p.Warnings = append(p.Warnings, warnings...)
	return p, err
}

// forget takes out what is said of the cluster in empty words.
func forget(values map[string]any) {
	if said, ok := values["cluster"].(map[string]any); ok {
		maps.DeleteFunc(said, func(_ string, v any) bool { return v == "" })
	}
}

// Name sets the cluster's name and network where the values do not. An empty one is not set.
func Name(values map[string]any, name, network string) {
	first := map[string]any{}
	if name != "" {
		first["name"] = name
	}
	if network != "" {
		first["network"] = network
	}
	forget(values)
	merge(values, map[string]any{"cluster": first})
}

// NamespaceText returns the namespace as a manifest: the chart itself makes none.
func (m *Manifest) NamespaceText() string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Namespace\nmetadata:\n  labels:\n    %s: %s\n  name: %s\n", networkLabel, m.network(), m.Namespace)
}

// merge lays values over others.
func merge(over, under map[string]any) map[string]any {
	for k, v := range under {
		have, there := over[k]
		if m, ok := v.(map[string]any); ok {
			if h, ok := have.(map[string]any); ok {
				over[k] = merge(h, m)
			} else if !there {
				over[k] = m
			}
		} else if !there {
			over[k] = v
		}
	}
	return over
}

func pick(from any, names ...string) map[string]any {
	out := map[string]any{}
	m, _ := from.(map[string]any)
	for _, n := range names {
		if v, ok := m[n]; ok {
			out[n] = v
		}
	}
	return out
}

// dropped names what an earlier installation set and this one does not.
func dropped(at string, old, now map[string]any) (out []string) {
	for k, v := range old {
		path := k
		if at != "" {
			path = at + "." + k
		}
		have, there := now[k]
		m, isMap := v.(map[string]any)
		h, _ := have.(map[string]any)
		switch {
		case isMap && len(m) > 0:
			out = append(out, dropped(path, m, h)...)
		case !there && !slices.Contains([]string{"cluster.name", "cluster.network", "cluster.trustDomain"}, path):
			out = append(out, fmt.Sprintf("value %s was set before and goes back to the chart's: give it again, or use --reuse-values", path))
		}
	}
	return sorted(out)
}

// Result is what an installation did.
type Result struct {
	Context   string   `json:"context"`
	Namespace string   `json:"namespace"`
	Revision  int      `json:"revision"`
	Changed   int      `json:"changed"` // objects that were made, changed or deleted
	Objects   []Object `json:"objects"`
	Warnings  []string `json:"warnings,omitempty"`
	Notes     string   `json:"-"`
}

// Apply carries the plan out. What is as it should be is not touched; the release gets a new revision only when the
// manifest or the values differ from the last one's. Progress is called with each step.
func (c *Cluster) Apply(ctx context.Context, p *Plan, progress func(string)) (*Result, error) {
	m := p.Manifest
	res := &Result{Context: c.Context, Namespace: m.Namespace, Warnings: p.Warnings, Notes: m.Notes}
	state, err := c.ensureNamespace(ctx, m)
	if err != nil {
		return res, err
	}
	res.add(Object{Kind: "Namespace", Name: m.Namespace, State: state})
	rec := last(p.history)
	if same(rec, m) {
		res.Revision = rec.Version
		return res, c.applyAll(ctx, m, nil, res, progress)
	}
	if rec, err = c.begin(ctx, p.history, m); err != nil {
		return res, err
	}
	res.Revision = rec.Version
	err = c.applyAll(ctx, m, p.history, res, progress)
	// The record says how it ended even when the operator has interrupted.
	if ferr := c.finish(context.WithoutCancel(ctx), p.history, rec, err); err == nil {
		err = ferr
	}
	return res, err
}

func (r *Result) add(o Object) {
	if o.State == Created || o.State == Changed || o.State == Deleted {
		r.Changed++
	}
	r.Objects = append(r.Objects, o)
}

// ensureNamespace makes the namespace when it is missing, and labels it with its network.
func (c *Cluster) ensureNamespace(ctx context.Context, m *Manifest) (State, error) {
	ns := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Namespace",
		"metadata": map[string]any{"name": m.Namespace, "labels": map[string]any{networkLabel: m.network()}},
	}}
	there, err := c.get(ctx, namespaces, "", m.Namespace)
	if err != nil && !apierrors.IsNotFound(err) {
		return "", fmt.Errorf("get namespace %s: %w", m.Namespace, err)
	}
	if err != nil || there.GetAnnotations()[madeByInstall] != "" {
		ns.SetAnnotations(map[string]string{madeByInstall: "true"})
	} else if there.GetLabels()[networkLabel] == m.network() && !manages(there) {
		return Unchanged, nil // the operator's label says the same
	}
	return c.apply(ctx, ns)
}

// manages reports whether an installation has applied fields of o.
func manages(o *unstructured.Unstructured) bool {
	return slices.ContainsFunc(o.GetManagedFields(), func(f metav1.ManagedFieldsEntry) bool { return f.Manager == manager })
}

func (c *Cluster) applyAll(ctx context.Context, m *Manifest, history []*release.Release, res *Result, progress func(string)) error {
	var crds, rest []*unstructured.Unstructured
	for _, o := range m.Objects {
		if isDefinition(o) {
			crds = append(crds, o)
		} else {
			rest = append(rest, o)
		}
	}
	steps := []struct {
		name    string
		objects []*unstructured.Unstructured
		after   func() error
	}{
		{"resource definitions", crds, func() error { return c.established(ctx, crds) }},
		{"objects", rest, func() error { return nil }},
	}
	for _, s := range steps {
		from := len(res.Objects)
		for _, o := range s.objects {
			got, err := c.applyOne(ctx, m, o)
			if err != nil {
				return err
			}
			if got.State != Unchanged {
				progress(fmt.Sprintf("%s %s%s", got.State, title(o), note(got.Note)))
			}
			res.add(got)
		}
		if err := s.after(); err != nil {
			return err
		}
		progress(s.name + ": " + summary(res.Objects[from:]))
	}
	return c.prune(ctx, m, history, res, progress)
}

func note(text string) string {
	if text == "" {
		return ""
	}
	return " (" + text + ")"
}

func (c *Cluster) applyOne(ctx context.Context, m *Manifest, o *unstructured.Unstructured) (Object, error) {
	client, err := c.heads(o)
	if err != nil {
		return report(o, "", ""), err
	}
	there, err := head(ctx, client, o)
	if err != nil {
		return report(o, "", ""), err
	}
	if isDefinition(o) && there != nil && owner(there, m.Namespace) != "" {
		return report(o, Kept, "of "+owner(there, m.Namespace)), nil
	}
	state, err := patch(ctx, client, there, owned(o, m.Namespace))
	return report(o, state, ""), err
}

// prune deletes what earlier revisions had and this one has not.
func (c *Cluster) prune(ctx context.Context, m *Manifest, history []*release.Release, res *Result, progress func(string)) error {
	keep := map[string]bool{}
	for _, o := range m.Objects {
		keep[title(o)] = true
	}
	for _, r := range slices.Backward(history) {
		objects, err := recorded(r)
		if err != nil {
			return err
		}
		for _, o := range slices.Backward(objects) {
			if keep[title(o)] || o.GetAnnotations()[resourcePolicy] == "keep" {
				continue
			}
			keep[title(o)] = true
			state, err := c.remove(ctx, o)
			if err != nil {
				return err
			}
			if state == Deleted {
				progress("deleted " + title(o))
				res.add(report(o, state, "no longer part of it"))
			}
		}
		if r.Info.Status == release.StatusDeployed {
			break // what was before it went with it
		}
	}
	return nil
}

// recorded returns the objects of a record's manifest; they are only read.
func recorded(r *release.Release) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	for _, text := range split(r.Manifest) {
		o, err := decode(text, yaml.Unmarshal)
		if err != nil {
			return nil, fmt.Errorf("record of revision %d: %w", r.Version, err)
		}
		if len(o.Object) > 0 {
			out = append(out, o)
		}
	}
	return out, nil
}

// unlabel takes the fields of an object that an installation applied off again.
func (c *Cluster) unlabel(ctx context.Context, o *unstructured.Unstructured) error {
	client, err := c.object(o)
	if err != nil {
		return err
	}
	force := true
	data := fmt.Appendf(nil, `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":%q}}`, o.GetName())
	_, err = client.Patch(ctx, o.GetName(), types.ApplyPatchType, data, metav1.PatchOptions{FieldManager: manager, Force: &force})
	return err
}

// summary counts the objects by their states.
func summary(objects []Object) string {
	counts := map[State]int{}
	for _, o := range objects {
		counts[o.State]++
	}
	text := ""
	for _, s := range []State{Created, Changed, Unchanged, Kept, Deleted} {
		if counts[s] > 0 {
			if text != "" {
				text += ", "
			}
			text += fmt.Sprintf("%d %s", counts[s], s)
		}
	}
	if text == "" {
		return "none"
	}
	return text
}
