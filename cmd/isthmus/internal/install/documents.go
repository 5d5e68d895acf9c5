package install

import (
	"cmp"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"

	"helm.sh/helm/v3/pkg/releaseutil"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/deploy/helm"
)

// document is one object of a rendered chart, and the template it is from.
type document struct {
	source, text string
	object       *unstructured.Unstructured
}

// documentsOf takes rendered templates apart, in the order in which Helm does: by kind, then by the template's name.
// Helm's own function reads the whole YAML only to learn the kinds; most of it are definitions, which are read once.
func documentsOf(files map[string]string) ([]document, error) {
	var out []document
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasPrefix(path.Base(name), "_") {
			continue // a partial
		}
		for _, text := range split(files[name]) {
			o, err := decode(text, yaml.UnmarshalStrict)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			out = append(out, document{name, text, o})
		}
	}
	order := map[string]int{}
	for i, kind := range releaseutil.InstallOrder {
		order[kind] = i - len(releaseutil.InstallOrder)
	}
	slices.SortStableFunc(out, func(a, b document) int {
		i, j := order[a.object.GetKind()], order[b.object.GetKind()]
		if i == 0 && j == 0 {
			return cmp.Compare(a.object.GetKind(), b.object.GetKind()) // kinds that Helm does not know are last
		}
		return cmp.Compare(i, j)
	})
	return out, nil
}

// split returns the documents of YAML, without space around them.
func split(text string) (out []string) {
	for part := range strings.SplitSeq("\n"+text, "\n---") {
		if part = strings.TrimSpace(part); part != "" {
			out = append(out, part)
		}
	}
	return out
}

// decode reads a document. What it returns is shared when it is one of the chart's definitions: it is only read.
func decode(text string, unmarshal func([]byte, any, ...yaml.JSONOpt) error) (*unstructured.Unstructured, error) {
	if o, ok := shipped()[strings.TrimPrefix(text, sourceLine(text))]; ok {
		return o()
	}
	o := &unstructured.Unstructured{}
	// A text at the end of an object ends with a line break, as it does in the manifest.
	err := unmarshal([]byte(text+"\n"), &o.Object)
	return o, err
}

// sourceLine is the comment that a manifest has before each document, "" where there is none.
func sourceLine(text string) string {
	if !strings.HasPrefix(text, "# Source: ") {
		return ""
	}
	return text[:strings.IndexByte(text, '\n')+1]
}

// shipped has the chart's definitions by their text, each decoded when it is first asked for. They are a megabyte, and
// rendering, every record of the release and every comparison have them again.
var shipped = sync.OnceValue(func() map[string]func() (*unstructured.Unstructured, error) {
	out := map[string]func() (*unstructured.Unstructured, error){}
	names, _ := fs.Glob(helm.Chart(), "files/crds/*.yaml") // the pattern is a good one
	for _, name := range names {
		data, err := fs.ReadFile(helm.Chart(), name)
		if err != nil {
			continue // rendering says so
		}
		for _, text := range split(string(data)) {
			out[text] = sync.OnceValues(func() (*unstructured.Unstructured, error) {
				o := &unstructured.Unstructured{}
				err := yaml.UnmarshalStrict([]byte(text+"\n"), &o.Object)
				return o, err
			})
		}
	}
	return out
})

// definition is what is asked of a resource definition on the cluster. The rest, its schemas above all, is skipped.
type definition struct {
	Metadata marks
	Spec     struct {
		Group    string
		Names    struct{ Plural string }
		Versions []struct {
			Name   string
			Served bool
		}
	}
	Status struct {
		Conditions []struct{ Type, Status, Reason, Message string }
	}
}

// marks are labels and annotations.
type marks struct{ Labels, Annotations map[string]string }

func (m marks) GetLabels() map[string]string      { return m.Labels }
func (m marks) GetAnnotations() map[string]string { return m.Annotations }

// served returns the versions, and which are served.
func (d *definition) served() map[string]bool {
	out := map[string]bool{}
	for _, v := range d.Spec.Versions {
		out[v.Name] = v.Served
	}
	return out
}

// established says why the definition is not served; "" when it is.
func (d *definition) established() string {
	why := "not Established: "
	for _, c := range d.Status.Conditions {
		if c.Type == "Established" && c.Status == "True" {
			return ""
		}
		if c.Type == "NamesAccepted" {
			why += c.Reason
			if c.Message != "" {
				why += ": " + c.Message
			}
		}
	}
	return why
}
