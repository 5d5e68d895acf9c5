package status

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// rootCertificates keeps the ConfigMap with the roots in every namespace. Other keys in it are left alone.
func rootCertificates() kind {
	return kind{
		gvr:    schema.GroupVersionResource{Version: "v1", Resource: "configmaps"},
		narrow: func(o *metav1.ListOptions) { o.FieldSelector = "metadata.name=" + RootConfigMap },
		all:    func(s *server, _ *desired) []types.NamespacedName { return s.everywhere(RootConfigMap) },
		sync:   syncRoots,
	}
}

func syncRoots(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured) (bool, error) {
	roots := k.server.wanted.Load().roots
	if roots == "" || !k.server.active(key.Namespace) {
		return false, nil
	}
	label := "istio.io/config"
	if have == nil {
		obj := &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "v1", "kind": "ConfigMap",
			"metadata": map[string]any{"name": RootConfigMap, "namespace": key.Namespace, "labels": map[string]any{label: "true", labelManagedBy: managedBy}},
			"data":     map[string]any{RootKey: roots},
		}}
		_, err := k.namespaced(key).Create(ctx, obj, metav1.CreateOptions{FieldManager: fieldManager})
		return err == nil, err
	}
	if v, _, _ := unstructured.NestedString(have.Object, "data", RootKey); v == roots && have.GetLabels()[labelManagedBy] == managedBy {
		return false, nil
	}
	obj := have.DeepCopy()
	if err := unstructured.SetNestedField(obj.Object, roots, "data", RootKey); err != nil {
		return false, err
	}
	labels := obj.GetLabels()
	if labels == nil {
		labels = map[string]string{}
	}
	labels[label], labels[labelManagedBy] = "true", managedBy
	obj.SetLabels(labels)
	_, err := k.namespaced(key).Update(ctx, obj, metav1.UpdateOptions{FieldManager: fieldManager})
	return err == nil, err
}

// serviceImports keeps one ServiceImport for each exported name whose namespace is there.
func serviceImports() kind {
	return kind{
		gvr: schema.GroupVersionResource{Group: mcsv1beta1.GroupName, Resource: mcsv1beta1.ServiceImportPluralName},
		cut: func(obj any) (any, error) { return obj, nil }, // managedFields say which labels are ours
		all: func(_ *server, d *desired) []types.NamespacedName {
			return slices.SortedFunc(maps.Keys(d.imports), compareKeys)
		},
		changed: func(old, now *desired) []types.NamespacedName { return differing(old.imports, now.imports) },
		sync:    syncImport,
	}
}

func syncImport(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured) (bool, error) {
	want, where := k.server.wanted.Load().imports[key], string(k.server.cluster.ID)+"/serviceimports/"+key.String()
	if have != nil && have.GetLabels()[labelManagedBy] != managedBy {
		if want != nil {
			k.server.program.report(where, foreignImport(k.server.cluster, key))
		}
		return false, nil
	}
	k.server.program.forget(where)
	if want == nil || !k.server.active(key.Namespace) {
		if have == nil || want != nil {
			return false, nil
		}
		return k.remove(ctx, key, have)
	}
	want = want.DeepCopy()
	want.APIVersion = k.gvr.GroupVersion().String()
	sum := digest(want)
	if have != nil && k.done(key, have, sum) {
		return false, nil
	}
	obj, err := runtime.DefaultUnstructuredConverter.ToUnstructured(want)
	if err != nil {
		return false, err
	}
	got, wrote, err := k.put(ctx, key, have, &unstructured.Unstructured{Object: obj}, "spec")
	if err != nil {
		return wrote, err
	}
	status, changed, err := importStatus(got, want)
	if err != nil {
		return wrote, err
	}
	if changed {
		out := got.DeepCopy()
		out.Object["status"] = status
		if got, err = k.namespaced(key).UpdateStatus(ctx, out, metav1.UpdateOptions{FieldManager: fieldManager}); err != nil {
			return wrote, err
		}
	}
	if wrote = wrote || changed; wrote {
		k.settle(key, got, sum)
	}
	return wrote, nil
}

func foreignImport(c Cluster, key types.NamespacedName) mesh.Problem {
	o := mesh.ObjectRef{Kind: mcsv1beta1.ServiceImportKindName, Namespace: key.Namespace, Name: key.Name, Source: "cluster " + string(c.ID)}
	return mesh.Problem{Object: o, Reason: "NotOurs", Message: "was made by another hand; it is left as it is, and says nothing of the mesh", Remedy: "delete it: it is then made anew"}
}

// importStatus returns the status that got should have, and whether that is another one.
func importStatus(got *unstructured.Unstructured, want *mcsv1beta1.ServiceImport) (map[string]any, bool, error) {
	var have mcsv1beta1.ServiceImport
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(got.Object, &have); err != nil {
		return nil, false, err
	}
	conditions, changed := settle(have.Status.Conditions, want.Status.Conditions, got.GetGeneration(), metav1.NewTime(time.Now().UTC().Truncate(time.Second)))
	changed = changed || !equality.Semantic.DeepEqual(have.Status.Clusters, want.Status.Clusters) || have.Status.EndpointSliceObjects != want.Status.EndpointSliceObjects
	out, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&mcsv1beta1.ServiceImportStatus{
		EndpointSliceObjects: want.Status.EndpointSliceObjects, Clusters: want.Status.Clusters, Conditions: conditions,
	})
	return out, changed, err
}

// importedSlices keeps the EndpointSlices of imports.
func importedSlices() kind {
	return kind{
		gvr:    schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"},
		narrow: func(o *metav1.ListOptions) { o.LabelSelector = discoveryv1.LabelManagedBy + "=" + sliceManagedBy },
		cut:    func(obj any) (any, error) { return obj, nil },
		all: func(_ *server, d *desired) []types.NamespacedName {
			return slices.SortedFunc(maps.Keys(d.slices), compareKeys)
		},
		changed: func(old, now *desired) []types.NamespacedName { return differing(old.slices, now.slices) },
		sync:    syncSlice,
	}
}

func syncSlice(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured) (bool, error) {
	want := k.server.wanted.Load().slices[key]
	if want == nil || !k.server.active(key.Namespace) {
		if have == nil || want != nil {
			return false, nil
		}
		return k.remove(ctx, key, have)
	}
	sum := digest(want)
	if have != nil && k.done(key, have, sum) {
		return false, nil
	}
	obj, err := runtime.DefaultUnstructuredConverter.ToUnstructured(want)
	if err != nil {
		return false, err
	}
	got, wrote, err := k.put(ctx, key, have, &unstructured.Unstructured{Object: obj}, "addressType", "endpoints", "ports")
	if err == nil && wrote {
		k.settle(key, got, sum)
	}
	return wrote, err
}

// put creates the object or brings the fields, labels and annotations of have in line with want. Labels and annotations
// that were this writer's and are not wanted any more go; those of others stay.
func (k *keeper) put(ctx context.Context, key types.NamespacedName, have, want *unstructured.Unstructured, fields ...string) (*unstructured.Unstructured, bool, error) {
	delete(want.Object, "status")
	unstructured.RemoveNestedField(want.Object, "metadata", "creationTimestamp")
	if have == nil {
		got, err := k.namespaced(key).Create(ctx, want, metav1.CreateOptions{FieldManager: fieldManager})
		return got, err == nil, err
	}
	out := have.DeepCopy()
	for _, f := range fields {
		if !empty(have.Object[f]) || !empty(want.Object[f]) { // an empty list is served as null
			out.Object[f] = want.Object[f]
		}
	}
	out.SetLabels(overlay(have.GetLabels(), want.GetLabels(), owned(have, "labels")))
	out.SetAnnotations(overlay(have.GetAnnotations(), want.GetAnnotations(), owned(have, "annotations")))
	if equality.Semantic.DeepEqual(out.Object, have.Object) {
		return have, false, nil
	}
	got, err := k.namespaced(key).Update(ctx, out, metav1.UpdateOptions{FieldManager: fieldManager})
	return got, err == nil, err
}

func empty(v any) bool {
	list, is := v.([]any)
	return v == nil || is && len(list) == 0
}

// overlay lays want over have, without the keys that were ours and are not wanted.
func overlay(have, want map[string]string, ours map[string]bool) map[string]string {
	out := map[string]string{}
	for k, v := range have {
		if !ours[k] {
			out[k] = v
		}
	}
	maps.Copy(out, want)
	if len(out) == 0 {
		return nil
	}
	return out
}

// owned lists the labels or annotations that managedFields say this writer has set.
func owned(u *unstructured.Unstructured, which string) map[string]bool {
	out := map[string]bool{}
	for _, m := range u.GetManagedFields() {
		if m.Manager != fieldManager || m.FieldsV1 == nil || m.Subresource != "" {
			continue
		}
		var fields struct {
			Metadata map[string]map[string]json.RawMessage `json:"f:metadata"`
		}
		if json.Unmarshal(m.FieldsV1.GetRawBytes(), &fields) != nil {
			continue
		}
		for k := range fields.Metadata["f:"+which] {
			if name, ok := cutField(k); ok {
				out[name] = true
			}
		}
	}
	return out
}

// cutField reads "f:NAME".
func cutField(k string) (string, bool) {
	if len(k) > 2 && k[:2] == "f:" {
		return k[2:], true
	}
	return "", false
}

// serviceExports keeps the conditions of ServiceExports.
func serviceExports() kind {
	return kind{
		gvr: schema.GroupVersionResource{Group: mcsv1beta1.GroupName, Resource: mcsv1beta1.ServiceExportPluralName},
		all: func(_ *server, d *desired) []types.NamespacedName {
			return slices.SortedFunc(maps.Keys(d.exports), compareKeys)
		},
		changed: func(old, now *desired) []types.NamespacedName { return differing(old.exports, now.exports) },
		sync:    syncExport,
	}
}

func syncExport(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured) (bool, error) {
	want := k.server.wanted.Load().exports[key]
	if have == nil || want == nil || have.GetDeletionTimestamp() != nil {
		return false, nil
	}
	if g := want[0].ObservedGeneration; g != 0 && g != have.GetGeneration() {
		return false, nil // the Snapshot has another version of it; the one that has this comes
	}
	sum := digest(want)
	if k.done(key, have, sum) {
		return false, nil
	}
	var x mcsv1beta1.ServiceExport
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(have.Object, &x); err != nil {
		return false, err
	}
	conditions, changed := settle(x.Status.Conditions, want, have.GetGeneration(), metav1.NewTime(time.Now().UTC().Truncate(time.Second)))
	if !changed {
		return false, nil
	}
	status, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&mcsv1beta1.ServiceExportStatus{Conditions: conditions})
	if err != nil {
		return false, err
	}
	out := have.DeepCopy()
	out.Object["status"] = status
	got, err := k.namespaced(key).UpdateStatus(ctx, out, metav1.UpdateOptions{FieldManager: fieldManager})
	if err == nil {
		k.settle(key, got, sum)
	}
	return err == nil, err
}
