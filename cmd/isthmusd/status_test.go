package main

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/isthmus-mesh/isthmus/discovery/status"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

// TestStatusInRemoteClusters: a cluster whose remote secret is there has root certificates in its namespaces; when the
// secret goes, isthmusd leaves the cluster alone.
func TestStatusInRemoteClusters(t *testing.T) {
	amber, birch := kubetest.APIServer(t), kubetest.APIServer(t)
	namespace := func(api *kubetest.Server, name string) {
		t.Helper()
		if _, err := api.Client().CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	root := func(api *kubetest.Server, namespace string) error {
		m, err := api.Client().CoreV1().ConfigMaps(namespace).Get(t.Context(), status.RootConfigMap, metav1.GetOptions{})
		if err == nil && !strings.Contains(m.Data[status.RootKey], "BEGIN CERTIFICATE") {
			err = fmt.Errorf("%s holds %q", namespace, m.Data)
		}
		return err
	}
	namespace(amber, "istio-system")
	namespace(birch, "shop")
	file, err := clientcmd.LoadFromFile(birch.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	if err := clientcmdapi.FlattenConfig(file); err != nil { // files' contents in place
		t.Fatal(err)
	}
	text, err := clientcmd.Write(*file)
	if err != nil {
		t.Fatal(err)
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "birch", Labels: map[string]string{"istio/multiCluster": "true"}}, Data: map[string][]byte{"birch": text}}
	if _, err := amber.Client().CoreV1().Secrets("istio-system").Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(t, "amber")
	cfg.Source.Dir, cfg.Source.Kube.Enabled, cfg.Source.Kube.Kubeconfig = "", true, amber.Kubeconfig()
	d := start(t, cfg)
	eventually(t, "roots in amber", func() error { return root(amber, "istio-system") })
	eventually(t, "roots in birch", func() error { return root(birch, "shop") })

	if err := amber.Client().CoreV1().Secrets("istio-system").Delete(t.Context(), "birch", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the secret's going is seen", func() error {
		if n := len(d.status(t).Sources); n != 1 {
			return fmt.Errorf("%d sources", n)
		}
		return nil
	})
	tries := 0
	eventually(t, "birch is left alone", func() error {
		tries++
		name := fmt.Sprintf("later-%d", tries)
		namespace(birch, name)
		namespace(amber, name)
		for root(amber, name) != nil { // by then birch would have its own
			if t.Context().Err() != nil {
				return t.Context().Err()
			}
		}
		if err := root(birch, name); !apierrors.IsNotFound(err) {
			return fmt.Errorf("a cluster without its secret was written to: %v", err)
		}
		return nil
	})
	if err := root(birch, "shop"); err != nil {
		t.Errorf("what was there is gone: %v", err)
	}
}
