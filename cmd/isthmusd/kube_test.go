package main

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

// klogFlush is a goroutine that the library starts when it is loaded.
var klogFlush = goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1")

// TestKube runs isthmusd on an API server: Pods become endpoints, their tokens are proof, and a lost server loses nothing.
func TestKube(t *testing.T) {
	api := kubetest.APIServer(t)
	ctx, client := t.Context(), api.Client()
	for _, ns := range []string{"istio-system", "shop"} {
		if _, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.CoreV1().Services("shop").Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "reviews"},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "reviews"}, Ports: []corev1.ServicePort{{Name: "http", Port: 9080, TargetPort: intstr.FromInt32(8080)}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	runPod(t, api, "reviews-1", "10.1.0.11")
	if _, err := client.CoreV1().ServiceAccounts("shop").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "caller"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	cfg := testConfig(t, "amber")
	cfg.Source.Dir, cfg.Source.Kube.Enabled, cfg.Source.Kube.Kubeconfig = "", true, api.Kubeconfig()
	d := start(t, cfg)
	const host = "outbound|9080||reviews.shop.svc.cluster.local"
	p := connect(t, d, sidecar(t, cfg, "caller", "shop"), d.dialOptions(t, api.Token("shop", "caller", "istio-ca")), nil)
	p.waitFor(t, xds.EndpointType, host, hasAddresses(t, "10.1.0.11:8080"))
	runPod(t, api, "reviews-2", "10.1.0.12")
	p.waitFor(t, xds.EndpointType, host, hasAddresses(t, "10.1.0.11:8080", "10.1.0.12:8080"))

	cert := d.certificate(t, api.Token("shop", "caller", "istio-ca"))
	if got := fmt.Sprint(cert.Leaf.URIs); got != "[spiffe://amber.mesh/ns/shop/sa/caller]" {
		t.Errorf("the token of shop/caller gave a certificate of %s", got)
	}
	for name, token := range map[string]string{
		"of another audience": api.Token("shop", "caller"),
		"of nobody":           "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln",
	} {
		if err := open(t, d.dial(t, d.dialOptions(t, token)), sidecar(t, cfg, "caller", "shop")); status.Code(err) != codes.Unauthenticated {
			t.Errorf("a token %s: %v", name, err)
		}
	}

	api.Stop()
	eventually(t, "status says that the API server is lost", func() error {
		s := d.status(t)
		if len(s.Sources) != 1 || s.Sources[0].Connected {
			return fmt.Errorf("sources %+v", s.Sources)
		}
		return hasProblem(s, "SourceLost")
	})
	p.waitFor(t, xds.EndpointType, host, hasAddresses(t, "10.1.0.11:8080", "10.1.0.12:8080"))
	api.Start()
	runPod(t, api, "reviews-3", "10.1.0.13")
	p.waitFor(t, xds.EndpointType, host, hasAddresses(t, "10.1.0.11:8080", "10.1.0.12:8080", "10.1.0.13:8080"))
	eventually(t, "the problem is gone", func() error {
		if hasProblem(d.status(t), "SourceLost") == nil {
			return fmt.Errorf("SourceLost is still there")
		}
		return nil
	})
}

func hasProblem(s admin.Status, reason string) error {
	if !slices.ContainsFunc(s.Problems, func(p admin.ProblemLine) bool { return p.Reason == reason }) {
		return fmt.Errorf("no problem %s among %+v", reason, s.Problems)
	}
	return nil
}

// runPod makes a Pod that runs, as far as the API tells.
func runPod(t *testing.T, api *kubetest.Server, name, ip string) {
	t.Helper()
	pods := api.Client().CoreV1().Pods("shop")
	_, err := pods.Create(context.Background(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "reviews", "security.istio.io/tlsMode": "istio"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app"}}, NodeName: "n1"},
	}, metav1.CreateOptions{})
	if err == nil {
		err = setPod(api, name, func(s *corev1.PodStatus) {
			s.Phase, s.PodIP, s.PodIPs = corev1.PodRunning, ip, []corev1.PodIP{{IP: ip}}
			s.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func setPod(api *kubetest.Server, name string, set func(*corev1.PodStatus)) error {
	pods := api.Client().CoreV1().Pods("shop")
	p, err := pods.Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	set(&p.Status)
	_, err = pods.UpdateStatus(context.Background(), p, metav1.UpdateOptions{})
	return err
}

// TestKubeAway starts isthmusd before its API server: it runs, says what is missing, and needs no restart.
func TestKubeAway(t *testing.T) {
	api := kubetest.APIServer(t)
	api.Stop()
	cfg := testConfig(t, "amber")
	cfg.Source.Dir, cfg.Source.Kube.Enabled, cfg.Source.Kube.Kubeconfig = "", true, api.Kubeconfig()
	d := start(t, cfg)
	s := d.status(t)
	if err := hasProblem(s, "SourceLost"); err != nil {
		t.Error(err)
	}
	if err := hasProblem(s, "NotSynced"); err != nil {
		t.Error(err)
	}
	api.Start()
	eventually(t, "it is read", func() error {
		s := d.status(t)
		if len(s.Sources) != 1 || !s.Sources[0].Connected || s.Sources[0].Objects == 0 {
			return fmt.Errorf("sources %+v", s.Sources)
		}
		for _, reason := range []string{"SourceLost", "NotSynced"} {
			if hasProblem(s, reason) == nil {
				return fmt.Errorf("still %s", reason)
			}
		}
		return nil
	})
}
