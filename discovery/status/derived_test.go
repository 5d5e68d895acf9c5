package status

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// gatewayCRD is the definition of Gateways that the chart installs.
func gatewayCRD(t *testing.T) string {
	t.Helper()
	all, err := os.ReadFile("../../deploy/helm/isthmus/files/crds/gateway-api.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range strings.Split(string(all), "\n---\n") {
		if strings.Contains(doc, "name: gateways.gateway.networking.k8s.io") {
			return doc
		}
	}
	t.Fatal("the chart has no definition of Gateways")
	return ""
}

// TestDerived: the status of an object follows the Snapshot, is written for the generation it is about and not twice, and
// what is to run a Gateway is made and goes.
func TestDerived(t *testing.T) {
	f := newFixture(t)
	f.define(gatewayCRD(t))
	gvr := schema.GroupVersionResource{Group: groupGatewayAPI, Version: "v1", Resource: "gateways"}
	f.create(gvr, "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: web, namespace: shop}\nspec: {gatewayClassName: isthmus, listeners: [{name: http, port: 80, protocol: HTTP}]}\n")
	ref := mesh.ObjectRef{Kind: "Gateway." + groupGatewayAPI, Namespace: "shop", Name: "web", Source: "cluster amber"}
	said := func(revision uint64, generation int64, reason string, objects ...*mesh.WantedObject) *mesh.Snapshot {
		s := world(nil)
		s.Revision = revision
		s.Statuses = []*mesh.ObjectStatus{{Object: ref, Group: groupGatewayAPI, Resource: "gateways", Generation: generation, JSON: fmt.Appendf(nil,
			`{"conditions":[{"type":"Accepted","status":"True","reason":%q,"message":"","observedGeneration":%d,"lastTransitionTime":null}],"listeners":[]}`, reason, generation)}}
		s.Objects = objects
		return s
	}
	service := func(port int) *mesh.WantedObject {
		return &mesh.WantedObject{Version: "v1", Resource: "services", Namespace: "shop", Name: "web-isthmus", For: ref, JSON: fmt.Appendf(nil,
			`{"apiVersion":"v1","kind":"Service","metadata":{"name":"web-isthmus","namespace":"shop","labels":{"app.kubernetes.io/managed-by":"isthmus","gateway.networking.k8s.io/gateway-class-name":"isthmus"}},"spec":{"ports":[{"name":"p","port":%d,"targetPort":%[1]d,"protocol":"TCP"}]}}`, port)}
	}
	f.snaps.set(said(2, 7, "Early", service(80)))
	w, _ := f.writer(func(c *Config) { c.Deploy = true })
	condition := func() (reason, since string) {
		u, err := f.dyn.Resource(gvr).Namespace("shop").Get(t.Context(), "web", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		list, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
		for _, x := range list {
			if c := x.(map[string]any); c["type"] == "Accepted" {
				reason, _ = c["reason"].(string)
				since, _ = c["lastTransitionTime"].(string)
			}
		}
		return reason, since
	}
	ports := func(want int32) func() error {
		return func() error {
			s, err := f.client.CoreV1().Services("shop").Get(t.Context(), "web-isthmus", metav1.GetOptions{})
			if err == nil && (len(s.Spec.Ports) != 1 || s.Spec.Ports[0].Port != want) {
				err = fmt.Errorf("ports %v", s.Spec.Ports)
			}
			return err
		}
	}
	f.until("the Service is made", ports(80))
	if reason, _ := condition(); reason == "Early" {
		t.Error("what is said of another generation is written")
	}
	f.snaps.set(said(3, 1, "Fine", service(81)))
	written := func(want string) func() error {
		return func() error {
			if got, _ := condition(); got != want {
				return fmt.Errorf("reason %q", got)
			}
			return nil
		}
	}
	f.until("the status is written", written("Fine"))
	f.until("the Service changes", ports(81))
	_, since := condition()
	if at, err := time.Parse(time.RFC3339, since); err != nil || time.Since(at) > time.Minute {
		t.Errorf("the condition holds since %q", since)
	}
	count := func() (n int) {
		for _, line := range w.list() {
			if strings.Contains(line, "/gateways/web") || strings.Contains(line, "/services/web-isthmus") {
				n++
			}
		}
		return n
	}
	before := count()
	f.snaps.set(said(4, 1, "Fine", service(81)))
	f.snaps.set(said(5, 1, "Finer", service(81)))
	f.until("the next status", written("Finer"))
	if n := count() - before; n != 1 {
		t.Errorf("%d writes for one change: %v", n, w.list())
	}
	f.snaps.set(said(6, 1, "Finer"))
	f.until("the Service goes", func() error {
		_, err := f.client.CoreV1().Services("shop").Get(t.Context(), "web-isthmus", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("still there: %v", err)
	})
	// An object of that name by another hand stays as it is.
	if _, err := f.client.CoreV1().Services("shop").Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web-isthmus"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 9}}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	f.snaps.set(said(7, 1, "Last", service(80)))
	f.until("the last status", written("Last"))
	if err := ports(9)(); err != nil {
		t.Error(err)
	}
}
