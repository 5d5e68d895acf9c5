package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/lastknown"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

// coldConfig is that of an isthmusd that has everything in one API server, and keeps all of it.
func coldConfig(t *testing.T, api *kubetest.Server) Config {
	t.Helper()
	for _, ns := range []string{"istio-system", "shop"} {
		if _, err := api.Client().CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	cfg := testConfig(t, "amber")
	cfg.Source.Dir, cfg.Source.Kube.Enabled, cfg.Source.Kube.Kubeconfig = "", true, api.Kubeconfig()
	cfg.State.In, cfg.State.Namespace, cfg.State.Cache.Secrets = inKubernetes, "system-amber", lastknown.Always
	cfg.State.Replica, cfg.State.Address = "one", cfg.Listen
	cfg.Metrics = freeAddr(t)
	return cfg
}

// TestColdStart starts isthmusd while its API server is away: it serves what was known, says so, says nothing for the
// cluster, and when the server is back only what is gone goes.
func TestColdStart(t *testing.T) {
	api := kubeAPI(t, "amber")
	cfg := coldConfig(t, api)
	if _, err := api.Client().CoreV1().Services("shop").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "reviews"},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "reviews"}, Ports: []corev1.ServicePort{{Name: "http", Port: 9080, TargetPort: intstr.FromInt32(8080)}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	runPod(t, api, "reviews-1", "10.1.0.11")
	runPod(t, api, "reviews-2", "10.1.0.12")
	one, two := podToken(t, api, "front-1"), podToken(t, api, "front-2")
	const host = "outbound|9080||reviews.shop.svc.cluster.local"
	both := hasAddresses(t, "10.1.0.11:8080", "10.1.0.12:8080")

	last := cfg.lastKnown()
	last.Log = slog.New(slog.DiscardHandler)
	reader := lastknown.Open(last) // before the one that writes: it tidies up
	warm := start(t, cfg)
	leaderOf(t, warm)
	ca, err := api.Client().CoreV1().Secrets("system-amber").Get(t.Context(), authority.OwnSecret, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	warm.ca = ca.Data["root-cert.pem"]
	if err := writeRoot(warm); err != nil {
		t.Fatal(err)
	}
	token := warm.workloadToken(t, "shop", "caller", "caller")
	p := connect(t, warm, sidecar(t, cfg, "caller", "shop"), warm.dialOptions(t, token), nil)
	p.waitFor(t, xds.EndpointType, host, both)
	before, err := peerObject(t, api, "amber", "amber")
	if err != nil {
		t.Fatal(err)
	}
	dir := cfg.data("lastknown")
	saved := filepath.Join(t.TempDir(), "saved")
	eventually(t, "both pods are kept", func() error { return keptPods(reader, api, 4) })
	if err := os.CopyFS(saved, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := api.Client().CoreV1().Pods("shop").Delete(t.Context(), "reviews-1", metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
		t.Fatal(err)
	}
	refused := map[string]string{
		"of a pod that is not known": podToken(t, api, "front-3"), "that is bound to no pod": api.Token("shop", "front", "istio-ca"), "of another audience": api.Token("shop", "front"),
	}
	p.waitFor(t, xds.EndpointType, host, hasAddresses(t, "10.1.0.12:8080"))
	p.stop()
	warm.stop(t)
	api.Stop()
	if err := restoreFiles(dir, saved); err != nil { // isthmusd was killed before it kept that a pod is gone
		t.Fatal(err)
	}

	cold := start(t, cfg)
	cold.ca = warm.ca
	s := cold.status(t)
	for _, reason := range []string{"SourceLost", "StateNotRead"} {
		if err := errors.Join(hasProblem(s, reason), says(s, reason, "since", "of")); err != nil {
			t.Error(err)
		}
	}
	p = connect(t, cold, sidecar(t, cfg, "caller", "shop"), cold.dialOptions(t, token), nil)
	p.waitFor(t, xds.EndpointType, host, both)
	for _, token := range []string{token, one, two} { // is signed
		cold.certificate(t, token)
	}
	for what, token := range refused {
		if err := open(t, cold.dial(t, cold.dialOptions(t, token)), sidecar(t, cfg, "front", "shop")); err == nil {
			t.Errorf("a token %s is taken", what)
		}
	}
	if strings.Contains(cold.log.String(), "speaks for the cluster") {
		t.Error("it speaks for the cluster, and does not know what was said")
	}
	if err := cold.call("POST", "/v1/tokens", admin.TokenRequest{Kind: "cluster", Name: "birch"}, nil); err == nil || !strings.Contains(err.Error(), "waits for it") {
		t.Errorf("a token while nothing can be written: %v", err)
	}

	wiped := make(chan bool, 1)
	done := make(chan struct{})
	go func() { // the pod that lives is never gone
		lost := false
		for {
			lost = lost || !slices.Contains(addresses(t, p.resource(xds.EndpointType, host)), "10.1.0.12:8080")
			select {
			case <-time.After(time.Millisecond):
			case <-done:
				wiped <- lost
				return
			}
		}
	}()
	api.Start()
	p.waitFor(t, xds.EndpointType, host, hasAddresses(t, "10.1.0.12:8080"))
	leaderOf(t, cold)
	eventually(t, "nothing is wrong", func() error {
		s := cold.status(t)
		if hasProblem(s, "SourceLost") == nil || hasProblem(s, "StateNotRead") == nil {
			return fmt.Errorf("problems %+v", s.Problems)
		}
		return nil
	})
	close(done)
	if <-wiped {
		t.Error("an endpoint was taken away while the API server came back")
	}
	after, err := peerObject(t, api, "amber", "amber")
	if err != nil || after.Status.Epoch <= before.Status.Epoch {
		t.Errorf("the epoch was %d and is %+v, %v", before.Status.Epoch, after, err)
	}
	for _, file := range []string{"keys", "objects-amber"} {
		info, err := os.Stat(filepath.Join(dir, file))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", file, info, err)
		}
	}
}

// podToken runs a Pod of the service account front, and returns its token.
func podToken(t *testing.T, api *kubetest.Server, name string) string {
	t.Helper()
	ctx, core := t.Context(), api.Client().CoreV1()
	_, err := core.ServiceAccounts("shop").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "front"}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	p, err := core.Pods("shop").Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PodSpec{ServiceAccountName: "front", Containers: []corev1.Container{{Name: "app", Image: "app"}}, NodeName: "n1"},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := setPod(api, name, func(s *corev1.PodStatus) {
		s.Phase, s.PodIP, s.PodIPs = corev1.PodRunning, "10.1.1.1", []corev1.PodIP{{IP: "10.1.1.1"}}
	}); err != nil {
		t.Fatal(err)
	}
	r, err := core.ServiceAccounts("shop").CreateToken(ctx, "front", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences: []string{"istio-ca"}, BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: name, UID: p.UID},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status.Token
}

// TestColdFollower starts a replica while the API server is away, and another leads on: it follows that one as before.
func TestColdFollower(t *testing.T) {
	api := kubeAPI(t, "amber")
	var replicas []*daemonTest
	for _, name := range []string{"a", "b"} {
		cfg := replicaConfig(t, api, "amber", name, "")
		cfg.State.Cache.Secrets = lastknown.Always
		replicas = append(replicas, start(t, cfg))
		leaderOf(t, replicas...)
	}
	leader, follower := replicas[0], replicas[1]
	follows := func(d *daemonTest) func() error {
		return func() error {
			if !strings.Contains(d.log.String(), "follows the leader") {
				return errors.New("it does not")
			}
			return nil
		}
	}
	eventually(t, "b follows a", follows(follower))
	follower.stop(t)
	api.Stop()
	cold := start(t, follower.cfg)
	eventually(t, "b follows a, without the API server", follows(cold))
	leader.stop(t)
	eventually(t, "b answers by itself", func() error {
		var s admin.Status
		if err := cold.call("GET", "/v1/status", nil, &s); err != nil {
			return err
		}
		return hasProblem(s, "StateNotRead")
	})
	if strings.Contains(cold.log.String(), "speaks for the cluster") {
		t.Error("it speaks for the cluster, and does not know what was said")
	}
}

// keptPods counts the Pods that a start without the API server would know.
func keptPods(reader *lastknown.Store, api *kubetest.Server, want int) error {
	objects, _ := reader.Load("amber", api.REST().Host)
	n := 0
	for _, o := range objects {
		if o.Kind == "pods" {
			n++
		}
	}
	if n != want {
		return fmt.Errorf("%d pods of %d objects, want %d", n, len(objects), want)
	}
	return nil
}

func restoreFiles(dir, from string) error {
	return errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(from)), os.Chmod(filepath.Join(dir, "keys"), 0o600), os.Chmod(filepath.Join(dir, "objects-amber"), 0o600))
}

// says wants words in the message of a problem, and a remedy.
func says(s admin.Status, reason string, words ...string) error {
	for _, p := range s.Problems {
		if p.Reason != reason {
			continue
		}
		for _, w := range words {
			if !strings.Contains(p.Message, w) {
				return fmt.Errorf("%q does not say %q", p.Message, w)
			}
		}
		if p.Remedy == "" {
			return fmt.Errorf("%s has no remedy", reason)
		}
	}
	return nil
}

// TestFirstStartAway starts isthmusd for the first time while its API server is away: it says so, is not ready, and
// comes up by itself.
func TestFirstStartAway(t *testing.T) {
	api := kubeAPI(t, "amber")
	cfg := coldConfig(t, api)
	api.Stop()
	d := launch(cfg)
	t.Cleanup(func() {
		d.stop(t)
		if t.Failed() {
			t.Log(d.log)
		}
	})
	ready := func() int {
		resp, err := http.Get("http://" + cfg.Metrics + "/ready")
		if err != nil {
			return 0
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	eventually(t, "status says what is missing", func() error {
		var s admin.Status
		if err := d.call("GET", "/v1/status", nil, &s); err != nil {
			return err
		}
		return errors.Join(hasProblem(s, "SourceLost"), says(s, "SourceLost", "nothing was kept here", "nobody is served"))
	})
	if code := ready(); code != http.StatusServiceUnavailable {
		t.Errorf("ready answers %d", code)
	}
	if err := d.call("GET", "/v1/peers", nil, nil); err == nil || !strings.Contains(err.Error(), "not begun to serve") {
		t.Errorf("peers: %v", err)
	}
	api.Start()
	eventually(t, "it serves", func() error {
		var s admin.Status
		if err := d.call("GET", "/v1/status", nil, &s); err != nil {
			return err
		}
		if !s.Ready || hasProblem(s, "SourceLost") == nil || ready() != http.StatusOK {
			return fmt.Errorf("ready %v (%d), problems %+v", s.Ready, ready(), s.Problems)
		}
		return nil
	})
}
