package webhook_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/isthmus-mesh/isthmus/discovery/inject"
	"github.com/isthmus-mesh/isthmus/discovery/inject/webhook"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fixed struct{ c *inject.Config }

func (f fixed) Current() *inject.Config { return f.c }

type labels map[string]map[string]string

func (l labels) Labels(name string) (map[string]string, bool) { v, ok := l[name]; return v, ok }

// authority signs one certificate.
func authority(t *testing.T, names ...string) (roots []byte, cert tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: names,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// serve runs a Server until the test ends.
func serve(t *testing.T, c webhook.Config, cert tls.Certificate) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.Listener, c.Log, c.Reg = l, slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	c.Certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &cert, nil }
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- webhook.New(c).Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func client(t *testing.T, roots []byte) *http.Client {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(roots)
	c := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func body(t *testing.T, namespace, object string) []byte {
	t.Helper()
	data, err := json.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"},
		Request: &admissionv1.AdmissionRequest{UID: "abc", Namespace: namespace, Operation: admissionv1.Create,
			Resource: metav1.GroupVersionResource{Version: "v1", Resource: "pods"}, Object: runtime.RawExtension{Raw: []byte(object)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

const pod = `{"metadata":{"name":"web"},"spec":{"containers":[{"name":"web","image":"web"}]}}`

func TestReviews(t *testing.T) {
	roots, cert := authority(t, "isthmusd.istio-system.svc")
	config, err := inject.Parse(inject.Documents{})
	if err != nil {
		t.Fatal(err)
	}
	address := serve(t, webhook.Config{
		Injector: fixed{config}, Cluster: "east", Namespaces: labels{"on": {"istio-injection": "enabled"}, "off": {}},
		Validate: func(raw []byte) []string {
			if bytes.Contains(raw, []byte("bad")) {
				return []string{"spec.x: Invalid: it is bad"}
			}
			return nil
		},
	}, cert)
	c := client(t, roots)
	long := append([]byte(`{"x":"`), bytes.Repeat([]byte("a"), webhook.MaxBody)...)
	for _, x := range []struct {
		name, method, path, contentType string
		body                            []byte
		status                          int
		allowed                         bool
		patch, message                  string
	}{
		{name: "injected", path: "/inject", body: body(t, "on", pod), status: 200, allowed: true, patch: `"name":"istio-proxy"`},
		{name: "not labelled", path: "/inject", body: body(t, "off", pod), status: 200, allowed: true},
		{name: "another cluster", path: "/inject/cluster/west/net/west-net", body: body(t, "off", pod), status: 200, allowed: true, patch: `{"name":"ISTIO_META_CLUSTER_ID","value":"west"}`},
		{name: "network of the path", path: "/inject/cluster/west/net/a--slash--b", body: body(t, "off", pod), status: 200, allowed: true, patch: `{"name":"ISTIO_META_NETWORK","value":"a/b"}`},
		{name: "own cluster in the path", path: "/inject/cluster/east/net/n", body: body(t, "off", pod), status: 200, allowed: true},
		{name: "odd path", path: "/inject/cluster", body: body(t, "on", pod), status: 200, message: "/inject/cluster"},
		{name: "bad annotation", path: "/inject", body: body(t, "on", `{"metadata":{"annotations":{"sidecar.istio.io/proxyCPU":"much"}},"spec":{"containers":[{"name":"a"}]}}`),
			status: 200, message: `sidecar.istio.io/proxyCPU: "much"`},
		{name: "no pod", path: "/inject", body: body(t, "on", `{"spec":[]}`), status: 200, message: "read the pod"},
		{name: "valid object", path: "/validate", body: body(t, "on", `{"good":1}`), status: 200, allowed: true},
		{name: "invalid object", path: "/validate", body: body(t, "on", `{"bad":1}`), status: 200, message: "spec.x: Invalid"},
		{name: "too long", path: "/inject", body: long, status: http.StatusRequestEntityTooLarge},
		{name: "no review", path: "/inject", body: []byte(`{}`), status: 400},
		{name: "old review", path: "/inject", body: bytes.Replace(body(t, "on", pod), []byte("k8s.io/v1\""), []byte("k8s.io/v1beta1\""), 1), status: 400},
		{name: "no JSON", path: "/inject", body: []byte(`x`), status: 400},
		{name: "content type", path: "/inject", body: body(t, "on", pod), contentType: "text/plain", status: 415},
		{name: "method", path: "/inject", method: "GET", status: 405},
		{name: "path", path: "/other", body: body(t, "on", pod), status: 404},
	} {
		t.Run(x.name, func(t *testing.T) {
			method := x.method
			if method == "" {
				method = "POST"
			}
			r, err := http.NewRequestWithContext(t.Context(), method, "https://"+address+x.path, bytes.NewReader(x.body))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Content-Type", "application/json")
			if x.contentType != "" {
				r.Header.Set("Content-Type", x.contentType)
			}
			resp, err := c.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			text, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != x.status {
				t.Fatalf("%s: %s", resp.Status, text)
			}
			if x.status != 200 {
				return
			}
			var a admissionv1.AdmissionReview
			if err := json.Unmarshal(text, &a); err != nil || a.APIVersion != "admission.k8s.io/v1" || a.Response.UID != "abc" {
				t.Fatalf("%v: %s", err, text)
			}
			if a.Response.Allowed != x.allowed || (x.patch == "") != (a.Response.Patch == nil) || !strings.Contains(string(a.Response.Patch), x.patch) {
				t.Errorf("allowed %v, patch %s", a.Response.Allowed, a.Response.Patch)
			}
			if x.message != "" && (a.Response.Result == nil || !strings.Contains(a.Response.Result.Message, x.message)) {
				t.Errorf("result %+v", a.Response.Result)
			}
		})
	}
}

// TestMany holds the server to its bound: all of many reviews at once are answered.
func TestMany(t *testing.T) {
	roots, cert := authority(t)
	config, err := inject.Parse(inject.Documents{})
	if err != nil {
		t.Fatal(err)
	}
	address := serve(t, webhook.Config{Injector: fixed{config}}, cert)
	c := client(t, roots)
	review := body(t, "on", pod)
	errs := make(chan error, 80)
	for range cap(errs) {
		go func() {
			resp, err := c.Post("https://"+address+"/inject", "application/json", bytes.NewReader(review))
			if err == nil {
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode != 200 {
					err = io.ErrUnexpectedEOF
				}
			}
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}
