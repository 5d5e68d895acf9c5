package kube

import (
	"encoding/json"
	"log/slog"
	"reflect"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// nowhere is a Sink.
type nowhere struct{}

func (nowhere) Report(string, mesh.Input) {}
func (nowhere) Forget(string)             {}
func (nowhere) Synced()                   {}

// TestThaw keeps an object of every kind that is read, and takes it back: it is the same.
func TestThaw(t *testing.T) {
	src := &Source{cfg: Config{Cluster: "amber", Sink: nowhere{}, Namespace: "istio-system"}, log: slog.New(slog.DiscardHandler)}
	src.remotes = newRemotes(src)
	c := newCluster(src, "amber", false)
	for _, tb := range c.tables {
		var obj any
		if tb.typed == nil {
			obj = &unstructured.Unstructured{Object: map[string]any{
				"apiVersion": tb.group + "/" + tb.versions[0], "kind": tb.kind.name, "metadata": map[string]any{"name": "a", "namespace": "shop"}, "spec": map[string]any{"x": "<&>"},
			}}
		} else {
			o := tb.typed()
			*o.(metav1.ObjectMetaAccessor).GetObjectMeta().(*metav1.ObjectMeta) = metav1.ObjectMeta{
				Name: "a", Namespace: "shop", Labels: map[string]string{"app": "a"}, CreationTimestamp: metav1.NewTime(time.Unix(1790000000, 0)),
			}
			switch x := o.(type) {
			case *corev1.Pod:
				x.Spec = corev1.PodSpec{ServiceAccountName: "sa", NodeName: "n1", Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}}}
				x.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}}
			case *corev1.Node:
				x.Labels["topology.kubernetes.io/region"], x.Spec.PodCIDRs = "r", []string{"10.0.0.0/24"}
			case *corev1.Secret:
				x.Type, x.Data = corev1.SecretTypeTLS, map[string][]byte{"tls.crt": []byte("c"), "tls.key": []byte("k")}
				if tb.kind.name == kindSecret {
					x.Labels[RemoteSecretLabel] = "true"
				}
			}
			obj = o
		}
		want, err := c.cut(obj)
		if err != nil {
			t.Errorf("%s: %v", tb.fullName(), err)
			continue
		}
		o, err := tb.freeze(want)
		if err != nil {
			t.Errorf("%s: %v", tb.fullName(), err)
			continue
		}
		line, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		var back Object
		if err := json.Unmarshal(line, &back); err != nil {
			t.Fatal(err)
		}
		got, err := tb.thaw(back)
		if err != nil || !got.equal(want) || reflect.TypeOf(got.kept) != reflect.TypeOf(want.kept) {
			t.Errorf("%s: %+v is %+v, %v", tb.fullName(), want.kept, got.kept, err)
		}
		if secret := tb.kind.resource == "secrets"; o.Secret != secret {
			t.Errorf("%s: secret %v", tb.fullName(), o.Secret)
		}
	}
}
