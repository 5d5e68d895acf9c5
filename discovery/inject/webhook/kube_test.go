package webhook_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/isthmus-mesh/isthmus/discovery/inject/webhook"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

const system = "istio-system"

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-time.After(50 * time.Millisecond)
	}
}

// TestAPIServer: pods that are created at a real API server come out with the proxy; the certificate authority is put
// into the webhook configuration and stays there; the injector's ConfigMap is taken live.
func TestAPIServer(t *testing.T) {
	s := kubetest.APIServer(t)
	kube := s.Client()
	ctx := t.Context()
	for name, labels := range map[string]map[string]string{system: nil, "on": {"istio-injection": "enabled"}, "off": {"istio-injection": "disabled"}, "plain": nil} {
		mustMake(t, name, func() error {
			_, err := kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{})
			return err
		})
	}
	for _, ns := range []string{"on", "off", "plain"} {
		mustMake(t, "service account", func() error {
			_, err := kube.CoreV1().ServiceAccounts(ns).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
			return err
		})
	}
	log := slog.New(slog.DiscardHandler)
	watcher, err := webhook.NewWatcher(webhook.WatchConfig{Client: kube, Namespace: system, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	roots, cert := authority(t)
	address := serve(t, webhook.Config{Injector: watcher, Namespaces: watcher}, cert)
	bundler, err := webhook.NewBundler(webhook.BundleConfig{Client: kube, Name: webhook.InjectorConfigMap, Service: system, Roots: func() []byte { return roots }, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	checker, err := webhook.NewBundler(webhook.BundleConfig{Client: kube, Name: "istio-validator-" + system, Validating: true, Service: system, Roots: func() []byte { return roots }, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	for _, run := range []func(context.Context) error{watcher.Run, bundler.Run, checker.Run} {
		runCtx, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- run(runCtx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	cfg := configuration(address)
	mustMake(t, "webhook configuration", func() error {
		_, err := kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(ctx, cfg, metav1.CreateOptions{})
		return err
	})
	bundled := func() error {
		got, err := kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(ctx, webhook.InjectorConfigMap, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if string(got.Webhooks[0].ClientConfig.CABundle) != string(roots) {
			return context.DeadlineExceeded
		}
		return nil
	}
	eventually(t, "certificate authority written", bundled)
	check := validation(address)
	mustMake(t, "validating webhook configuration", func() error {
		_, err := kube.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(ctx, check, metav1.CreateOptions{})
		return err
	})
	eventually(t, "certificate authority written for validation", func() error {
		got, err := kube.AdmissionregistrationV1().ValidatingWebhookConfigurations().Get(ctx, check.Name, metav1.GetOptions{})
		if err == nil && string(got.Webhooks[0].ClientConfig.CABundle) != string(roots) {
			err = context.DeadlineExceeded
		}
		return err
	})

	// The API server takes a moment to see the new configuration.
	eventually(t, "a pod is injected", func() error {
		p, err := create(ctx, kube, "on", "first", nil)
		if err != nil {
			return err
		}
		if names(p) != "istio-init istio-proxy web" {
			_ = kube.CoreV1().Pods("on").Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
			return context.DeadlineExceeded
		}
		if got := p.Spec.InitContainers[1].RestartPolicy; got == nil || *got != corev1.ContainerRestartPolicyAlways {
			t.Errorf("restartPolicy %v", got)
		}
		return nil
	})
	for _, x := range []struct {
		namespace, name string
		labels          map[string]string
		want            string
	}{
		{"off", "off", map[string]string{"sidecar.istio.io/inject": "true"}, "web"},
		{"plain", "plain", nil, "web"},
		{"plain", "asked", map[string]string{"sidecar.istio.io/inject": "true"}, "istio-init istio-proxy web"},
		{"on", "refused", map[string]string{"sidecar.istio.io/inject": "false"}, "web"},
	} {
		p, err := create(ctx, kube, x.namespace, x.name, x.labels)
		if err != nil {
			t.Fatalf("%s: %v", x.name, err)
		}
		if names(p) != x.want {
			t.Errorf("%s/%s: %s, want %s", x.namespace, x.name, names(p), x.want)
		}
	}
	_, err = kube.CoreV1().Pods("on").Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "bad", Annotations: map[string]string{"traffic.sidecar.istio.io/excludeInboundPorts": "eighty"}},
		Spec:       corev1.PodSpec{ServiceAccountName: "default", Containers: []corev1.Container{{Name: "web", Image: "web"}}},
	}, metav1.CreateOptions{})
	if !apierrors.IsBadRequest(err) || !strings.Contains(err.Error(), `traffic.sidecar.istio.io/excludeInboundPorts: "eighty"`) {
		t.Errorf("a bad annotation: %v", err)
	}

	// Whoever takes the certificate authority out finds it there again.
	patch, _ := json.Marshal([]map[string]any{{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}})
	if _, err := kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Patch(ctx, webhook.InjectorConfigMap, types.JSONPatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "certificate authority written again", bundled)

	mustMake(t, "values", func() error {
		_, err := kube.CoreV1().ConfigMaps(system).Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: webhook.InjectorConfigMap}, Data: map[string]string{"values": "pilot: {cni: {enabled: true}}\n"},
		}, metav1.CreateOptions{})
		return err
	})
	eventually(t, "new values taken", func() error {
		p, err := create(ctx, kube, "on", "", nil)
		if err != nil {
			return err
		}
		if names(p) != "istio-validation istio-proxy web" {
			return context.DeadlineExceeded
		}
		return nil
	})
}

func mustMake(t *testing.T, what string, f func() error) {
	t.Helper()
	if err := f(); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatalf("make %s: %v", what, err)
	}
}

func create(ctx context.Context, kube kubernetes.Interface, namespace, name string, labels map[string]string) (*corev1.Pod, error) {
	m := metav1.ObjectMeta{Name: name, Labels: labels}
	if name == "" {
		m.GenerateName = "web-"
	}
	return kube.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{
		ObjectMeta: m, Spec: corev1.PodSpec{ServiceAccountName: "default", Containers: []corev1.Container{{Name: "web", Image: "web"}}},
	}, metav1.CreateOptions{})
}

func names(p *corev1.Pod) string {
	var out []string
	for _, c := range append(append([]corev1.Container{}, p.Spec.InitContainers...), p.Spec.Containers...) {
		out = append(out, c.Name)
	}
	return strings.Join(out, " ")
}

// configuration has the selectors wide open: the server must decide by itself.
func configuration(address string) *admissionregistrationv1.MutatingWebhookConfiguration {
	none, fail := admissionregistrationv1.SideEffectClassNone, admissionregistrationv1.Fail
	_, port, _ := net.SplitHostPort(address)
	url := "https://127.0.0.1:" + port + "/inject"
	return &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: webhook.InjectorConfigMap},
		Webhooks: []admissionregistrationv1.MutatingWebhook{{
			Name: "sidecar-injector.istio.io", AdmissionReviewVersions: []string{"v1"}, SideEffects: &none, FailurePolicy: &fail,
			ClientConfig: admissionregistrationv1.WebhookClientConfig{URL: &url},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}},
		}},
	}
}

// validation is a configuration whose webhook is at the address and takes nothing that the test makes.
func validation(address string) *admissionregistrationv1.ValidatingWebhookConfiguration {
	none, ignore := admissionregistrationv1.SideEffectClassNone, admissionregistrationv1.Ignore
	_, port, _ := net.SplitHostPort(address)
	url := "https://127.0.0.1:" + port + "/validate"
	return &admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: webhook.ValidatorName("default", system)},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{
			Name: "validation.isthmus.io", AdmissionReviewVersions: []string{"v1"}, SideEffects: &none, FailurePolicy: &ignore,
			ClientConfig: admissionregistrationv1.WebhookClientConfig{URL: &url},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{"networking.istio.io"}, APIVersions: []string{"v1"}, Resources: []string{"virtualservices"}},
			}},
		}},
	}
}
