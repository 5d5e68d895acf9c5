package kubetest_test

import (
	"context"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

func TestServer(t *testing.T) {
	start := time.Now()
	s := kubetest.APIServer(t)
	t.Logf("ready after %.1f s", time.Since(start).Seconds())
	ctx, client := t.Context(), s.Client()

	t.Run("rights", func(t *testing.T) {
		nobody, err := kubernetes.NewForConfig(s.User("nobody"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := nobody.CoreV1().Pods("default").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("a user without roles lists pods: error %v, want forbidden", err)
		}
		if _, err := client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{}); err != nil {
			t.Errorf("the administrator lists pods: %v", err)
		}
	})
	t.Run("tokens", func(t *testing.T) {
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "reviews"}}
		if _, err := client.CoreV1().ServiceAccounts("default").Create(ctx, account, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		token := s.Token("default", "reviews", "istio-ca")
		for audience, want := range map[string]bool{"istio-ca": true, "other": false} {
			r, err := client.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
				Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}},
			}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if r.Status.Authenticated != want {
				t.Errorf("reviewed for %s: authenticated %t, want %t (%s)", audience, r.Status.Authenticated, want, r.Status.Error)
			}
			if want && r.Status.User.Username != "system:serviceaccount:default:reviews" {
				t.Errorf("user %s", r.Status.User.Username)
			}
		}
	})
	t.Run("stopped and started", func(t *testing.T) {
		s.Stop()
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if _, err := client.CoreV1().Namespaces().List(short, metav1.ListOptions{}); err == nil {
			t.Error("a stopped API server answers")
		}
		s.Start()
		if _, err := client.CoreV1().ServiceAccounts("default").Get(ctx, "reviews", metav1.GetOptions{}); err != nil {
			t.Errorf("data of before: %v", err)
		}
	})
}

func TestControllers(t *testing.T) {
	client := kubetest.New(t, kubetest.Config{Controllers: true}).Client()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "sample"}}
	if _, err := client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "helloworld"}, Spec: corev1.ServiceSpec{
		Selector: map[string]string{"app": "helloworld"}, Ports: []corev1.ServicePort{{Name: "http", Port: 5000}}}}
	if _, err := client.CoreV1().Services("sample").Create(ctx, svc, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for {
		_, account := client.CoreV1().ServiceAccounts("sample").Get(ctx, "default", metav1.GetOptions{})
		slices, err := client.DiscoveryV1().EndpointSlices("sample").List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=helloworld"})
		if account == nil && err == nil && len(slices.Items) > 0 {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("no service account (%v) and slice (%v) appear", account, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
