package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

// recorder is a Sink that remembers what it was told.
type recorder struct {
	mu      sync.Mutex
	have    map[string]mesh.Input
	synced  int
	reports map[string]int
	forgot  map[string]int
	changed chan struct{}
}

func newRecorder() *recorder {
	return &recorder{have: map[string]mesh.Input{}, reports: map[string]int{}, forgot: map[string]int{}, changed: make(chan struct{})}
}

func (r *recorder) do(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *recorder) Report(key string, in mesh.Input) {
	r.do(func() { r.have[key] = in; r.reports[key]++ })
}
func (r *recorder) Forget(key string) { r.do(func() { delete(r.have, key); r.forgot[key]++ }) }
func (r *recorder) Synced()           { r.do(func() { r.synced++ }) }

func (r *recorder) isSynced() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.synced == 0 {
		return errors.New("not synced")
	}
	return nil
}

// keys returns the keys that begin so.
func (r *recorder) keys(prefix string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for k := range r.have {
		if strings.HasPrefix(k, prefix) {
			out = append(out, k)
		}
	}
	slices.Sort(out)
	return out
}

func (r *recorder) get(key string) (mesh.Input, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	in, ok := r.have[key]
	return in, ok
}

func (r *recorder) counts() (reports, forgot map[string]int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.reports), maps.Clone(r.forgot)
}

// problems returns the reasons of all Problems with their objects.
func (r *recorder) problems() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, in := range r.have {
		for _, p := range in.Problems {
			out = append(out, p.String())
		}
	}
	slices.Sort(out)
	return out
}

// wait waits until cond gives no error.
func (r *recorder) wait(t *testing.T, within time.Duration, cond func() error) time.Duration {
	t.Helper()
	started := time.Now()
	deadline := time.After(within)
	for {
		r.mu.Lock()
		changed := r.changed
		r.mu.Unlock()
		err := cond()
		if err == nil {
			return time.Since(started)
		}
		select {
		case <-changed:
		case <-time.After(100 * time.Millisecond): // what is waited for may be elsewhere
		case <-deadline:
			t.Fatalf("after %s: %v\nproblems: %s", within, err, strings.Join(r.problems(), "\n  "))
		}
	}
}

func (r *recorder) has(key string) func() error {
	return func() error {
		if _, ok := r.get(key); !ok {
			return fmt.Errorf("%s is not reported; there are %v", key, r.keys(strings.SplitN(key, "/", 2)[0]))
		}
		return nil
	}
}

func (r *recorder) lacks(key string) func() error {
	return func() error {
		if _, ok := r.get(key); ok {
			return fmt.Errorf("%s is still reported", key)
		}
		return nil
	}
}

// complains waits for a Problem that contains all the words.
func (r *recorder) complains(words ...string) func() error {
	return func() error {
		for _, p := range r.problems() {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(p, w) }) {
				return nil
			}
		}
		return fmt.Errorf("no problem with %q", words)
	}
}

func (r *recorder) content(words ...string) func() error {
	return func() error {
		if r.complains(words...)() == nil {
			return fmt.Errorf("there is still a problem with %q", words)
		}
		return nil
	}
}

// run starts a source of the cluster; it ends with the test, or when the returned function is called.
func run(t *testing.T, cluster string, api *rest.Config, sink mesh.Sink) (*kube.Source, func()) {
	t.Helper()
	s, err := kube.New(kube.Config{
		Cluster: mesh.ClusterID(cluster), TrustDomain: mesh.TrustDomain(cluster + ".mesh"), API: api, Sink: sink,
		Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)), Beat: 300 * time.Millisecond, Retry: 500 * time.Millisecond, EverySecret: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, runSource(t, s)
}

// runSource runs a source until the test ends, or the returned function is called.
func runSource(t *testing.T, s *kube.Source) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			t.Errorf("source: %v", err)
		}
	}()
	var once sync.Once
	stop := func() { once.Do(func() { cancel(); <-done }) }
	t.Cleanup(stop)
	return stop
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(line []byte) (int, error) {
	if os.Getenv("KUBE_TEST_LOG") != "" {
		w.t.Log(strings.TrimSpace(string(line)))
	}
	return len(line), nil
}

// cluster is an API server with a client for anything.
type cluster struct {
	*kubetest.Server
	t   *testing.T
	any dynamic.Interface
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	s := kubetest.APIServer(t)
	d, err := dynamic.NewForConfig(s.REST())
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{Server: s, t: t, any: d}
	c.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n")
	return c
}

// plural names the resource of a kind.
func plural(kind string) string {
	k := strings.ToLower(kind)
	switch {
	case strings.HasSuffix(k, "policy"), strings.HasSuffix(k, "entry"), strings.HasSuffix(k, "telemetry"):
		return strings.TrimSuffix(k, "y") + "ies"
	case strings.HasSuffix(k, "s"):
		return k + "es"
	}
	return k + "s"
}

func documents(t *testing.T, text string) []*unstructured.Unstructured {
	t.Helper()
	var out []*unstructured.Unstructured
	dec := yaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		var raw map[string]any
		if err := dec.Decode(&raw); errors.Is(err, io.EOF) {
			return out
		} else if err != nil {
			t.Fatal(err)
		}
		if raw != nil {
			b, _ := json.Marshal(raw)
			u := &unstructured.Unstructured{}
			if err := u.UnmarshalJSON(b); err != nil {
				t.Fatal(err)
			}
			out = append(out, u)
		}
	}
}

func (c *cluster) resource(u *unstructured.Unstructured) dynamic.ResourceInterface {
	gvk := u.GroupVersionKind()
	r := c.any.Resource(schema.GroupVersionResource{Group: gvk.Group, Version: gvk.Version, Resource: plural(gvk.Kind)})
	if u.GetNamespace() == "" {
		return r
	}
	return r.Namespace(u.GetNamespace())
}

// apply creates or replaces the objects, with their status.
func (c *cluster) apply(text string) {
	c.t.Helper()
	for _, u := range documents(c.t, text) {
		status, hasStatus := u.Object["status"]
		r, ctx := c.resource(u), context.Background()
		var made *unstructured.Unstructured
		var err error
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) { // a new kind is served a moment later
			var old *unstructured.Unstructured
			if old, err = r.Get(ctx, u.GetName(), metav1.GetOptions{}); err == nil {
				u.SetResourceVersion(old.GetResourceVersion())
				made, err = r.Update(ctx, u, metav1.UpdateOptions{})
			} else if apierrors.IsNotFound(err) {
				made, err = r.Create(ctx, u, metav1.CreateOptions{})
			}
			if !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && !apierrors.IsServiceUnavailable(err) || time.Now().After(deadline) {
				break
			}
		}
		if err != nil {
			c.t.Fatalf("apply %s %s: %v", u.GetKind(), u.GetName(), err)
		}
		if hasStatus {
			made.Object["status"] = status
			if _, err := r.UpdateStatus(ctx, made, metav1.UpdateOptions{}); err != nil {
				c.t.Fatalf("status of %s %s: %v", u.GetKind(), u.GetName(), err)
			}
		}
	}
}

func (c *cluster) remove(text string) {
	c.t.Helper()
	now := int64(0)
	for _, u := range documents(c.t, text) {
		if err := c.resource(u).Delete(context.Background(), u.GetName(), metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil && !apierrors.IsNotFound(err) {
			c.t.Fatalf("delete %s %s: %v", u.GetKind(), u.GetName(), err)
		}
	}
}

// moduleFile is a file of a module that we depend on.
func moduleFile(t *testing.T, module string, path ...string) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-mod=mod", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		t.Fatalf("find module %s: %v", module, err)
	}
	data, err := os.ReadFile(filepath.Join(append([]string{strings.TrimSpace(string(out))}, path...)...))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func istioCRDs(t *testing.T) string {
	return moduleFile(t, "istio.io/api", "kubernetes", "customresourcedefinitions.gen.yaml")
}

// crd returns the definition of one resource.
func crd(t *testing.T, all, name string) string {
	t.Helper()
	for doc := range strings.SplitSeq(all, "\n---\n") {
		if strings.Contains(doc, "\n  name: "+name+"\n") {
			return doc
		}
	}
	t.Fatalf("no CustomResourceDefinition %s", name)
	return ""
}

// allow gives a user the right to get, list and watch resources, "GROUP/RESOURCE" each, everywhere.
func (c *cluster) allow(user, name string, resources ...string) {
	c.t.Helper()
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, r := range resources {
		group, resource, _ := strings.Cut(r, "/")
		verbs := []string{"get", "list", "watch"}
		if resource == "tokenreviews" {
			verbs = []string{"create"}
		}
		role.Rules = append(role.Rules, rbacv1.PolicyRule{APIGroups: []string{group}, Resources: []string{resource}, Verbs: verbs})
	}
	rbac := c.Client().RbacV1()
	if _, err := rbac.ClusterRoles().Create(context.Background(), role, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: user}},
	}
	if _, err := rbac.ClusterRoleBindings().Create(context.Background(), binding, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

var coreResources = []string{"/namespaces", "/nodes", "/pods", "/services", "discovery.k8s.io/endpointslices", "/secrets", "/configmaps", "networking.k8s.io/ingresses", "networking.k8s.io/ingressclasses"}

// kubeconfig writes a client configuration as a kubeconfig with data in place, as remote secrets hold it.
func kubeconfig(t *testing.T, c *rest.Config) string {
	t.Helper()
	k := clientcmdapi.NewConfig()
	user := &clientcmdapi.AuthInfo{Token: c.BearerToken, ClientCertificateData: inline(t, c.CertData, c.CertFile), ClientKeyData: inline(t, c.KeyData, c.KeyFile)}
	k.Clusters["c"] = &clientcmdapi.Cluster{Server: c.Host, CertificateAuthorityData: inline(t, c.CAData, c.CAFile)}
	k.AuthInfos["u"], k.Contexts["x"], k.CurrentContext = user, &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}, "x"
	out, err := clientcmd.Write(*k)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func inline(t *testing.T, data []byte, file string) []byte {
	t.Helper()
	if len(data) == 0 && file != "" {
		var err error
		if data, err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
	}
	return data
}

// remoteSecret is a Secret as istioctl create-remote-secret makes it.
func remoteSecret(name, key, kubeconfig string) string {
	u := map[string]any{
		"apiVersion": "v1", "kind": "Secret",
		"metadata": map[string]any{
			"name": name, "namespace": "istio-system", "labels": map[string]string{"istio/multiCluster": "true"},
			"annotations": map[string]string{"networking.istio.io/cluster": key},
		},
		"stringData": map[string]string{key: kubeconfig},
	}
	b, _ := json.Marshal(u)
	return string(b)
}
