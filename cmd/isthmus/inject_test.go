package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

const webPod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: web, image: web}]}\n"

func TestInjectFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	web, host := file("web.yaml", webPod), file("host.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: host}\nspec: {hostNetwork: true, containers: [{name: a, image: b}]}\n")
	bad := file("bad.txt", "kind: Pod\nmetadata: {annotations: {sidecar.istio.io/logLevel: loud}}\nspec: {containers: [{name: a}]}\n")
	values, more := file("values.txt", "global: {hub: example, tag: one}\n"), file("more.txt", "global: {tag: two}\n")
	mesh := file("mesh.txt", "trustDomain: east.mesh\n")
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"inject", "-f", web}, []string{"image: isthmus-agent:latest", "cluster.local"}},
		{[]string{"inject", "-f", dir}, []string{"name: host}\nspec: {hostNetwork: true", "---\n", "name: istio-proxy"}},
		{[]string{"inject", "-f", web, "--values", values, "--values", more, "--set", "global.proxy.logLevel=debug", "--mesh-config", mesh}, []string{"image: example/isthmus-agent:two", "--proxyLogLevel=debug", "east.mesh"}},
		{[]string{"inject", "-f", web, "-n", "kube-system"}, []string{webPod}},
		{[]string{"check-inject", "-f", web, "-f", host}, []string{"Pod/default/web", "yes", "ByDefault", "Pod/default/host", "HostNetwork"}},
		{[]string{"check-inject", "-f", host, "-o", "json"}, []string{`"inject": false`, `"reason": "HostNetwork"`}},
	} {
		out, _, err := isthmus(c.args...)
		if err != nil {
			t.Errorf("%v: %v", c.args, err)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%v: no %q in\n%s", c.args, w, out)
			}
		}
	}
	for _, c := range []struct {
		args       []string
		want, hint string
	}{
		{[]string{"inject"}, "no file is named", "-f FILE"},
		{[]string{"inject", "-f", bad}, bad + `:2: Pod/default/: annotation sidecar.istio.io/logLevel: "loud"`, "nothing was written"},
		{[]string{"inject", "-f", web, "--set", "global.proxy.privileged=3"}, "privileged", "injection.md"},
		{[]string{"inject", "-f", web, "--values", filepath.Join(dir, "none")}, "none", ""},
		{[]string{"inject", "-f", web, "--kubeconfig", bad, "--set", "a=b"}, "asked of a cluster and given in files", "leave out"},
		{[]string{"check-inject", "--kubeconfig", filepath.Join(dir, "none")}, "kubeconfig", "get-contexts"},
	} {
		out, _, err := isthmus(c.args...)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(diag.HintOf(err), c.hint) || c.args[0] == "inject" && out != "" {
			t.Errorf("%v: %v, hint %q, output %q", c.args, err, diag.HintOf(err), out)
		}
	}
}

// TestInjectCluster reads the configuration of a real API server, and explains its pods.
func TestInjectCluster(t *testing.T) {
	s := kubetest.APIServer(t)
	kube, ctx := s.Client(), context.Background()
	make := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, labels := range map[string]map[string]string{"istio-system": nil, "shop": {"istio-injection": "enabled"}} {
		_, err := kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{})
		make(err)
	}
	web := filepath.Join(t.TempDir(), "web.yaml")
	make(os.WriteFile(web, []byte(webPod), 0o600))
	if _, _, err := isthmus("inject", "-f", web, "--kubeconfig", s.Kubeconfig()); err == nil || !strings.Contains(diag.HintOf(err), "install Isthmus") {
		t.Errorf("without an installation: %v, %s", err, diag.HintOf(err))
	}
	_, err := kube.CoreV1().ConfigMaps("istio-system").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "istio-sidecar-injector"},
		Data: map[string]string{"values": "global: {hub: of-the-cluster}\n"}}, metav1.CreateOptions{})
	make(err)
	out, _, err := isthmus("inject", "-f", web, "--kubeconfig", s.Kubeconfig())
	if err != nil || !strings.Contains(out, "image: of-the-cluster/isthmus-agent:latest") {
		t.Errorf("%v\n%s", err, out)
	}
	for name, labels := range map[string]map[string]string{"early": nil, "out": {"sidecar.istio.io/inject": "false"}} {
		_, err := kube.CoreV1().Pods("shop").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
			Spec: corev1.PodSpec{ServiceAccountName: "default", Containers: []corev1.Container{{Name: "web", Image: "web"}}}}, metav1.CreateOptions{})
		make(err)
	}
	out, _, err = isthmus("check-inject", "--kubeconfig", s.Kubeconfig(), "-n", "shop")
	for _, want := range []string{"Pod/shop/early", "Webhook", "there is no MutatingWebhookConfiguration istio-sidecar-injector", "Pod/shop/out", "DisabledByPod"} {
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("%v: no %q in\n%s", err, want, out)
		}
	}
	if _, _, err := isthmus("check-inject", "--kubeconfig", s.Kubeconfig(), "-n", "shop", "none"); err == nil || !strings.Contains(err.Error(), "shop/none") {
		t.Errorf("a pod that is not there: %v", err)
	}
}
