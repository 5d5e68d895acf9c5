package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

// invoke runs the program's command line and returns what it printed and its exit code.
func invoke(t *testing.T, args ...string) (out string, code int) {
	t.Helper()
	var buf bytes.Buffer
	cmd := command()
	cmd.SetArgs(args)
	cmd.SetOut(&buf)
	cmd.SetErr(&buf)
	cmd.SetIn(strings.NewReader(""))
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	if err := cmd.ExecuteContext(ctx); err != nil {
		diag.Print(&buf, "isthmus", err)
		code = exitCode(err)
	}
	return buf.String(), code
}

// must runs it and wants the exit code and each of the texts.
func must(t *testing.T, code int, texts []string, args ...string) string {
	t.Helper()
	out, got := invoke(t, args...)
	if got != code {
		t.Fatalf("isthmus %s: exit code %d, want %d\n%s", strings.Join(args, " "), got, code, out)
	}
	for _, want := range texts {
		if !strings.Contains(out, want) {
			t.Fatalf("isthmus %s: no %q in\n%s", strings.Join(args, " "), want, out)
		}
	}
	return out
}

// everything returns the resource version of every object of the cluster, beside those that change by themselves.
func everything(t *testing.T, s *kubetest.Server) map[string]string {
	t.Helper()
	client := s.Client()
	objects, err := metadata.NewForConfig(s.REST()) // definitions are large: their heads are enough
	if err != nil {
		t.Fatal(err)
	}
	lists, err := client.Discovery().ServerPreferredResources()
	if err != nil && len(lists) == 0 {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, l := range lists {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range l.APIResources {
			if !slices.Contains(r.Verbs, "list") || r.Name == "events" || r.Name == "componentstatuses" {
				continue
			}
			list, err := objects.Resource(gv.WithResource(r.Name)).List(context.Background(), metav1.ListOptions{})
			if err != nil {
				continue // the kind went away meanwhile
			}
			for _, o := range list.Items {
				if r.Name == "leases" && o.GetNamespace() == "kube-system" {
					continue
				}
				out[fmt.Sprintf("%s.%s/%s/%s", r.Name, gv.Group, o.GetNamespace(), o.GetName())] = o.GetResourceVersion()
			}
		}
	}
	return out
}

// settled returns everything once nothing has changed for a while.
func settled(t *testing.T, s *kubetest.Server) map[string]string {
	t.Helper()
	before := everything(t, s)
	for range 100 {
		time.Sleep(500 * time.Millisecond)
		now := everything(t, s)
		if maps.Equal(before, now) {
			return now
		}
		before = now
	}
	t.Fatal("the cluster does not come to rest")
	return nil
}

func differing(a, b map[string]string) (out []string) {
	for k, v := range a {
		if w, ok := b[k]; !ok {
			out = append(out, "- "+k)
		} else if v != w {
			out = append(out, "~ "+k)
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			out = append(out, "+ "+k)
		}
	}
	slices.Sort(out)
	return out
}

const corefile = ".:53 {\n    errors\n    # ours\n    kubernetes cluster.local\n    forward . /etc/resolv.conf\n    reload\n}" // no line break at the end

// TestInstall installs, runs again, upgrades, is refused and uninstalls on a real API server.
func TestInstall(t *testing.T) {
	s := kubetest.New(t, kubetest.Config{Controllers: true})
	ctx, client := context.Background(), s.Client()
	if _, err := client.CoreV1().ConfigMaps("kube-system").Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "coredns"}, Data: map[string]string{"Corefile": corefile},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// The current context leads elsewhere: nothing may be asked there.
	kubeconfig, asked := twoContexts(t, s.Kubeconfig())
	at := func(args ...string) []string {
		return append(args, "--kubeconfig", kubeconfig, "--context", "amber")
	}
	before := settled(t, s)

	must(t, 2, []string{"isthmus: no installation of release isthmus", "hint: --namespace"}, at("uninstall")...)
	must(t, 2, []string{"unknown value isthmusd.replica", "hint: did you mean isthmusd.replicas?"}, at("install", "--set", "isthmusd.replica=2")...)
	if d := differing(before, settled(t, s)); len(d) > 0 {
		t.Fatalf("what was refused has changed something: %v", d)
	}
	must(t, 0, []string{
		"context amber: https://127.0.0.1:", "created CustomResourceDefinition/virtualservices.networking.istio.io", "created Deployment/istio-system/isthmusd",
		"+ global:53 {", "dns: changed ConfigMap kube-system/coredns", "installed revision 1 in namespace istio-system of context amber", "isthmus token create --for NAME",
	}, at("install", "--wait=false", "--yes")...)
	installed := settled(t, s)
	must(t, 0, []string{"nothing to change: revision 1 is what is wanted"}, at("install", "--wait=false")...)
	if d := differing(installed, settled(t, s)); len(d) > 0 {
		t.Fatalf("the second run has changed something: %v", d)
	}
	config(t, client, "cluster: amber", "network: amber", "trustDomain: amber.mesh")

	t.Run("rights", func(t *testing.T) { checkRights(t, client) })
	t.Run("rules", func(t *testing.T) { checkRules(t, client) })
	t.Run("not ready", func(t *testing.T) {
		must(t, 3, []string{"not ready after 1s", "Deployment/istio-system/isthmusd: 0 of 2 pods are ready, isthmusd-", "Deployment/istio-system/isthmus-dns", "hint: isthmus verify-install"}, at("install", "--timeout", "1s")...)
		out := must(t, 1, []string{"CustomResourceDefinition", "not ready: 0 of 1 pods are ready", "objects are missing or not ready"}, at("verify-install")...)
		if strings.Contains(strings.TrimSuffix(out, "what is missing\n"), " missing\n") {
			t.Errorf("something is missing:\n%s", out)
		}
	})
	t.Run("upgrade", func(t *testing.T) {
		must(t, 0, []string{"changed Deployment/istio-system/isthmusd", "deleted PodDisruptionBudget/istio-system/isthmusd", "installed revision 2"}, at("install", "--wait=false", "--set", "isthmusd.replicas=1")...)
		must(t, 0, []string{"warning: value isthmusd.replicas was set before", "created PodDisruptionBudget/istio-system/isthmusd", "installed revision 3"}, at("install", "--wait=false", "--set", "isthmusd.logLevel=debug")...)
		must(t, 0, []string{"nothing to change: revision 3"}, at("install", "--wait=false")...)
	})
	t.Run("drift", func(t *testing.T) {
		if err := client.CoreV1().Services("istio-system").Delete(ctx, "istiod", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		must(t, 1, []string{"istiod", "missing"}, at("verify-install")...)
		must(t, 0, []string{"created Service/istio-system/istiod", "revision 3"}, at("install", "--wait=false")...)
	})
	t.Run("uninstall", func(t *testing.T) { uninstallAll(t, s, before, at) })
	if n := asked.Load(); n > 0 {
		t.Errorf("the other context was asked %d times", n)
	}
}

// uninstallAll leaves what isthmusd would have written and what users have, and wants all of it gone.
func uninstallAll(t *testing.T, s *kubetest.Server, before map[string]string, at func(...string) []string) {
	ctx := context.Background()
	dyn, err := dynamic.NewForConfig(s.REST())
	if err != nil {
		t.Fatal(err)
	}
	asIsthmusd, err := kubernetes.NewForConfig(s.ServiceAccount("istio-system", "isthmusd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range []string{"default", "kube-system", "istio-system"} {
		if _, err := asIsthmusd.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "istio-ca-root-cert", Labels: map[string]string{"app.kubernetes.io/managed-by": "isthmus"}}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := asIsthmusd.CoreV1().Secrets("istio-system").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "isthmus-ca", Labels: map[string]string{"app.kubernetes.io/managed-by": "isthmusd"}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := asIsthmusd.CoordinationV1().Leases("istio-system").Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "isthmus-leader"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	rule := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": map[string]any{"name": "api", "namespace": "default"},
		"spec": map[string]any{"hosts": []any{"api.example.com"}, "ports": []any{map[string]any{"number": int64(443), "name": "tls", "protocol": "TLS"}}, "resolution": "DNS"},
	}}
	entries := schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "serviceentries"}
	if _, err := dyn.Resource(entries).Namespace("default").Create(ctx, rule, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	there := settled(t, s)
	must(t, 2, []string{"nothing is removed", "ServiceEntry/default/api", "hint: isthmus uninstall --purge"}, at("uninstall")...)
	if d := differing(there, settled(t, s)); len(d) > 0 {
		t.Fatalf("what was refused has changed something: %v", d)
	}
	must(t, 0, []string{"dns: ConfigMap kube-system/coredns is what it was", "deleted MutatingWebhookConfiguration/istio-sidecar-injector", "deleted Namespace/istio-system", "removed from context amber"}, at("uninstall", "--purge")...)
	var left []string
	for range 120 {
		left = slices.DeleteFunc(differing(before, everything(t, s)), func(l string) bool { return l == "~ configmaps./kube-system/coredns" })
		if len(left) == 0 {
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	if len(left) > 0 {
		t.Errorf("uninstall has left or lost: %v", left)
	}
	cm, err := s.Client().CoreV1().ConfigMaps("kube-system").Get(ctx, "coredns", metav1.GetOptions{})
	if err != nil || cm.Data["Corefile"] != corefile || len(cm.Annotations) > 0 {
		t.Errorf("the Corefile is %q, annotations %v, %v", cm.Data["Corefile"], cm.Annotations, err)
	}
}

// config wants the lines in the configuration of isthmusd.
func config(t *testing.T, client kubernetes.Interface, lines ...string) {
	t.Helper()
	cm, err := client.CoreV1().ConfigMaps("istio-system").Get(context.Background(), "isthmusd", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if !strings.Contains("\n"+cm.Data["isthmusd.yaml"]+"\n", "\n"+l+"\n") {
			t.Errorf("no line %q in\n%s", l, cm.Data["isthmusd.yaml"])
		}
	}
}

// twoContexts writes a kubeconfig with the server as amber and, current, a context whose server counts who asks.
func twoContexts(t *testing.T, from string) (string, *atomic.Int32) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	asked := &atomic.Int32{}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			asked.Add(1)
			c.Close()
		}
	}()
	cfg, err := clientcmd.LoadFromFile(from)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Contexts["amber"] = cfg.Contexts[cfg.CurrentContext].DeepCopy()
	cfg.Clusters["other"] = &clientcmdapi.Cluster{Server: "https://" + ln.Addr().String()}
	cfg.Contexts["other"] = &clientcmdapi.Context{Cluster: "other", AuthInfo: cfg.Contexts["amber"].AuthInfo}
	cfg.CurrentContext = "other"
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*cfg, path); err != nil {
		t.Fatal(err)
	}
	return path, asked
}

// checkRights asks the API server what the service accounts may do.
func checkRights(t *testing.T, client kubernetes.Interface) {
	for _, c := range []struct {
		account, verb, resource, namespace, name string
		want                                     bool
	}{
		{"isthmusd", "watch", "pods", "", "", true},
		{"isthmusd", "watch", "endpointslices.discovery.k8s.io", "", "", true},
		{"isthmusd", "watch", "virtualservices.networking.istio.io", "", "", true},
		{"isthmusd", "watch", "gateways.gateway.networking.k8s.io", "", "", true},
		{"isthmusd", "update", "serviceexports.multicluster.x-k8s.io/status", "default", "", true},
		{"isthmusd", "create", "serviceimports.multicluster.x-k8s.io", "default", "", true},
		{"isthmusd", "create", "tokenreviews.authentication.k8s.io", "", "", true},
		{"isthmusd", "watch", "configmaps", "", "istio-ca-root-cert", true},
		{"isthmusd", "watch", "configmaps", "istio-system", "", true},
		{"isthmusd", "list", "secrets", "istio-system", "", true},
		{"isthmusd", "update", "leases.coordination.k8s.io", "istio-system", "isthmus-leader", true},
		{"isthmusd", "patch", "mutatingwebhookconfigurations.admissionregistration.k8s.io", "", "istio-sidecar-injector", true},
		{"isthmusd", "create", "events", "default", "", true},

		{"isthmusd", "patch", "mutatingwebhookconfigurations.admissionregistration.k8s.io", "", "another", false},
		{"isthmusd", "list", "secrets", "default", "", false},
		{"isthmusd", "get", "configmaps", "default", "app", false},
		{"isthmusd", "update", "configmaps", "kube-system", "coredns", false},
		{"isthmusd", "update", "virtualservices.networking.istio.io", "default", "", false},
		{"isthmusd", "delete", "pods", "default", "", false},
		{"isthmusd", "update", "leases.coordination.k8s.io", "istio-system", "another", false},
		{"isthmusd", "impersonate", "users", "", "", false},

		{"istio-reader-service-account", "watch", "pods", "", "", true},
		{"istio-reader-service-account", "create", "tokenreviews.authentication.k8s.io", "", "", true},
		{"istio-reader-service-account", "update", "configmaps", "default", "istio-ca-root-cert", true},
		{"istio-reader-service-account", "list", "secrets", "istio-system", "", false},
		{"istio-reader-service-account", "list", "virtualservices.networking.istio.io", "", "", false},
		{"istio-eastwestgateway", "list", "pods", "", "", false},
		{"isthmus-dns", "list", "services", "", "", false},
	} {
		resource, sub, _ := strings.Cut(c.resource, "/")
		resource, group, _ := strings.Cut(resource, ".")
		got, err := client.AuthorizationV1().SubjectAccessReviews().Create(context.Background(), &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: "system:serviceaccount:istio-system:" + c.account, Groups: []string{"system:serviceaccounts", "system:authenticated"},
			ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: c.verb, Group: group, Resource: resource, Subresource: sub, Namespace: c.namespace, Name: c.name},
		}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got.Status.Allowed != c.want {
			t.Errorf("%s %s %s %s/%s: allowed %v, want %v", c.account, c.verb, c.resource, c.namespace, c.name, got.Status.Allowed, c.want)
		}
	}
}

// checkRules looks up every resource that a role names: a wrong name would give no right, without a word.
func checkRules(t *testing.T, client kubernetes.Interface) {
	_, lists, err := client.Discovery().ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	served, groups := map[string]bool{}, map[string]bool{}
	for _, l := range lists {
		gv, _ := schema.ParseGroupVersion(l.GroupVersion)
		groups[gv.Group] = true
		for _, r := range l.APIResources {
			served[gv.Group+"/"+r.Name] = true
		}
	}
	roles, err := client.RbacV1().ClusterRoles().List(context.Background(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/part-of=isthmus"})
	if err != nil || len(roles.Items) < 2 {
		t.Fatalf("%d roles, %v", len(roles.Items), err)
	}
	for _, r := range roles.Items {
		for _, rule := range r.Rules {
			for _, g := range rule.APIGroups {
				for _, res := range rule.Resources {
					if groups[g] && !served[g+"/"+res] {
						t.Errorf("ClusterRole %s: the API has no %s in group %q", r.Name, res, g)
					}
				}
			}
		}
	}
}

// TestInstallJSON wants one JSON value on standard output alone.
func TestInstallOutput(t *testing.T) {
	s := kubetest.APIServer(t)
	// The account that create-remote-secret made is taken over: either may come first.
	must(t, 0, nil, "create-remote-secret", "--kubeconfig", s.Kubeconfig(), "--name", "birch", "--duration", "1h")
	var out, errs bytes.Buffer
	cmd := command()
	cmd.SetArgs([]string{"install", "--kubeconfig", s.Kubeconfig(), "--profile", "minimal", "--wait=false", "-o", "json", "--set", "cluster.name=birch"})
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	if err := cmd.ExecuteContext(context.Background()); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Revision, Changed int
		Objects           []struct{ Kind, Name, State string }
	}
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%v in\n%s", err, out.String())
	}
	if got.Revision != 1 || got.Changed < 20 || len(got.Objects) != got.Changed {
		t.Errorf("%+v", got)
	}
	if !strings.Contains(errs.String(), "created ServiceAccount/istio-system/isthmusd") {
		t.Errorf("standard error: %s", errs.String())
	}
	config(t, s.Client(), "cluster: birch")

	// What another installed under the same names is not touched.
	ctx, client := context.Background(), s.Client()
	hook, err := client.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(ctx, "istio-sidecar-injector", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	hook.Annotations["meta.helm.sh/release-name"] = "istiod"
	if hook, err = client.AdmissionregistrationV1().MutatingWebhookConfigurations().Update(ctx, hook, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	must(t, 2, []string{"MutatingWebhookConfiguration/istio-sidecar-injector of Helm release istio-system/istiod", "hint: one injector serves a cluster"}, "install", "--kubeconfig", s.Kubeconfig(), "--wait=false")
	must(t, 2, []string{"context nowhere", "no context"}[1:], "install", "--kubeconfig", s.Kubeconfig(), "--context", "nowhere")

	// An account without rights is told which it lacks, before anything is done.
	kubeconfig := filepath.Join(t.TempDir(), "guest")
	guest := s.User("guest")
	raw := clientcmdapi.NewConfig()
	raw.Clusters["c"] = &clientcmdapi.Cluster{Server: guest.Host, CertificateAuthorityData: ca(t, s.Kubeconfig())}
	raw.AuthInfos["u"] = &clientcmdapi.AuthInfo{ClientCertificateData: guest.CertData, ClientKeyData: guest.KeyData}
	raw.Contexts["guest"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	raw.CurrentContext = "guest"
	if err := clientcmd.WriteToFile(*raw, kubeconfig); err != nil {
		t.Fatal(err)
	}
	must(t, 2, []string{"hint: install with an account that is cluster-admin"}, "install", "--kubeconfig", kubeconfig, "--wait=false")
	s.Stop()
	must(t, 2, []string{"hint: the API server cannot be reached from here"}, "install", "--kubeconfig", s.Kubeconfig())
}

func ca(t *testing.T, kubeconfig string) []byte {
	t.Helper()
	cfg, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	c := cfg.Clusters[cfg.Contexts[cfg.CurrentContext].Cluster]
	if len(c.CertificateAuthorityData) > 0 {
		return c.CertificateAuthorityData
	}
	data, err := os.ReadFile(c.CertificateAuthority)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
