package bootstrap

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

func TestBuild(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			var p Params
			if err := yaml.UnmarshalStrict(c.File("params.yaml"), &p); err != nil {
				t.Fatal(err)
			}
			p.Custom = c.File("custom.yaml")
			got, err := Build(p)
			if err != nil {
				t.Fatal(err)
			}
			if again, _ := Build(p); string(again) != string(got) {
				t.Error("two calls differ")
			}
			c.Want(t, "bootstrap.json", string(got))
			validate(t, got)
		})
	}
}

// validate has the real Envoy read the bootstrap.
func validate(t *testing.T, data []byte) {
	t.Helper()
	envoy := envoytest.Path(t)
	path := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, envoy, "--mode", "validate", "-c", path, "-l", "warning").CombinedOutput()
	if err != nil {
		t.Fatalf("envoy --mode validate: %v\n%s", err, out)
	}
	if strings.Contains(string(out), "eprecated") {
		t.Errorf("deprecated fields:\n%s", out)
	}
}

func TestCustomSpellings(t *testing.T) {
	p := Params{AdminPort: 15000, StatsPort: 15090, XDSSocket: "/x", MaxConnections: 1}
	p.Custom = []byte(`{"staticResources": {"clusters": [{"name": "mine"}]}, "node": {"metadata": {"myKey": 1}}}`)
	got, err := Build(p)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(got); strings.Contains(s, "staticResources") || !strings.Contains(s, `"mine"`) || !strings.Contains(s, `"myKey"`) || !strings.Contains(s, XDSCluster) {
		t.Errorf("got %s", s)
	}
	p.Custom = []byte("{")
	if _, err := Build(p); err == nil {
		t.Error("broken custom bootstrap accepted")
	}
}

func FuzzCustom(f *testing.F) {
	f.Add([]byte(`{"node": {"id": "x"}, "static_resources": []}`))
	f.Add([]byte("admin: 1\nnode:"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = Build(Params{XDSSocket: "/x", Custom: data})
	})
}
