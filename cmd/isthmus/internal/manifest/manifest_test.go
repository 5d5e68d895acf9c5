package manifest_test

import (
	"fmt"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/manifest"
	"github.com/isthmus-mesh/isthmus/discovery/inject"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

func defaults(t testing.TB) *inject.Config {
	c, err := inject.Parse(inject.Documents{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestInject: in.yaml goes in; outcomes.txt says what became of each object, summary.txt which containers the documents
// that come out have; errors.txt what is wrong.
func TestInject(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			o := manifest.Options{Config: defaults(t)}
			in := c.File("in.yaml")
			out, outcomes, err := manifest.Inject("in.yaml", in, o)
			if err != nil {
				c.Want(t, "errors.txt", err.Error())
				return
			}
			var b strings.Builder
			for _, x := range outcomes {
				fmt.Fprintf(&b, "%d %s %v %s\n", x.Line, x.Object, x.Inject, x.Reason)
			}
			c.Want(t, "outcomes.txt", b.String())
			c.Want(t, "out.yaml", abridged(t, string(out)))
			again, _, err := manifest.Inject("in.yaml", out, o)
			if err != nil || string(again) != string(out) {
				t.Errorf("a second injection changes the file: %v", err)
			}
		})
	}
}

// abridged writes only the names of an injected Pod's containers: what is in them is tested where they are made.
func abridged(t *testing.T, text string) string {
	docs := strings.SplitAfter(text, "---\n")
	for i, d := range docs {
		if !strings.Contains(d, "istio-proxy") {
			continue
		}
		var v any
		if err := yaml.Unmarshal([]byte(strings.TrimSuffix(d, "---\n")), &v); err != nil {
			t.Fatal(err)
		}
		shorten(v)
		out, err := yaml.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		docs[i] = string(out)
		if strings.HasSuffix(d, "---\n") {
			docs[i] += "---\n"
		}
	}
	return strings.Join(docs, "")
}

func shorten(v any) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			switch k {
			case "initContainers", "containers":
				var names []any
				for _, c := range x.([]any) {
					names = append(names, c.(map[string]any)["name"])
				}
				v[k] = names
			case "volumes", "annotations":
				v[k] = "..."
			default:
				shorten(x)
			}
		}
	case []any:
		for _, x := range v {
			shorten(x)
		}
	}
}

// FuzzInject: no text stops it, and what it writes it takes again.
func FuzzInject(f *testing.F) {
	f.Add("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: a, image: b}]}\n--- \nkind: List\nitems: [{kind: Pod}]\n")
	f.Add("kind: Namespace\nmetadata: {name: default, labels: {istio-injection: disabled}}\n---\n# only words\n")
	c := defaults(f)
	f.Fuzz(func(t *testing.T, text string) {
		out, _, err := manifest.Inject("f", []byte(text), manifest.Options{Config: c})
		if err != nil {
			return
		}
		if again, _, err := manifest.Inject("f", out, manifest.Options{Config: c}); err != nil || string(again) != string(out) {
			t.Errorf("again: %v\n%s\n---------\n%s", err, out, again)
		}
	})
}
