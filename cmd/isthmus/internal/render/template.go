package render

import (
	"bytes"
	"cmp"
	"slices"

	yamlv3 "go.yaml.in/yaml/v3"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/validate"
)

// workload is what matters here of a Deployment and its like.
type workload struct {
	Kind     string `yaml:"kind"`
	Metadata struct {
		Name      string `yaml:"name"`
		Namespace string `yaml:"namespace"`
	} `yaml:"metadata"`
	Spec struct {
		Template struct {
			Metadata struct {
				Labels map[string]string `yaml:"labels"`
			} `yaml:"metadata"`
			Spec struct {
				ServiceAccountName string `yaml:"serviceAccountName"`
			} `yaml:"spec"`
		} `yaml:"template"`
	} `yaml:"spec"`
	Items []yamlv3.Node `yaml:"items"`
}

// templateOf looks for the Deployment, StatefulSet or DaemonSet of that name: what its pods would be, where none is.
func templateOf(files []validate.File, name, namespace string) (in instance, kind string) {
	byName := slices.SortedFunc(slices.Values(files), func(a, b validate.File) int { return cmp.Compare(a.Name, b.Name) })
	look := func(w workload) bool {
		if !slices.Contains([]string{"Deployment", "StatefulSet", "DaemonSet"}, w.Kind) || w.Metadata.Name != name || cmp.Or(w.Metadata.Namespace, "default") != namespace {
			return false
		}
		t := w.Spec.Template
		in, kind = instance{labels: t.Metadata.Labels, account: t.Spec.ServiceAccountName}, w.Kind
		return true
	}
	for _, f := range byName {
		d := yamlv3.NewDecoder(bytes.NewReader(f.Data))
		for {
			var w workload
			if d.Decode(&w) != nil { // the end, or something that Inputs has a Problem for
				break
			}
			if look(w) {
				return in, kind
			}
			for _, n := range w.Items {
				var item workload
				if n.Decode(&item) == nil && look(item) {
					return in, kind
				}
			}
		}
	}
	return in, ""
}
