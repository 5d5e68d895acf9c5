package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
)

// review asks a webhook as an API server does: by the name of the Service, under the mesh's root.
func (d *daemonTest) review(t *testing.T, service, path, resource, object string) (*admissionv1.AdmissionResponse, error) {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: d.roots(t), ServerName: service}}
	body := fmt.Sprintf(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"1","operation":"CREATE","namespace":"default","resource":{"group":"","version":"v1","resource":%q},"object":%s}}`, resource, object)
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Post("https://"+d.cfg.Webhook.Listen+path, "application/json", bytes.NewReader([]byte(body)))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s, %v", resp.Status, text, err)
	}
	var a admissionv1.AdmissionReview
	if err := json.Unmarshal(text, &a); err != nil {
		return nil, err
	}
	return a.Response, nil
}

// TestWebhooks: isthmusd answers reviews under the names of its Services, and an injected pod belongs to its cluster.
func TestWebhooks(t *testing.T) {
	cfg := testConfig(t, "amber")
	cfg.Webhook.Listen = freeAddr(t)
	d := start(t, cfg)
	const pod = `{"metadata":{"name":"web"},"spec":{"containers":[{"name":"web","image":"web"}]}}`
	for _, service := range []string{"isthmusd.istio-system.svc", "istiod.istio-system.svc"} {
		a, err := d.review(t, service, "/inject", "pods", pod)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{`"name":"istio-proxy"`, `{"name":"ISTIO_META_CLUSTER_ID","value":"amber"}`, `{"name":"TRUST_DOMAIN","value":"amber.mesh"}`, `{"name":"ISTIO_META_NETWORK","value":"amber"}`} {
			if !a.Allowed || !strings.Contains(string(a.Patch), want) {
				t.Errorf("%s: allowed %v, no %s in %s", service, a.Allowed, want, a.Patch)
			}
		}
	}
	if _, err := d.review(t, "other.istio-system.svc", "/inject", "pods", pod); err == nil {
		t.Error("it answers under a name that it does not have")
	}
	const service = `{"apiVersion":"networking.istio.io/v1","kind":"VirtualService","metadata":{"name":"web","namespace":"default"},"spec":{"hosts":["web"],"http":[{"route":[{"destination":{"host":"web"},"weight":%s}]}]}}`
	a, err := d.review(t, "isthmusd.istio-system.svc", "/validate", "virtualservices", fmt.Sprintf(service, "100"))
	if err != nil || !a.Allowed {
		t.Errorf("a good object: %+v, %v", a, err)
	}
	a, err = d.review(t, "isthmusd.istio-system.svc", "/validate", "virtualservices", fmt.Sprintf(service, "-5"))
	if err != nil || a.Allowed || !strings.Contains(a.Result.Message, "spec.http[0].route[0].weight") {
		t.Errorf("a bad object: %+v, %v", a, err)
	}
}
