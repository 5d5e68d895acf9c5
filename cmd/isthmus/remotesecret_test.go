package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

func runIsthmus(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := command()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), errs.String(), err
}

// TestCreateRemoteSecret makes one twice, in both ways, and reads the cluster with what is printed.
func TestCreateRemoteSecret(t *testing.T) {
	api := kubetest.New(t, kubetest.Config{Controllers: true})
	var tokens []string
	for _, more := range [][]string{nil, {"--duration", "2h"}, nil} {
		out, errs, err := runIsthmus(t, append([]string{"create-remote-secret", "--kubeconfig", api.Kubeconfig(), "--name", "birch"}, more...)...)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(errs, "--server") {
			t.Errorf("nothing warns of a loopback address: %q", errs)
		}
		var s corev1.Secret
		if err := yaml.UnmarshalStrict([]byte(strings.TrimSuffix(out, "---\n")), &s); err != nil {
			t.Fatalf("%v:\n%s", err, out)
		}
		if s.Name != "istio-remote-secret-birch" || s.Namespace != "istio-system" || s.Labels["istio/multiCluster"] != "true" || s.Annotations["networking.istio.io/cluster"] != "birch" || len(s.StringData) != 1 {
			t.Fatalf("the secret is\n%s", out)
		}
		cfg, err := clientcmd.RESTConfigFromKubeConfig([]byte(s.StringData["birch"]))
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, cfg.BearerToken)
		client, err := kubernetes.NewForConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{}); err != nil {
			t.Errorf("Pods are not read with it: %v", err)
		}
		if _, err := client.CoreV1().Secrets("").List(t.Context(), metav1.ListOptions{}); err == nil {
			t.Error("Secrets are read with it")
		}
	}
	if tokens[0] != tokens[2] || tokens[0] == tokens[1] {
		t.Error("the lasting token is another one each time, or the ending one is it")
	}
	out, _, err := runIsthmus(t, "create-remote-secret", "--kubeconfig", api.Kubeconfig(), "--name", "birch", "--server", "https://192.0.2.1:6443")
	if err != nil || !strings.Contains(out, "server: https://192.0.2.1:6443") {
		t.Errorf("--server: %v\n%s", err, out)
	}
}

func TestCreateRemoteSecretRefuses(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(empty, []byte("apiVersion: v1\nkind: Config\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--kubeconfig", empty, "--name", "Not_A_Name"},
		{"--kubeconfig", empty, "--name", "birch", "--context", "none"},
		{"--kubeconfig", empty + "x", "--name", "birch"},
	} {
		if _, _, err := runIsthmus(t, append([]string{"create-remote-secret"}, args...)...); err == nil || diag.HintOf(err) == "" {
			t.Errorf("%v: %v, hint %q", args, err, diag.HintOf(err))
		}
	}
	if _, _, err := runIsthmus(t, "create-remote-secret"); err == nil {
		t.Error("--name is not asked for")
	}
}
