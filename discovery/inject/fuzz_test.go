package inject_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/discovery/inject"
)

// FuzzReview: whatever an API server sends is answered, never twice with a patch, and each patch can be applied.
func FuzzReview(f *testing.F) {
	const review = `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"1","operation":"CREATE","namespace":"n","resource":{"group":"","version":"v1","resource":"pods"},"object":POD}}`
	paths, _ := filepath.Glob("testdata/*.txtar")
	for _, p := range paths {
		data, err := os.ReadFile(p)
		if err != nil {
			f.Fatal(err)
		}
		for _, x := range txtar.Parse(data).Files {
			if x.Name == "pod.yaml" {
				pod, err := yaml.YAMLToJSON(x.Data)
				if err != nil {
					f.Fatal(err)
				}
				f.Add([]byte(strings.Replace(review, "POD", string(pod), 1)))
			}
		}
	}
	f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`))
	config, err := inject.Parse(inject.Documents{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		q, err := inject.DecodeReview(body)
		if err != nil {
			return
		}
		a, _ := config.Review(q, inject.Request{})
		if out, err := inject.EncodeReview(q, a); err != nil || !json.Valid(out) {
			t.Fatalf("answer: %v", err)
		}
		if a.Patch == nil {
			return
		}
		patch, err := jsonpatch.DecodePatch(a.Patch)
		if err != nil {
			t.Fatal(err)
		}
		// An API server writes the object it has decoded, so there every list and map of the patch's paths is.
		raw := canonical(t, q)
		out, err := patch.Apply(raw)
		if err != nil {
			t.Fatalf("%v\n%s\n%s", err, a.Patch, raw)
		}
		q.Object.Raw = out
		if again, d := config.Review(q, inject.Request{}); !again.Allowed || again.Patch != nil {
			t.Fatalf("a second review: %+v, %s", d, again.Patch)
		}
	})
}

func canonical(t *testing.T, q *admissionv1.AdmissionRequest) []byte {
	t.Helper()
	pod, err := inject.DecodePod(q.Object.Raw)
	if err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
