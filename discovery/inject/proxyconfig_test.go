package inject

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/wrapperspb"
	meshconfig "istio.io/api/mesh/v1alpha1"
	proxyconfig "istio.io/api/networking/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestProxyConfigs: what selects the Pod is over its annotation, that over its namespace, that over the root namespace,
// and that over the mesh's defaultConfig.
func TestProxyConfigs(t *testing.T) {
	object := func(namespace, name string, age int, labels map[string]string, threads int32, env map[string]string) *mesh.ProxyConfig {
		p := &mesh.ProxyConfig{Object: mesh.ObjectRef{Kind: "ProxyConfig", Namespace: namespace, Name: name}, Created: time.Unix(int64(1000-age), 0), Spec: &proxyconfig.ProxyConfig{EnvironmentVariables: env}}
		if threads >= 0 {
			p.Spec.Concurrency = wrapperspb.Int32(threads)
		}
		if labels != nil {
			p.Spec.Selector = &typev1beta1.WorkloadSelector{MatchLabels: labels}
		}
		return p
	}
	root := object("istio-system", "all", 0, nil, 2, map[string]string{"A": "root", "B": "root", "C": "root", "D": "root"})
	own := object("shop", "own", 9, nil, 3, map[string]string{"B": "own", "C": "own", "D": "own"})
	younger := object("shop", "a", 1, nil, 7, nil)
	web := object("shop", "web", 0, map[string]string{"app": "web"}, 0, map[string]string{"D": "web"})
	elsewhere := object("other", "x", 99, nil, 9, map[string]string{"A": "other"})
	rootSelects := object("istio-system", "web", 99, map[string]string{"app": "web"}, 8, nil)
	const annotation = "{concurrency: 4, proxyMetadata: {C: annotation, D: annotation}}"
	all := []*mesh.ProxyConfig{younger, web, own, root, elsewhere, rootSelects}
	for _, c := range []struct {
		name       string
		objects    []*mesh.ProxyConfig
		app, note  string
		threads    int32
		a, b, x, d string
	}{
		{"none", nil, "web", "", 1, "mesh", "", "", ""},
		{"root", []*mesh.ProxyConfig{root, elsewhere}, "web", "", 2, "root", "root", "root", "root"},
		{"namespace", []*mesh.ProxyConfig{younger, own, root}, "web", "", 3, "root", "own", "own", "own"},
		{"annotation", []*mesh.ProxyConfig{own, root}, "web", annotation, 4, "root", "own", "annotation", "annotation"},
		{"workload", all, "web", annotation, 0, "root", "own", "annotation", "web"},
		{"another workload", all, "api", annotation, 4, "root", "own", "annotation", "annotation"},
	} {
		conf := &Config{Mesh: &meshconfig.MeshConfig{DefaultConfig: &meshconfig.ProxyConfig{Concurrency: wrapperspb.Int32(1), ProxyMetadata: map[string]string{"A": "mesh"}}}}
		conf.Values.Global.IstioNamespace = "istio-system"
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": c.app}}}
		if c.note != "" {
			pod.Annotations = map[string]string{"proxy.istio.io/config": c.note}
		}
		var s settings
		r := &reader{pod: pod}
		conf.proxyConfig(r, &s, Request{Namespace: Namespace{Name: "shop"}, Proxies: c.objects})
		m := s.proxy.GetProxyMetadata()
		if r.err != nil || s.proxy.GetConcurrency().GetValue() != c.threads || m["A"] != c.a || m["B"] != c.b || m["C"] != c.x || m["D"] != c.d {
			t.Errorf("%s: %v %v", c.name, s.proxy, r.err)
		}
	}
}
