package kubetest

import (
	"bytes"
	"context"
	"io"
	"os"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// CRDs makes the custom resource definitions in a YAML file known and waits until they are served.
func (s *Server) CRDs(file string) {
	s.t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	api := s.Client().Discovery().RESTClient()
	const path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
	for d := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(data), 4096); ; {
		var o unstructured.Unstructured
		if err := d.Decode(&o.Object); err == io.EOF {
			return
		} else if err != nil {
			s.t.Fatalf("%s: %v", file, err)
		}
		if len(o.Object) == 0 {
			continue
		}
		body, err := o.MarshalJSON()
		if err != nil {
			s.t.Fatal(err)
		}
		if err := api.Post().AbsPath(path).SetHeader("content-type", "application/json").Body(body).Do(ctx).Error(); err != nil {
			s.t.Fatalf("%s: %s: %v", file, o.GetName(), err)
		}
		group, _, _ := unstructured.NestedString(o.Object, "spec", "group")
		plural, _, _ := unstructured.NestedString(o.Object, "spec", "names", "plural")
		versions, _, _ := unstructured.NestedSlice(o.Object, "spec", "versions")
		for _, v := range versions {
			served := "/apis/" + group + "/" + v.(map[string]any)["name"].(string) + "/" + plural
			for err := io.EOF; err != nil; {
				if err = api.Get().AbsPath(served).Do(ctx).Error(); err != nil && ctx.Err() != nil {
					s.t.Fatalf("%s is not served: %v", o.GetName(), err)
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
	}
}
