package install

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

func render(t *testing.T, values map[string]any, namespace string) (*Manifest, error) {
	t.Helper()
	c, err := Chart()
	if err != nil {
		t.Fatal(err)
	}
	return Render(c, values, namespace, false)
}

// TestRender compares what the chart becomes with each file of values. Resource definitions are listed by name.
func TestRender(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "values.yaml")
			if err := os.WriteFile(file, c.File("values.yaml"), 0o600); err != nil {
				t.Fatal(err)
			}
			values, err := ValuesFrom{Profile: strings.TrimSpace(string(c.File("profile"))), Files: []string{file}}.Read()
			if err != nil {
				t.Fatal(err)
			}
			m, err := render(t, values, "istio-system")
			if err != nil {
				t.Fatal(err)
			}
			again, err := render(t, values, "istio-system")
			if err != nil || again.Text != m.Text {
				t.Errorf("rendered twice it differs: %v", err)
			}
			var text, crds strings.Builder
			for part := range strings.SplitSeq(strings.TrimPrefix(m.Text, "---\n"), "\n---\n") {
				if strings.Contains(part, "\nkind: CustomResourceDefinition\n") {
					continue
				}
				text.WriteString("---\n" + strings.TrimSpace(part) + "\n")
			}
			for _, o := range m.Objects {
				if isDefinition(o) {
					crds.WriteString(o.GetName() + "\n")
					if o.GetAnnotations()[resourcePolicy] != "keep" || o.GetLabels()[partOf] != "isthmus" {
						t.Errorf("%s: helm would delete it, or nobody knows whose it is", title(o))
					}
				}
			}
			c.Want(t, "manifest.yaml", text.String())
			c.Want(t, "definitions.txt", crds.String())
			c.Want(t, "notes.txt", m.Notes)
			consistent(t, m.Objects)
		})
	}
}

// consistent checks what the API server would not: that selectors select, that accounts and ConfigMaps exist.
func consistent(t *testing.T, objects []*unstructured.Unstructured) {
	t.Helper()
	there := map[string]bool{"ConfigMap/istio-system/istio-ca-root-cert": true} // written by the leader
	for _, o := range objects {
		if there[title(o)] {
			t.Errorf("%s is there twice", title(o))
		}
		there[title(o)] = true
	}
	want := func(o *unstructured.Unstructured, what string) {
		if !there[what] {
			t.Errorf("%s names %s, which is not there", title(o), what)
		}
	}
	for _, o := range objects {
		switch o.GetKind() {
		case "Deployment", "DaemonSet":
			account, _, _ := unstructured.NestedString(o.Object, "spec", "template", "spec", "serviceAccountName")
			want(o, "ServiceAccount/istio-system/"+account)
			labels, _, _ := unstructured.NestedStringMap(o.Object, "spec", "template", "metadata", "labels")
			match, _, _ := unstructured.NestedStringMap(o.Object, "spec", "selector", "matchLabels")
			for k, v := range match {
				if labels[k] != v {
					t.Errorf("%s selects %s=%s, its pods have %q", title(o), k, v, labels[k])
				}
			}
			if labels["app"] != o.GetName() {
				t.Errorf("%s: its pods have app=%s", title(o), labels["app"])
			}
			volumes, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "volumes")
			for _, v := range volumes {
				if name, ok, _ := unstructured.NestedString(v.(map[string]any), "configMap", "name"); ok {
					want(o, "ConfigMap/istio-system/"+name)
				}
			}
		case "ClusterRoleBinding", "RoleBinding":
			name, _, _ := unstructured.NestedString(o.Object, "roleRef", "name")
			kind, _, _ := unstructured.NestedString(o.Object, "roleRef", "kind")
			if kind == "Role" {
				name = "istio-system/" + name
			}
			want(o, kind+"/"+name)
			subjects, _, _ := unstructured.NestedSlice(o.Object, "subjects")
			for _, s := range subjects {
				account, _, _ := unstructured.NestedString(s.(map[string]any), "name")
				want(o, "ServiceAccount/istio-system/"+account)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	for _, c := range []struct{ name, values, want, hint string }{
		{"unknown", "isthmusd: {replica: 2}", "unknown value isthmusd.replica", "did you mean isthmusd.replicas?"},
		{"unknown at the top", "isthmuds: {}", "unknown value isthmuds", "did you mean isthmusd?"},
		{"unknown deep down", "gateways: {eastwest: {service: {port: 1}}}", "unknown value gateways.eastwest.service.port", "did you mean gateways.eastwest.service.ports?"},
		{"unknown and like nothing", "gateways: {westeast: {enabled: true}}", "unknown value gateways.westeast", "lists every value"},
		{"two", "one: 1\ntwo: 2", "unknown value one; unknown value two", ""},
		{"wrong type", "isthmusd: {replicas: many}", "value isthmusd.replicas: got string, want integer", ""},
		{"no replica", "isthmusd: {replicas: 0}", "value isthmusd.replicas: minimum: got 0, want 1", ""},
		{"enum", "gateways: {eastwest: {kind: haproxy}}", "value gateways.eastwest.kind: value must be one of 'envoy', 'relay'", ""},
		{"name", "cluster: {name: Amber_1}", "value cluster.name:", ""},
		{"duration", "federation: {lease: soon}", "value federation.lease:", ""},
		{"port", "dns: {ttl: 0}", "value dns.ttl: minimum: got 0, want 1", ""},
		{"only of the eastwest gateway", "gateways: {ingress: {kind: relay}}", "unknown value gateways.ingress.kind", ""},
		{"no name", "cluster: {name: ''}", "cluster.name is required", ""},
		{"remote without address", "role: remote", "role remote needs the control plane's address", ""},
		{"two addresses", "role: remote\nremote: {controlPlane: [192.0.2.1], hostname: cp.example}", "exclude each other", ""},
		{"a name as address", "role: remote\nremote: {controlPlane: [cp.example]}", "value remote.controlPlane.0:", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			values := map[string]any{"cluster": map[string]any{"name": "amber"}}
			if err := yaml.Unmarshal([]byte(c.values), &values); err != nil {
				t.Fatal(err)
			}
			_, err := render(t, values, "istio-system")
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(diag.HintOf(err), c.hint) {
				t.Errorf("got %v\nhint %q\nwant %q, hint %q", err, diag.HintOf(err), c.want, c.hint)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("the error has several lines: %v", err)
			}
		})
	}
}

func TestValuesFrom(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	a, b := file("a", "dns: {ttl: 7}\nisthmusd: {replicas: 3, logLevel: warn}\n"), file("b", "isthmusd: {replicas: 4}\n")
	got, err := ValuesFrom{Profile: "minimal", Files: []string{a, b}, Set: []string{"isthmusd.logLevel=debug,image.pullSecrets={x,y}"}}.Read()
	if err != nil {
		t.Fatal(err)
	}
	text, _ := yaml.Marshal(got)
	const want = `dns:
  enabled: false
  ttl: 7
gateways:
  eastwest:
    enabled: false
image:
  pullSecrets:
  - x
  - "y"
isthmusd:
  logLevel: debug
  replicas: 4
`
	if string(text) != want {
		t.Errorf("got\n%swant\n%s", text, want)
	}
	for _, c := range []struct {
		from ValuesFrom
		want string
	}{
		{ValuesFrom{Profile: "maximal"}, `no profile "maximal"`},
		{ValuesFrom{Profile: "../values"}, `no profile`},
		{ValuesFrom{Files: []string{filepath.Join(dir, "none")}}, "read values"},
		{ValuesFrom{Files: []string{file("c", "a: 1\na: 2\n")}}, `key "a" already set`},
		{ValuesFrom{Set: []string{"a[x]=1"}}, "--set a[x]=1"},
	} {
		if _, err := c.from.Read(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.from, err)
		}
	}
}

// TestGenerated fails when the schema or the table of the guide is older than values.yaml.
func TestGenerated(t *testing.T) {
	const root = "../../../../"
	guide := filepath.Join(t.TempDir(), "guide.md")
	schema := filepath.Join(t.TempDir(), "schema.json")
	text, err := os.ReadFile(root + "docs/guide/isthmus-install.md")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(guide, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "run", root+"hack/values", root+"deploy/helm/isthmus/values.yaml", schema, guide).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for got, want := range map[string]string{guide: root + "docs/guide/isthmus-install.md", schema: root + "deploy/helm/isthmus/values.schema.json"} {
		a, err := os.ReadFile(got)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(want)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s is out of date: go generate ./deploy/helm", want)
		}
	}
}

func TestClusterName(t *testing.T) {
	for in, want := range map[string]string{
		"amber": "amber", "kind-amber": "kind-amber", "gke_my-project_europe-west1-b_prod": "gke-my-project-europe-west1-b-prod",
		"arn:aws:eks:eu-west-1:123456789012:cluster/Prod": "arn-aws-eks-eu-west-1-123456789012-cluster-prod", "admin@k8s.example": "admin-k8s-example", "": "",
		strings.Repeat("a", 62) + "_b": strings.Repeat("a", 62),
	} {
		if got := ClusterName(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
