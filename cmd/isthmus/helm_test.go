package main

import (
	"context"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/kube"
	"helm.sh/helm/v3/pkg/storage"
	"helm.sh/helm/v3/pkg/storage/driver"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/install"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

// TestHelm wants Helm itself to find, read and upgrade what the program installed, and the other way round.
func TestHelm(t *testing.T) {
	s := kubetest.APIServer(t)
	// Without the large definitions: TestInstall has them, and what Helm makes of them is compared below.
	const set = "cluster.name=amber,crds.istio=false,crds.mcs=false"
	args := []string{"install", "--kubeconfig", s.Kubeconfig(), "--profile", "minimal", "--set", set, "--wait=false"}
	must(t, 0, []string{"installed revision 1"}, args...)

	secrets := driver.NewSecrets(s.Client().CoreV1().Secrets("istio-system"))
	getter := genericclioptions.NewConfigFlags(false)
	kubeconfig, namespace := s.Kubeconfig(), "istio-system"
	getter.KubeConfig, getter.Namespace = &kubeconfig, &namespace
	cfg := &action.Configuration{Releases: storage.Init(secrets), KubeClient: kube.New(getter), RESTClientGetter: getter, Log: func(string, ...any) {}}
	listed, err := action.NewList(cfg).Run()
	if err != nil || len(listed) != 1 || listed[0].Name != "isthmus" || listed[0].Info.Status != "deployed" || listed[0].Version != 1 {
		t.Fatalf("helm list: %v, %v", listed, err)
	}
	ch, err := install.Chart()
	if err != nil {
		t.Fatal(err)
	}
	if template(t, ch, listed[0].Config) != listed[0].Manifest {
		t.Error("helm template renders another manifest")
	}
	all := map[string]any{"cluster": map[string]any{"name": "amber"}, "cni": map[string]any{"enabled": true}, "crds": map[string]any{"gatewayAPI": true}}
	if m, err := install.Render(ch, all, namespace, false); err != nil || template(t, ch, all) != m.Text {
		t.Errorf("with all definitions helm template renders another manifest: %v", err)
	}

	upgrade := action.NewUpgrade(cfg)
	upgrade.Namespace, upgrade.ReuseValues = namespace, true
	if _, err := upgrade.RunWithContext(context.Background(), "isthmus", ch, map[string]any{"isthmusd": map[string]any{"logLevel": "debug"}}); err != nil {
		t.Fatalf("helm upgrade: %v", err)
	}
	// The field that Helm has changed is owned again; nothing else is touched, and then nothing at all.
	must(t, 0, []string{"objects: 1 changed", "revision 2"}, "install", "--kubeconfig", s.Kubeconfig(), "--wait=false")
	must(t, 0, []string{"nothing to change: revision 2"}, "install", "--kubeconfig", s.Kubeconfig(), "--wait=false")
	must(t, 0, []string{"changed Deployment/istio-system/isthmusd", "installed revision 3"}, args...)
	d, err := s.Client().AppsV1().Deployments(namespace).Get(context.Background(), "isthmusd", metav1.GetOptions{})
	if err != nil || !slices.Contains(d.Spec.Template.Spec.Containers[0].Args, "info") {
		t.Errorf("%v, %v", d.Spec.Template.Spec.Containers[0].Args, err)
	}
	if last, err := cfg.Releases.Deployed("isthmus"); err != nil || last.Version != 3 {
		t.Errorf("%v, %v", last, err)
	}
}

// template returns what helm template prints.
func template(t *testing.T, ch *chart.Chart, values map[string]any) string {
	t.Helper()
	plain := action.NewInstall(&action.Configuration{Log: func(string, ...any) {}})
	plain.KubeVersion = &chartutil.KubeVersion{Version: "v1.36.0", Major: "1", Minor: "36"}
	plain.DryRun, plain.ClientOnly, plain.ReleaseName, plain.Namespace, plain.Replace = true, true, "isthmus", "istio-system", true
	rendered, err := plain.RunWithContext(context.Background(), ch, values)
	if err != nil {
		t.Fatalf("helm template: %v", err)
	}
	return rendered.Manifest
}

// TestDryRun gives what --dry-run prints to an API server, as kubectl apply --server-side does.
func TestDryRun(t *testing.T) {
	s := kubetest.APIServer(t)
	dyn, err := dynamic.NewForConfig(s.REST())
	if err != nil {
		t.Fatal(err)
	}
	taken := map[string]bool{} // definitions are in both profiles
	for _, profile := range []string{"demo", "remote"} {
		args := []string{"install", "--dry-run", "--kubeconfig", "/nonexistent", "--profile", profile, "--set", "cluster.name=amber,cni.enabled=true,remote.controlPlane={10.1.0.7,fd00::7},isthmusd.autoscaling.enabled=true", "--set", "crds.gatewayAPI=true,validation.enabled=true"}
		text := must(t, 0, nil, args...)
		if again := must(t, 0, nil, args...); again != text {
			t.Errorf("%s: printed twice it differs", profile)
		}
		n := 0
		for part := range strings.SplitSeq(text, "\n---\n") {
			n++
			if taken[part] {
				continue
			}
			taken[part] = true
			o := &unstructured.Unstructured{}
			if err := yaml.UnmarshalStrict([]byte(part), &o.Object); err != nil {
				t.Fatalf("%s: %v in\n%s", profile, err, part)
			}
			if len(o.Object) == 0 {
				t.Errorf("%s: an empty document:\n%s", profile, part)
				continue
			}
			lists, err := s.Client().Discovery().ServerResourcesForGroupVersion(o.GetAPIVersion())
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(lists.APIResources, func(r metav1.APIResource) bool { return r.Kind == o.GetKind() && !strings.Contains(r.Name, "/") })
			gvr := o.GroupVersionKind().GroupVersion().WithResource(lists.APIResources[i].Name)
			var client dynamic.ResourceInterface = dyn.Resource(gvr)
			if o.GetNamespace() != "" {
				client = dyn.Resource(gvr).Namespace(o.GetNamespace())
			}
			if _, err := client.Apply(context.Background(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "kubectl", Force: true}); err != nil {
				t.Errorf("%s: %s/%s: %v", profile, o.GetKind(), o.GetName(), err)
			}
		}
		if n < 30 {
			t.Errorf("%s: %d objects", profile, n)
		}
	}
}

// TestStub changes the DNS of a cluster that runs kube-dns, and that of one whose Corefile it must not touch.
func TestStub(t *testing.T) {
	s := kubetest.APIServer(t)
	ctx, maps := context.Background(), s.Client().CoreV1().ConfigMaps("kube-system")
	at := func(args ...string) []string { return append(args, "--kubeconfig", s.Kubeconfig()) }
	const names = "crds.istio=false,crds.mcs=false,crds.isthmus=false,cluster.name=amber" // resource definitions take most of the time
	const before = `{ "acme.local" : ["1.2.3.4"] }`
	put := func(name string, data map[string]string) {
		t.Helper()
		if _, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	domains := func() string {
		t.Helper()
		cm, err := maps.Get(ctx, "kube-dns", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return cm.Data["stubDomains"]
	}
	must(t, 0, []string{"dns: no DNS of the cluster is known"}, at("install", "--wait=false", "--set", names+",dns.clusterIP=10.96.0.53")...)
	put("kube-dns", map[string]string{"stubDomains": before, "upstreamNameservers": "[]"})
	must(t, 0, []string{`+ {"acme.local":["1.2.3.4"],"clusterset.local":["10.96.0.53"],"global":["10.96.0.53"]}`}, at("dns", "stub", "--show")...)
	must(t, 0, []string{"dns: left as it is"}, at("install", "--wait=false")...)
	if got := domains(); got != before {
		t.Errorf("nobody agreed: %s", got)
	}
	must(t, 0, []string{"dns: changed ConfigMap kube-system/kube-dns"}, at("install", "--wait=false", "--yes")...)
	if got := domains(); !strings.Contains(got, `"global":["10.96.0.53"]`) {
		t.Errorf("added: %s", got)
	}
	must(t, 0, []string{"is as it should be"}, at("dns", "stub", "--add", "--yes")...)
	must(t, 0, []string{"dns: changed"}, at("dns", "stub", "--remove", "--yes")...)
	if got := domains(); got != before {
		t.Errorf("removed: %s, want %s", got, before)
	}
	must(t, 0, []string{"dns: changed"}, at("dns", "stub", "--add", "--yes")...)
	if _, err := maps.Patch(ctx, "kube-dns", types.MergePatchType, []byte(`{"data":{"stubDomains":"{\"global\":[\"10.96.0.53\"],\"clusterset.local\":[\"10.96.0.53\"],\"new.local\":[\"5.6.7.8\"]}"}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	must(t, 0, []string{"kube-dns is what it was"}, at("uninstall")...)
	if got := domains(); got != `{"new.local":["5.6.7.8"]}` {
		t.Errorf("edited since: %s", got)
	}
	put("coredns", map[string]string{"Corefile": ".:53 {\n    proxy . /etc/resolv.conf\n}\n"})
	must(t, 1, []string{"corefile line 2: plugin proxy is gone", "hint: upgrade CoreDNS and write forward"}, at("install", "--wait=false", "--set", names, "--yes", "--namespace", "mesh")...)
}
