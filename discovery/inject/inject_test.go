package inject_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/discovery/inject"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func toYAML(t *testing.T, v any) string {
	return string(must[[]byte](t)(yaml.Marshal(v)))
}

// TestInject: pod.yaml, and where they matter namespace.yaml, values.yaml, config.yaml, mesh.yaml and request.yaml go
// in; decision.txt and pod.out.yaml, or error.txt, come out. What holds for every case is checked for every case.
func TestInject(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			config, err := inject.Parse(inject.Documents{
				Config: string(c.File("config.yaml")), Values: string(c.File("values.yaml")), Mesh: string(c.File("mesh.yaml")),
			})
			if err != nil {
				c.Want(t, "error.txt", err.Error())
				return
			}
			var pod corev1.Pod
			if err := yaml.UnmarshalStrict(c.File("pod.yaml"), &pod); err != nil {
				t.Fatal(err)
			}
			ns := inject.Namespace{Name: "default", Labels: map[string]string{"istio-injection": "enabled"}, Known: true}
			if text := c.File("namespace.yaml"); text != nil {
				var o metav1.PartialObjectMetadata
				if err := yaml.Unmarshal(text, &o); err != nil {
					t.Fatal(err)
				}
				ns.Name, ns.Labels = o.Name, o.Labels
			}
			var r inject.Request
			if err := yaml.Unmarshal(c.File("request.yaml"), &r); err != nil {
				t.Fatal(err)
			}
			r.Namespace = ns
			before := toYAML(t, pod)
			result, err := config.Inject(&pod, r)
			if toYAML(t, pod) != before {
				t.Error("the pod that came in was changed")
			}
			if err != nil {
				c.Want(t, "error.txt", err.Error())
				c.Want(t, "decision.txt", "")
				c.Want(t, "pod.out.yaml", "")
				return
			}
			c.Want(t, "error.txt", "")
			c.Want(t, "decision.txt", result.Decision.Reason+": "+result.Decision.Text)
			if result.Pod == nil {
				c.Want(t, "pod.out.yaml", "")
				checkUntouched(t, config, &pod, r)
				return
			}
			c.Want(t, "pod.out.yaml", toYAML(t, result.Pod))
			checkPatch(t, config, &pod, result.Pod, r)
			again, err := config.Inject(result.Pod, r)
			if err != nil || again.Pod != nil || again.Decision.Reason != "AlreadyInjected" {
				t.Errorf("a second injection: %+v, %v", again.Decision, err)
			}
			checkUntouched(t, config, result.Pod, r)
			checkNames(t, result.Pod)
		})
	}
}

func review(t *testing.T, config *inject.Config, pod *corev1.Pod, r inject.Request) *admissionv1.AdmissionResponse {
	t.Helper()
	a, _ := config.Review(&admissionv1.AdmissionRequest{
		UID: "1", Namespace: r.Namespace.Name, Operation: admissionv1.Create, Resource: metav1.GroupVersionResource{Version: "v1", Resource: "pods"},
		Object: runtime.RawExtension{Raw: must[[]byte](t)(json.Marshal(pod))},
	}, r)
	return a
}

func checkUntouched(t *testing.T, config *inject.Config, pod *corev1.Pod, r inject.Request) {
	t.Helper()
	if a := review(t, config, pod, r); !a.Allowed || a.Patch != nil {
		t.Errorf("a review: allowed %v, patch %s", a.Allowed, a.Patch)
	}
}

// checkPatch applies the patch of the review as an API server does.
func checkPatch(t *testing.T, config *inject.Config, pod, want *corev1.Pod, r inject.Request) {
	t.Helper()
	a := review(t, config, pod, r)
	if !a.Allowed || a.PatchType == nil {
		t.Fatalf("a review: %+v", a)
	}
	patch := must[jsonpatch.Patch](t)(jsonpatch.DecodePatch(a.Patch))
	out := must[[]byte](t)(patch.Apply(must[[]byte](t)(json.Marshal(pod))))
	var got corev1.Pod
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	if g, w := toYAML(t, got), toYAML(t, want); g != w {
		t.Errorf("the patched pod differs:\n%s\nwanted\n%s", g, w)
	}
	if bytes.Contains(a.Patch, []byte(`"value":null`)) {
		t.Errorf("the patch writes null: %s", a.Patch)
	}
}

// checkNames finds what an API server would refuse.
func checkNames(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	seen := map[string]bool{}
	for _, c := range append(append([]corev1.Container{}, pod.Spec.InitContainers...), pod.Spec.Containers...) {
		if seen[c.Name] {
			t.Errorf("two containers %s", c.Name)
		}
		seen[c.Name] = true
		env := map[string]bool{}
		for _, e := range c.Env {
			if env[e.Name] && c.Name == inject.ProxyContainer {
				t.Errorf("container %s has %s twice", c.Name, e.Name)
			}
			env[e.Name] = true
		}
	}
	volumes := map[string]bool{}
	for _, v := range pod.Spec.Volumes {
		if volumes[v.Name] {
			t.Errorf("two volumes %s", v.Name)
		}
		volumes[v.Name] = true
	}
	for _, c := range append(append([]corev1.Container{}, pod.Spec.InitContainers...), pod.Spec.Containers...) {
		for _, m := range c.VolumeMounts {
			if !volumes[m.Name] && strings.HasPrefix(m.Name, "istio") {
				t.Errorf("container %s mounts %s, which is no volume", c.Name, m.Name)
			}
		}
	}
}
