package validate

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const good = `apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: default}
spec:
  selector: {app: reviews}
  ports: [{name: http, port: 9080}]
---
apiVersion: networking.istio.io/v1beta1
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews]
  http:
    - route: [{destination: {host: reviews}}]
`

// list has its second object's mistakes in lines 20 and 23, after a document and a comment.
const list = `# what follows
apiVersion: v1
kind: ConfigMap
metadata: {name: nothing, namespace: default}
---
apiVersion: v1
kind: List
items:
- apiVersion: networking.istio.io/v1
  kind: DestinationRule
  spec: {host: ratings}
  metadata: {name: ratings, namespace: default}

- kind: VirtualService
  apiVersion: networking.istio.io/v1
  metadata: {name: shop, namespace: default}
  spec:
    hosts: [shop.example.com]
    gateways:
    - default/edge
    http:
    - route:
      - destination: {host: reviews, subset: v9}
`

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name  string
		files []File
		want  []string // beginnings of the findings' lines
	}{
		{name: "valid", files: []File{{"a.yaml", []byte(good)}}},
		{name: "an unknown field, with its line", files: []File{{"a.yaml", []byte(strings.Replace(good, "  http:\n", "  htp:\n", 1))}},
			want: []string{"a.yaml:13: error: VirtualService/default/reviews spec.htp: UnknownField:"}},
		{name: "no YAML", files: []File{{"a.yaml", []byte("a: [")}}, want: []string{"a.yaml:1: error: File/a.yaml: InvalidYAML:"}},
		{name: "an unknown host may yet come", files: []File{{"a.yaml", []byte(strings.Replace(good, "host: reviews}", "host: ratings}", 1))}},
			want: []string{"a.yaml:14: warning: VirtualService/default/reviews spec.http[0].route[0].destination.host: UnknownHost:"}},
		{name: "the same object in two files", files: []File{{"a.yaml", []byte(good)}, {"b.yaml", []byte(good)}},
			want: []string{"b.yaml:1: error: Service/default/reviews: Duplicate:", "b.yaml:8: error: VirtualService/default/reviews: Duplicate:"}},
		{name: "two rules for one host", files: []File{{"a.yaml", []byte(good)}, {"b.yaml", []byte("apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: z}\nspec:\n  hosts: [reviews]\n  http: [{route: [{destination: {host: reviews}}]}]\n")}},
			want: []string{"b.yaml:5: warning: VirtualService/default/z spec.hosts[0]: ConflictingHosts:"}},
		{name: "a route that an earlier one hides", files: []File{{"a.yaml", []byte(good + "    - match: [{uri: {prefix: /a}}]\n      route: [{destination: {host: reviews}}]\n")}},
			want: []string{"a.yaml:15: warning: VirtualService/default/reviews spec.http[1]: UnreachableRoute: no request gets here: spec.http[0] takes all that it matches; put it before that rule, or remove it"}},
		{name: "objects of a list", files: []File{{"a.yaml", []byte(good)}, {"l.yaml", []byte(list)}},
			want: []string{
				"l.yaml:11: warning: DestinationRule/default/ratings spec.host: UnknownHost:", "l.yaml:20: warning: VirtualService/default/shop spec.gateways[0]: UnknownGateway:",
				"l.yaml:23: warning: VirtualService/default/shop spec.http[0].route[0].destination.subset: UnknownSubset:",
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := Check(c.files)
			if len(r.Findings) != len(c.want) || r.Errors+r.Warnings != len(c.want) || r.Files != len(c.files) {
				t.Fatalf("got %+v, want %d findings", r, len(c.want))
			}
			for i, f := range r.Findings {
				if !strings.HasPrefix(f.String(), c.want[i]) {
					t.Errorf("got  %s\nwant %s", f, c.want[i])
				}
			}
		})
	}
	b, err := json.Marshal(Check([]File{{"a.yaml", []byte(good)}}))
	if err != nil || !strings.Contains(string(b), `"findings":[]`) {
		t.Errorf("JSON of a valid file: %s, %v", b, err)
	}
}

func TestRead(t *testing.T) {
	dir := t.TempDir()
	for name, data := range map[string]string{"a.yaml": "a", "sub/b.yml": "b", "sub/c.json": "c", "notes.txt": "n", ".git/x.yaml": "x"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	files, err := Read([]string{dir, filepath.Join(dir, "a.yaml"), "-"}, strings.NewReader("in"))
	if err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, f := range files {
		got += string(f.Data) + " "
	}
	if got != "in a b c " {
		t.Errorf("read %q", got)
	}
	for name, paths := range map[string][]string{"nothing": nil, "no such file": {filepath.Join(dir, "nosuch")}, "a folder without objects": {filepath.Join(dir, ".git", "..", "empty")}} {
		if name == "a folder without objects" {
			if err := os.Mkdir(filepath.Join(dir, "empty"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Read(paths, strings.NewReader("")); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
