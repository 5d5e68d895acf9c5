package install

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"helm.sh/helm/v3/pkg/release"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// ErrNothing says that there is no installation to remove or to look at.
var ErrNothing = errors.New("no installation")

// Removal says how far an uninstallation goes.
type Removal struct {
	// Purge deletes users' objects of the kinds that the chart defined, with the definitions.
	Purge bool
	// KeepCRDs leaves the definitions and users' objects of their kinds.
	KeepCRDs bool
	// KeepDNS leaves the cluster's DNS as it is.
	KeepDNS bool
	// Wait is how long pods may take to end, before what they wrote is removed.
	Wait time.Duration
}

// UserObjects is the error of an uninstallation that would delete objects of users.
type UserObjects struct{ Objects []string }

func (e *UserObjects) Error() string {
	const shown = 20
	list := e.Objects
	more := ""
	if len(list) > shown {
		list, more = list[:shown], fmt.Sprintf(" and %d more", len(e.Objects)-shown)
	}
	return fmt.Sprintf("nothing is removed: these objects would be lost with their definitions: %s%s", strings.Join(list, ", "), more)
}

// What isthmusd writes while it runs carries one of these marks.
var written = []struct {
	gvr        schema.GroupVersionResource
	everywhere bool
	labels     string
	fields     string
}{
	{configMaps, true, managedBy + "=isthmus", "metadata.name=istio-ca-root-cert"},
	{schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}, true, "endpointslice.kubernetes.io/managed-by=isthmus.io", ""},
	{schema.GroupVersionResource{Group: "multicluster.x-k8s.io", Version: "v1beta1", Resource: "serviceimports"}, true, managedBy + "=isthmus", ""},
	{schema.GroupVersionResource{Version: "v1", Resource: "events"}, true, "", "source=isthmusd"},
	{secrets, false, managedBy + "=isthmusd", ""},
	{configMaps, false, managedBy + "=isthmusd", ""},
	{leases, false, "", "metadata.name=isthmus-leader"},
	{schema.GroupVersionResource{Group: "isthmus.io", Version: "v1alpha1", Resource: "joingrants"}, false, "", ""},
	{schema.GroupVersionResource{Group: "isthmus.io", Version: "v1alpha1", Resource: "peers"}, false, "", ""},
}

// Uninstall removes the installation in the namespace and all that it wrote while it ran. Without Purge or KeepCRDs it
// does nothing when users' objects would be lost: the error is then a UserObjects.
func (c *Cluster) Uninstall(ctx context.Context, namespace string, how Removal, progress func(string)) (*Result, error) {
	res := &Result{Context: c.Context, Namespace: namespace}
	history, err := c.history(ctx, namespace, true)
	if err != nil {
		return res, err
	}
	if len(history) == 0 {
		return res, diag.Hint(fmt.Errorf("%w of release %s in namespace %s of context %s", ErrNothing, ReleaseName, namespace, c.Context), "--namespace and --context name where it is")
	}
	res.Revision = last(history).Version
	objects, err := everRecorded(history)
	if err != nil {
		return res, err
	}
	crds, rest, err := c.split(ctx, objects, namespace, how, res)
	if err != nil {
		return res, err
	}
	if !how.KeepDNS {
		if err := c.unstub(ctx, history, res, progress); err != nil {
			return res, err
		}
	}
	for _, o := range slices.Backward(rest) {
		if err := c.removeOne(ctx, o, res, progress); err != nil {
			return res, err
		}
	}
	if err := c.ended(ctx, rest, how.Wait, progress); err != nil {
		return res, err
	}
	if err := c.removeWritten(ctx, namespace, res, progress); err != nil {
		return res, err
	}
	for _, crd := range crds {
		if err := c.removeOne(ctx, crd, res, progress); err != nil {
			return res, err
		}
	}
	if err := c.gone(ctx, crds); err != nil {
		return res, err
	}
	for _, r := range history { // last, so that a run that was cut short can be repeated
		if err := c.removeOne(ctx, kindOf(schema.GroupVersionKind{Version: "v1", Kind: "Secret"}, namespace, recordName(r.Version)), res, progress); err != nil {
			return res, err
		}
	}
	return res, c.leaveNamespace(ctx, namespace, res, progress)
}

// everRecorded returns the objects of all records, each once, in the order of installation.
func everRecorded(history []*release.Release) (out []*unstructured.Unstructured, err error) {
	seen := map[string]bool{}
	for _, r := range slices.Backward(history) {
		objects, err := recorded(r)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			if !seen[title(o)] {
				seen[title(o)] = true
				out = append(out, o)
			}
		}
	}
	return out, nil
}

// split tells the definitions that are to go from all else, and refuses when users' objects would be lost.
func (c *Cluster) split(ctx context.Context, objects []*unstructured.Unstructured, namespace string, how Removal, res *Result) (crds, rest []*unstructured.Unstructured, err error) {
	var users []string
	for _, o := range objects {
		if !isDefinition(o) {
			rest = append(rest, o)
			continue
		}
		there, err := c.definition(ctx, o.GetName())
		if apierrors.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, nil, fmt.Errorf("get %s: %w", title(o), err)
		}
		if who := owner(there.Metadata, namespace); who != "" || how.KeepCRDs {
			res.Objects = append(res.Objects, report(o, Kept, strings.TrimSuffix("of "+who, "of ")))
			continue
		}
		crds = append(crds, o)
		found, err := c.instances(ctx, o.GetName(), there)
		if err != nil {
			return nil, nil, err
		}
		users = append(users, found...)
	}
	if len(users) > 0 && !how.Purge {
		return nil, nil, diag.Hint(&UserObjects{sorted(users)}, "isthmus uninstall --purge deletes them, --keep-crds leaves them and the definitions")
	}
	return crds, rest, nil
}

// instances lists users' objects of a definition's kind. What isthmusd wrote is not among them.
func (c *Cluster) instances(ctx context.Context, name string, crd *definition) ([]string, error) {
	if crd.Spec.Group == "isthmus.io" {
		return nil, nil
	}
	var out []string
	for v, on := range crd.served() {
		if !on {
			continue
		}
		list, err := c.dynamic.Resource(schema.GroupVersionResource{Group: crd.Spec.Group, Version: v, Resource: crd.Spec.Names.Plural}).List(ctx, metav1.ListOptions{})
		if apierrors.IsNotFound(err) {
			return nil, nil
		} else if err != nil {
			return nil, fmt.Errorf("list %s: %w", name, err)
		}
		for i := range list.Items {
			if list.Items[i].GetLabels()[managedBy] != "isthmus" {
				out = append(out, title(&list.Items[i]))
			}
		}
		return out, nil
	}
	return nil, nil
}

func (c *Cluster) removeOne(ctx context.Context, o *unstructured.Unstructured, res *Result, progress func(string)) error {
	state, err := c.remove(ctx, o)
	if err != nil {
		return err
	}
	if state == Deleted {
		progress("deleted " + title(o))
		res.add(report(o, state, ""))
	}
	return nil
}

// ended waits until the pods of the workloads are gone: they must not write anew what is then removed.
func (c *Cluster) ended(ctx context.Context, objects []*unstructured.Unstructured, wait time.Duration, progress func(string)) error {
	deadline := time.Now().Add(wait)
	for _, o := range objects {
		if o.GetKind() != "Deployment" && o.GetKind() != "DaemonSet" {
			continue
		}
		for told := false; ; told = true {
			list, err := c.dynamic.Resource(pods).Namespace(o.GetNamespace()).List(ctx, metav1.ListOptions{LabelSelector: "app=" + o.GetName()})
			if err != nil {
				return fmt.Errorf("list pods of %s: %w", title(o), err)
			}
			if len(list.Items) == 0 {
				break
			}
			if time.Now().After(deadline) {
				return diag.Hint(fmt.Errorf("%d pods of %s have not ended after %s", len(list.Items), title(o), wait), "run isthmus uninstall again; a pod of a lost node: kubectl delete pod --force")
			}
			if !told {
				progress(fmt.Sprintf("waiting for %d pods of %s to end", len(list.Items), title(o)))
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(300 * time.Millisecond):
			}
		}
	}
	return nil
}

// removeWritten deletes what isthmusd wrote.
func (c *Cluster) removeWritten(ctx context.Context, namespace string, res *Result, progress func(string)) error {
	for _, w := range written {
		in := namespace
		if w.everywhere {
			in = metav1.NamespaceAll
		}
		list, err := c.dynamic.Resource(w.gvr).Namespace(in).List(ctx, metav1.ListOptions{LabelSelector: w.labels, FieldSelector: w.fields})
		if apierrors.IsNotFound(err) {
			continue // no such kind
		} else if err != nil {
			return fmt.Errorf("list %s: %w", w.gvr.Resource, err)
		}
		n := 0
		for i := range list.Items {
			o := &list.Items[i]
			err := c.dynamic.Resource(w.gvr).Namespace(o.GetNamespace()).Delete(ctx, o.GetName(), metav1.DeleteOptions{})
			if apierrors.IsNotFound(err) {
				continue
			} else if err != nil {
				return fmt.Errorf("delete %s: %w", title(o), err)
			}
			n++
			if w.gvr.Resource != "events" {
				res.add(report(o, Deleted, "written by isthmusd"))
			}
		}
		if n > 0 {
			progress(fmt.Sprintf("deleted %d %s that isthmusd wrote", n, w.gvr.Resource))
		}
	}
	return nil
}

// gone waits until the definitions are: the API server deletes their objects first.
func (c *Cluster) gone(ctx context.Context, crds []*unstructured.Unstructured) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for _, crd := range crds {
		for {
			_, err := c.definition(ctx, crd.GetName())
			if apierrors.IsNotFound(err) {
				break
			}
			select {
			case <-ctx.Done():
				return diag.Hint(fmt.Errorf("%s is still there", title(crd)), "an object of its kind has a finalizer: kubectl get %s -A", crd.GetName())
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	return nil
}

// leaveNamespace deletes the namespace when the installation made it and nothing of others is in it.
func (c *Cluster) leaveNamespace(ctx context.Context, namespace string, res *Result, progress func(string)) error {
	ns, err := c.get(ctx, namespaces, "", namespace)
	if apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("get namespace %s: %w", namespace, err)
	}
	if !manages(ns) {
		return nil // it was there before, and is as it was
	}
	left, err := c.others(ctx, namespace)
	if err != nil {
		return err
	}
	if ns.GetAnnotations()[madeByInstall] != "" && len(left) == 0 {
		return c.removeOne(ctx, ns, res, progress)
	}
	if err := c.unlabel(ctx, ns); err != nil {
		return fmt.Errorf("take the label %s off namespace %s: %w", networkLabel, namespace, err)
	}
	why := "was there before"
	if len(left) > 0 {
		why = "holds " + strings.Join(left, ", ")
	}
	progress("kept " + title(ns) + note(why))
	res.Objects = append(res.Objects, report(ns, Kept, why))
	return nil
}

// others lists what is in a namespace beside what Kubernetes puts into each.
func (c *Cluster) others(ctx context.Context, namespace string) ([]string, error) {
	ours := map[string]bool{"ConfigMap/" + namespace + "/kube-root-ca.crt": true, "ServiceAccount/" + namespace + "/default": true}
	var out []string
	for _, gvr := range []schema.GroupVersionResource{
		secrets, configMaps, services, pods, deployments,
		{Version: "v1", Resource: "serviceaccounts"}, {Version: "v1", Resource: "persistentvolumeclaims"},
		{Group: "apps", Version: "v1", Resource: "statefulsets"}, {Group: "apps", Version: "v1", Resource: "daemonsets"}, {Group: "batch", Version: "v1", Resource: "jobs"},
	} {
		list, err := c.dynamic.Resource(gvr).Namespace(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("list %s in %s: %w", gvr.Resource, namespace, err)
		}
		for i := range list.Items {
			o := &list.Items[i]
			if !ours[title(o)] && o.GetDeletionTimestamp() == nil {
				out = append(out, title(o))
			}
		}
	}
	return sorted(slices.Collect(maps.Keys(set(out)))), nil
}

func set(names []string) map[string]bool {
	out := map[string]bool{}
	for _, n := range names {
		out[n] = true
	}
	return out
}

// unstub takes the zones out of the cluster's DNS.
func (c *Cluster) unstub(ctx context.Context, history []*release.Release, res *Result, progress func(string)) error {
	var zones []string
	for _, r := range history {
		found, err := recordZones(r)
		if err != nil {
			return err
		}
		zones = append(zones, found...)
	}
	s, err := c.StubRemove(ctx, zones)
	if errors.Is(err, ErrNoDNS) {
		return nil
	} else if err != nil {
		return err
	}
	if !s.Changes() {
		return nil
	}
	if err := c.WriteStub(ctx, s); err != nil {
		return err
	}
	progress(fmt.Sprintf("dns: ConfigMap %s/%s is what it was", dnsNamespace, s.ConfigMap))
	res.add(Object{Kind: "ConfigMap", Namespace: dnsNamespace, Name: s.ConfigMap, State: Changed, Note: "stub zones removed"})
	return nil
}
