package status

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/mcs-api/config/crd"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

func addrs(in ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range in {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// told is a mesh.Snapshots and a Clusters that a test sets.
type told[T any] struct {
	mu      sync.Mutex
	now     T
	changed chan struct{}
}

func say[T any](v T) *told[T] { return &told[T]{now: v, changed: make(chan struct{})} }

func (s *told[T]) Latest() (T, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now, s.changed
}

func (s *told[T]) set(v T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = v
	close(s.changed)
	s.changed = make(chan struct{})
}

// writes counts the requests that are not reads, by verb and path.
type writes struct {
	mu  sync.Mutex
	log []string
}

func (w *writes) wrap(next http.RoundTripper) http.RoundTripper {
	return roundTrip(func(r *http.Request) (*http.Response, error) {
		if r.Method != http.MethodGet {
			w.mu.Lock()
			w.log = append(w.log, r.Method+" "+r.URL.Path)
			w.mu.Unlock()
		}
		return next.RoundTrip(r)
	})
}

func (w *writes) list() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.log)
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// fixture is an API server with the kinds that status writes.
type fixture struct {
	t      *testing.T
	server *kubetest.Server
	client kubernetes.Interface
	dyn    dynamic.Interface
	snaps  *told[*mesh.Snapshot]
}

var (
	exportsGVR = schema.GroupVersionResource{Group: mcsv1beta1.GroupName, Version: "v1beta1", Resource: "serviceexports"}
	importsGVR = schema.GroupVersionResource{Group: mcsv1beta1.GroupName, Version: "v1beta1", Resource: "serviceimports"}
	routesGVR  = schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "virtualservices"}
)

func newFixture(t *testing.T) *fixture {
	s := kubetest.APIServer(t)
	f := &fixture{t: t, server: s, client: s.Client(), snaps: say(world(nil))}
	var err error
	if f.dyn, err = dynamic.NewForConfig(s.REST()); err != nil {
		t.Fatal(err)
	}
	f.define(string(crd.ServiceExportCRD), string(crd.ServiceImportCRD), virtualServiceCRD)
	f.namespace("shop")
	return f
}

// virtualServiceCRD has what conditions need of Istio's.
const virtualServiceCRD = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: virtualservices.networking.istio.io}
spec:
  group: networking.istio.io
  scope: Namespaced
  names: {kind: VirtualService, plural: virtualservices, singular: virtualservice}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec: {type: object, x-kubernetes-preserve-unknown-fields: true}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
`

func (f *fixture) define(crds ...string) {
	f.t.Helper()
	gvr := schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
	for _, text := range crds {
		obj := map[string]any{}
		if err := yaml.Unmarshal([]byte(text), &obj); err != nil {
			f.t.Fatal(err)
		}
		name := obj["metadata"].(map[string]any)["name"].(string)
		if _, err := f.dyn.Resource(gvr).Create(f.t.Context(), &unstructured.Unstructured{Object: obj}, metav1.CreateOptions{}); err != nil {
			f.t.Fatal(err)
		}
		f.until("definition of "+name, func() error {
			u, err := f.dyn.Resource(gvr).Get(f.t.Context(), name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
			for _, c := range conditions {
				if c := c.(map[string]any); c["type"] == "Established" && c["status"] == "True" {
					return nil
				}
			}
			return fmt.Errorf("not established: %v", conditions)
		})
	}
}

func (f *fixture) namespace(name string) {
	f.t.Helper()
	if _, err := f.client.CoreV1().Namespaces().Create(f.t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		f.t.Fatal(err)
	}
}

// until waits for a condition to hold.
func (f *fixture) until(what string, check func() error) {
	f.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// writer runs a Status until the returned function is called.
func (f *fixture) writer(change ...func(*Config)) (*writes, func()) {
	f.t.Helper()
	w := &writes{}
	rc := f.server.REST()
	rc.Wrap(w.wrap)
	cfg := Config{Snapshots: f.snaps, Clusters: say([]Cluster{{ID: "amber", Local: true, Config: rc}}), QPS: 200, Log: slog.New(slog.DiscardHandler), Reg: prometheus.NewRegistry()}
	for _, c := range change {
		c(&cfg)
	}
	ctx, cancel := context.WithCancel(f.t.Context())
	done := make(chan error, 1)
	go func() { done <- New(cfg).Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			f.t.Error(err)
		}
	})
	f.t.Cleanup(stop)
	return w, stop
}

func (f *fixture) root(namespace string) error {
	m, err := f.client.CoreV1().ConfigMaps(namespace).Get(f.t.Context(), RootConfigMap, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if m.Data[RootKey] != string(world(nil).Local.Roots) {
		return fmt.Errorf("%s holds %q", namespace, m.Data)
	}
	return nil
}

func (f *fixture) export() *mcsv1beta1.ServiceExport {
	f.t.Helper()
	u, err := f.dyn.Resource(exportsGVR).Namespace("shop").Get(f.t.Context(), "reviews", metav1.GetOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	var x mcsv1beta1.ServiceExport
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &x); err != nil {
		f.t.Fatal(err)
	}
	return &x
}

func (f *fixture) imported() (*mcsv1beta1.ServiceImport, error) {
	u, err := f.dyn.Resource(importsGVR).Namespace("shop").Get(f.t.Context(), "reviews", metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	var x mcsv1beta1.ServiceImport
	return &x, runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &x)
}

func (f *fixture) create(gvr schema.GroupVersionResource, text string) *unstructured.Unstructured {
	f.t.Helper()
	obj := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &obj); err != nil {
		f.t.Fatal(err)
	}
	u, err := f.dyn.Resource(gvr).Namespace("shop").Create(f.t.Context(), &unstructured.Unstructured{Object: obj}, metav1.CreateOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	return u
}

const (
	reviewsExport = "{apiVersion: multicluster.x-k8s.io/v1beta1, kind: ServiceExport, metadata: {name: reviews, namespace: shop}}"
	reviewsRoute  = "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: reviews, namespace: shop}, spec: {hosts: [nowhere]}}"
)

// exported is a Snapshot in which amber and birch export reviews and a VirtualService has a Problem.
func exported(generation int64) *mesh.Snapshot {
	snap := world(map[mesh.ClusterID]*mesh.Facts{"amber": facts(1), "birch": facts(2, func(f *mesh.Facts) { f.Headless = true })})
	snap.Exports[0].Generation = generation
	snap.Problems = []mesh.Problem{{Object: ref("VirtualService", "reviews"), Field: "spec.hosts[0]", Reason: "UnknownHost", Message: `"nowhere" is no host`, Remedy: "declare it"}}
	return snap
}

// TestWriter tells one story on a real API server.
func TestWriter(t *testing.T) {
	f := newFixture(t)
	f.create(exportsGVR, reviewsExport)
	f.create(routesGVR, reviewsRoute)
	f.snaps.set(exported(1))
	first, stop := f.writer()

	for _, ns := range []string{"default", "kube-system", "shop"} {
		f.until("roots in "+ns, func() error { return f.root(ns) })
	}
	f.until("the conditions", func() error {
		if got := f.export().Status.Conditions; len(got) != 3 {
			return fmt.Errorf("conditions:\n%s", show(got))
		}
		return nil
	})
	conditions := f.export().Status.Conditions
	if got := show(conditions); !strings.Contains(got, "Conflict=True TypeConflict") || !strings.Contains(got, "Valid=True Valid") || !strings.Contains(got, "Ready=True Exported") {
		t.Errorf("conditions:\n%s", got)
	}
	for _, c := range conditions {
		if c.ObservedGeneration != 1 || c.LastTransitionTime.IsZero() {
			t.Errorf("%+v", c)
		}
	}
	f.until("the import", func() error {
		i, err := f.imported()
		if err == nil && len(i.Status.Clusters) != 2 {
			err = fmt.Errorf("clusters: %v", i.Status)
		}
		return err
	})
	if i, err := f.imported(); err != nil || !slices.Equal(i.Spec.IPs, []string{"240.0.0.7", "fd69::7"}) || i.Spec.Type != "ClusterSetIP" || i.Status.EndpointSliceObjects != "Present" {
		t.Errorf("import: %+v, %v", i, err)
	}
	slicesOf := func() int {
		l, err := f.client.DiscoveryV1().EndpointSlices("shop").List(t.Context(), metav1.ListOptions{LabelSelector: mcsv1beta1.LabelServiceName + "=reviews"})
		if err != nil {
			t.Fatal(err)
		}
		return len(l.Items)
	}
	f.until("the slices", func() error {
		if n := slicesOf(); n != 2 {
			return fmt.Errorf("%d slices", n)
		}
		return nil
	})
	f.until("the condition of the route", func() error { return f.route("isthmus.io/Accepted=False UnknownHost") })
	f.until("the event", func() error {
		l, err := f.client.CoreV1().Events("shop").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		if len(l.Items) != 1 || l.Items[0].Reason != "UnknownHost" || l.Items[0].Type != "Warning" || l.Items[0].Message != `spec.hosts[0]: "nowhere" is no host; declare it` || l.Items[0].InvolvedObject.UID == "" {
			return fmt.Errorf("%d events: %+v", len(l.Items), l.Items)
		}
		return nil
	})

	// What others change comes back, what is theirs stays.
	f.client.CoreV1().ConfigMaps("shop").Patch(t.Context(), RootConfigMap, "application/merge-patch+json", []byte(`{"data":{"root-cert.pem":"x","mine":"y"}}`), metav1.PatchOptions{})
	f.until("roots put right", func() error { return f.root("shop") })
	if m, _ := f.client.CoreV1().ConfigMaps("shop").Get(t.Context(), RootConfigMap, metav1.GetOptions{}); m.Data["mine"] != "y" {
		t.Error("another key is gone")
	}
	f.dyn.Resource(importsGVR).Namespace("shop").Patch(t.Context(), "reviews", "application/merge-patch+json", []byte(`{"metadata":{"labels":{"theirs":"1"}},"spec":{"ips":["10.9.9.9"]}}`), metav1.PatchOptions{})
	f.until("import put right", func() error {
		i, err := f.imported()
		if err == nil && (i.Spec.IPs[0] != "240.0.0.7" || i.Labels["theirs"] != "1") {
			err = fmt.Errorf("%v %v", i.Spec.IPs, i.Labels)
		}
		return err
	})

	// A new namespace has its roots within a second.
	started := time.Now()
	f.namespace("new")
	f.until("roots in new", func() error { return f.root("new") })
	if d := time.Since(started); d > time.Second {
		t.Errorf("a new namespace had its roots after %s", d)
	}
	stop()
	if len(first.list()) == 0 {
		t.Fatal("no write was counted")
	}

	// The next run finds everything right.
	version := f.versions()
	second, stop := f.writer()
	time.Sleep(2 * time.Second)
	stop()
	if got := second.list(); len(got) != 0 {
		t.Errorf("a restart wrote %v", got)
	}

	// So do two at once, and one change is one write for each object, whoever does it.
	a, stopA := f.writer()
	b, stopB := f.writer()
	time.Sleep(time.Second)
	f.snaps.set(world(map[mesh.ClusterID]*mesh.Facts{"birch": facts(2, func(f *mesh.Facts) { f.Ports[0].Number = 7 })}))
	f.until("the port", func() error {
		i, err := f.imported()
		if err == nil && (len(i.Spec.Ports) != 1 || i.Spec.Ports[0].Port != 7 || len(i.Status.Clusters) != 1) {
			err = fmt.Errorf("%+v", i)
		}
		return err
	})
	f.until("the route healed", func() error { return f.route("isthmus.io/Accepted=True Accepted") })
	time.Sleep(time.Second)
	if n := len(a.list()) + len(b.list()); n > 14 {
		t.Errorf("two writers wrote %d times:\n%s\n%s", n, strings.Join(a.list(), "\n"), strings.Join(b.list(), "\n"))
	}
	stopA()
	stopB()
	if maps.Equal(version, f.versions()) {
		t.Error("nothing changed")
	}

	// The last export goes, and so does all that stood for it.
	_, stop = f.writer()
	f.snaps.set(world(nil))
	f.until("the import gone", func() error {
		if i, err := f.imported(); !apierrors.IsNotFound(err) {
			return fmt.Errorf("%v, %v", i, err)
		}
		if n := slicesOf(); n != 0 {
			return fmt.Errorf("%d slices", n)
		}
		return nil
	})
	stop()
}

func (f *fixture) route(want string) error {
	u, err := f.dyn.Resource(routesGVR).Namespace("shop").Get(f.t.Context(), "reviews", metav1.GetOptions{})
	if err != nil {
		return err
	}
	raw, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	if _, c := find(raw); !strings.HasPrefix(show([]metav1.Condition{c}), want) {
		return fmt.Errorf("conditions: %v", raw)
	}
	if hosts, _, _ := unstructured.NestedStringSlice(u.Object, "spec", "hosts"); len(hosts) != 1 {
		return fmt.Errorf("the spec is gone: %v", u.Object)
	}
	return nil
}

// versions are the resource versions of what is written.
func (f *fixture) versions() map[string]string {
	out := map[string]string{}
	for _, gvr := range []schema.GroupVersionResource{exportsGVR, importsGVR, routesGVR} {
		l, err := f.dyn.Resource(gvr).List(f.t.Context(), metav1.ListOptions{})
		if err != nil {
			f.t.Fatal(err)
		}
		for _, u := range l.Items {
			out[gvr.Resource+u.GetName()] = u.GetResourceVersion()
		}
	}
	return out
}

// TestRestraint: what is not ours is left alone, who does not lead is silent, and what is forbidden is told.
func TestRestraint(t *testing.T) {
	f := newFixture(t)
	f.create(importsGVR, "{apiVersion: multicluster.x-k8s.io/v1beta1, kind: ServiceImport, metadata: {name: reviews, namespace: shop}, spec: {type: ClusterSetIP, ports: [], ips: [10.1.1.1]}}")
	f.create(exportsGVR, reviewsExport)
	f.snaps.set(exported(2)) // of a generation that the API server does not have
	lead := say(false)
	sink := &problems{}
	w, stop := f.writer(func(c *Config) { c.Leading, c.Sink = lead.Latest, sink })
	time.Sleep(500 * time.Millisecond)
	if got := w.list(); len(got) != 0 {
		t.Errorf("a follower wrote %v", got)
	}
	// What a Snapshot lacks that was made without a source is not gone.
	unsynced := exported(2)
	unsynced.Problems = append(unsynced.Problems, mesh.Problem{Object: mesh.ObjectRef{Kind: "Source", Name: "kube"}, Reason: "NotSynced"})
	f.snaps.set(unsynced)
	lead.set(true)
	time.Sleep(500 * time.Millisecond)
	if got := w.list(); len(got) != 0 {
		t.Errorf("wrote %v of half a world", got)
	}
	f.snaps.set(exported(2))
	f.until("roots", func() error { return f.root("shop") })
	f.until("the problem", func() error { return sink.has("ServiceImport/shop/reviews NotOurs") })
	lead.set(false)
	f.until("silence", func() error {
		if len(sink.list()) != 0 {
			return fmt.Errorf("%v", sink.list())
		}
		return nil
	})
	f.namespace("late")
	time.Sleep(300 * time.Millisecond)
	if err := f.root("late"); !apierrors.IsNotFound(err) {
		t.Errorf("a replica that leads no more wrote: %v", err)
	}
	if i, err := f.imported(); err != nil || i.Spec.IPs[0] != "10.1.1.1" {
		t.Errorf("another's import: %+v, %v", i, err)
	}
	if c := f.export().Status.Conditions; len(c) != 0 {
		t.Errorf("conditions of another generation:\n%s", show(c))
	}
	stop()

	// Without rights for one kind the others are written, and the missing right is named.
	user := f.server.User("weak")
	f.allow("weak", "configmaps", "namespaces")
	_, stop = f.writer(func(c *Config) {
		c.Clusters, c.Sink = say([]Cluster{{ID: "amber", Local: true, Config: user}}), sink
	})
	f.until("roots", func() error { return f.root("late") })
	f.until("the missing right", func() error { return sink.has("Resource/serviceexports.multicluster.x-k8s.io Forbidden") })
	f.allow("weaker", "serviceexports")
	f.bind("weak", "weaker")
	f.snaps.set(exported(1))
	f.until("conditions after all", func() error {
		if n := len(f.export().Status.Conditions); n != 3 {
			return fmt.Errorf("%d conditions", n)
		}
		return nil
	})
	f.until("the right is there", func() error {
		if sink.has("Resource/serviceexports.multicluster.x-k8s.io Forbidden") == nil {
			return fmt.Errorf("%v", sink.list())
		}
		return nil
	})
	stop()

	// With the rights that the chart gives and no more, another cluster of the control plane gets its imports and roots,
	// and nothing else; a namespace on its way out gets nothing.
	if err := f.client.CoreV1().Namespaces().Delete(t.Context(), "late", metav1.DeleteOptions{}); err != nil { // no controller ends it
		t.Fatal(err)
	}
	if err := f.client.CoreV1().ConfigMaps("late").Delete(t.Context(), RootConfigMap, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := f.dyn.Resource(importsGVR).Namespace("shop").Delete(t.Context(), "reviews", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	f.grant("reader", remoteRules)
	f.namespace("after")
	next := exported(1)
	next.Exports[0].ExportTo = []mesh.ClusterID{"nobody"} // another message in a condition
	f.snaps.set(next)
	sink = &problems{}
	before := f.export().ResourceVersion
	_, stop = f.writer(func(c *Config) {
		c.Clusters, c.Sink = say([]Cluster{{ID: "birch", Config: f.server.User("reader")}}), sink
	})
	f.until("roots in another cluster", func() error { return f.root("after") })
	f.until("the import in another cluster", func() error { _, err := f.imported(); return err })
	time.Sleep(500 * time.Millisecond)
	stop()
	if err := f.root("late"); !apierrors.IsNotFound(err) {
		t.Errorf("roots in a namespace on its way out: %v", err)
	}
	if f.export().ResourceVersion != before {
		t.Error("a ServiceExport of another cluster was written")
	}
	if got := sink.list(); len(got) != 0 {
		t.Errorf("problems: %v", got)
	}
}

// remoteRules are what the chart gives the account of a remote secret to write with.
var remoteRules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"get", "list", "watch", "create", "delete", "patch", "update"}},
	{APIGroups: []string{"multicluster.x-k8s.io"}, Resources: []string{"serviceimports", "serviceimports/status"}, Verbs: []string{"create", "delete", "get", "list", "watch", "patch", "update"}},
	{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"create"}},
	{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{RootConfigMap}, Verbs: []string{"delete", "get", "list", "patch", "update", "watch"}},
}

// TestPace: an object that is changed back each time is written less and less often.
func TestPace(t *testing.T) {
	now := at(0)
	var p pace
	for range free {
		if w := p.wait(now); w > 0 {
			t.Fatalf("write %d waits %s", p.count, w)
		}
		p = p.wrote(now)
	}
	var total time.Duration
	last := time.Duration(0)
	for range 8 {
		p = p.wrote(now)
		w := p.wait(now)
		if w < last || w > 30*time.Second {
			t.Errorf("after %d writes it waits %s", p.count, w)
		}
		last, now = w, now.Add(w)
		if left := p.wait(now); left > 0 {
			t.Errorf("and then %s more", left)
		}
		total += w
	}
	if last != 30*time.Second || total < time.Minute {
		t.Errorf("it ends at %s, %s in all", last, total)
	}
	if p = p.wrote(now.Add(2 * calm)); p.wait(now.Add(2*calm)) > 0 {
		t.Error("it is not forgotten")
	}
}

// problems is a mesh.Sink.
type problems struct {
	mu  sync.Mutex
	now []string
}

func (p *problems) Report(_ string, in mesh.Input) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now = nil
	for _, x := range in.Problems {
		p.now = append(p.now, x.Object.String()+" "+x.Reason)
	}
}
func (p *problems) Forget(string) { p.Report("", mesh.Input{}) }
func (p *problems) Synced()       {}
func (p *problems) list() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.now)
}
func (p *problems) has(want string) error {
	if got := p.list(); !slices.Contains(got, want) {
		return fmt.Errorf("problems: %v", got)
	}
	return nil
}
