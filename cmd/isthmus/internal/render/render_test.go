package render_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/render"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/validate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/golden"
	"github.com/isthmus-mesh/isthmus/internal/porttest"
)

// rendered is one rendering in both forms.
type rendered struct {
	bootstrap, resources []byte
	notes                string
}

func renderAll(t *testing.T, c render.Config) rendered {
	t.Helper()
	r, err := render.New(c)
	if err != nil {
		t.Fatal(err)
	}
	resources, err := r.JSON()
	if err != nil {
		t.Fatal(err)
	}
	bootstrap, err := r.Bootstrap()
	if err != nil {
		t.Fatal(err)
	}
	return rendered{bootstrap, resources, golden.Lines(r.Problems) + strings.Join(r.Warnings, "\n") + "\n"}
}

// files are the case's YAML files.
func files(c *golden.Case) (out []validate.File) {
	for _, name := range c.Names() {
		if strings.HasSuffix(name, ".yaml") {
			out = append(out, validate.File{Name: name, Data: c.File(name)})
		}
	}
	return out
}

// summary says what a bootstrap holds in few lines: what it is made of in full is the matter of those who translate.
func summary(t *testing.T, data []byte) string {
	t.Helper()
	var b struct {
		StaticResources struct {
			Clusters []struct {
				Name, Type     string
				LoadAssignment json.RawMessage `json:"load_assignment"`
			}
			Listeners []json.RawMessage
			Secrets   []map[string]json.RawMessage
		} `json:"static_resources"`
	}
	if err := json.Unmarshal(data, &b); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, l := range b.StaticResources.Listeners {
		var x struct{ Name string }
		if err := json.Unmarshal(l, &x); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "listener %s, %d inlined route tables\n", x.Name, bytes.Count(l, []byte(`"route_config"`)))
	}
	for _, c := range b.StaticResources.Clusters {
		fmt.Fprintf(&out, "cluster %s %s, %d endpoints\n", c.Name, c.Type, bytes.Count(c.LoadAssignment, []byte(`"endpoint":`)))
	}
	for _, s := range b.StaticResources.Secrets {
		var name string
		_ = json.Unmarshal(s["name"], &name)
		fmt.Fprintf(&out, "secret %s, of %d fields\n", name, len(s))
	}
	return out.String()
}

func TestRender(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			cfg := render.Config{Files: files(c), Node: strings.TrimPrefix(c.Comment, "node: "), AdminPort: 15000}
			if c.Name == "whole-id" {
				cfg.Labels = map[string]string{"istio": "ingressgateway"}
			}
			got := renderAll(t, cfg)
			have := summary(t, got.bootstrap)
			for _, line := range strings.Split(strings.TrimSpace(string(c.File("contains.txt"))), "\n") {
				if !strings.Contains(have, line+"\n") {
					t.Errorf("the bootstrap has no %s:\n%s", line, have)
				}
			}
			c.Want(t, "notes.txt", got.notes)
			for _, left := range []string{`"ads"`, `"rds"`, `"eds_cluster_config"`, `"sds_config"`, "sds-grpc"} {
				if bytes.Contains(got.bootstrap, []byte(left)) {
					t.Errorf("the bootstrap still has %s", left)
				}
			}
			slices.Reverse(cfg.Files)
			for i, f := range cfg.Files { // the documents of each file the other way round
				docs := strings.Split(strings.TrimSuffix(string(f.Data), "\n"), "\n---\n")
				slices.Reverse(docs)
				cfg.Files[i].Data = []byte(strings.Join(docs, "\n---\n") + "\n")
			}
			again := renderAll(t, cfg)
			if !bytes.Equal(again.bootstrap, got.bootstrap) || !bytes.Equal(again.resources, got.resources) {
				t.Error("the order of files and documents matters")
			}
		})
	}
}

func TestEnvoyAccepts(t *testing.T) {
	envoy := envoytest.Path(t)
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		got := renderAll(t, render.Config{Files: files(c), Node: strings.TrimPrefix(c.Comment, "node: "), AdminPort: 15000})
		asYAML, err := render.YAML(got.bootstrap)
		if err != nil {
			t.Fatal(err)
		}
		for name, data := range map[string][]byte{"envoy.json": got.bootstrap, "envoy.yaml": asYAML} {
			path := filepath.Join(t.TempDir(), name)
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(envoy, "--mode", "validate", "-c", path).CombinedOutput(); err != nil {
				t.Errorf("%s: envoy refuses %s: %v\n%s", c.Name, name, err, out)
			}
		}
	}
}

// TestEnvoyRuns starts a plain Envoy with a rendering, and asks a service through it.
func TestEnvoyRuns(t *testing.T) {
	envoy := envoytest.Path(t)
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s at the backend", r.URL.Path)
	}))
	defer backend.Close()
	port := freePort(t)
	_, backendPort, _ := net.SplitHostPort(backend.Listener.Addr().String())
	yaml := fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: edge, namespace: default}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: %d, name: http, protocol: HTTP}, hosts: [shop.example.com]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: default}
spec:
  hosts: [shop.example.com]
  gateways: [edge]
  http:
  - match: [{uri: {prefix: /old/}}]
    rewrite: {uri: /new/}
    route: [{destination: {host: shop.internal}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: shop, namespace: default}
spec:
  hosts: [shop.internal]
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: %s}]
  resolution: STATIC
  location: MESH_EXTERNAL
  endpoints: [{address: 127.0.0.1}]
`, port, backendPort)
	got := renderAll(t, render.Config{
		Files: []validate.File{{Name: "shop.yaml", Data: []byte(yaml)}}, Node: "router edge-1.istio-system", Labels: map[string]string{"istio": "ingressgateway"},
	})
	path := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(path, got.bootstrap, 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(envoy, "-c", path, "--use-dynamic-base-id", "--concurrency", "1", "-l", "warning")
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill(); <-ended }()
	body := ""
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline) && body == ""; {
		select {
		case <-ended:
			t.Fatalf("envoy ended:\n%s", log.String())
		case <-time.After(20 * time.Millisecond):
		}
		req, _ := http.NewRequest(http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/old/book", port), nil)
		req.Host = "shop.example.com"
		if resp, err := http.DefaultClient.Do(req); err == nil {
			var b bytes.Buffer
			_, _ = b.ReadFrom(resp.Body)
			resp.Body.Close()
			body = fmt.Sprint(resp.StatusCode, " ", b.String())
		}
	}
	if want := "200 /new/book at the backend"; body != want {
		t.Errorf("through envoy: %q, want %q", body, want)
	}
}

func freePort(t *testing.T) int { return porttest.Take(t) }

func TestRefusesNodes(t *testing.T) {
	for _, node := range []string{"", "reviews", "reviews.", ".default", "a~b~c", "boat reviews.default", "sidecar~x~reviews.default~d", "a b c.d"} {
		if _, err := render.New(render.Config{Node: node}); err == nil {
			t.Errorf("node %q is taken", node)
		}
	}
}

func TestCertsAreNamed(t *testing.T) {
	dir := t.TempDir()
	c := render.Config{Node: "a.default", Certs: dir, Files: []validate.File{{Name: "s.yaml", Data: []byte("apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: default, labels: {security.istio.io/tlsMode: istio, app: a}}\nspec: {containers: [{name: a}]}\nstatus: {podIP: 10.0.0.1, phase: Running}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: default}\nspec: {selector: {app: a}, clusterIP: 10.0.1.1, ports: [{port: 80, name: http}]}\n")}}}
	if _, err := render.New(c); err == nil {
		t.Fatal("a folder without root-cert.pem is taken")
	}
	// any certificate will do as a root
	if err := os.WriteFile(filepath.Join(dir, "root-cert.pem"), []byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := renderAll(t, c)
	for _, want := range []string{filepath.Join(dir, "cert-chain.pem"), filepath.Join(dir, "key.pem")} {
		if !bytes.Contains(got.bootstrap, []byte(want)) {
			t.Errorf("the bootstrap does not name %s", want)
		}
	}
	if bytes.Contains(got.bootstrap, []byte("PRIVATE KEY")) {
		t.Error("a private key stands in the bootstrap")
	}
}

// TestTemplates: a Deployment says what its pods would be.
func TestTemplates(t *testing.T) {
	const gateway = "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: edge, namespace: default}\nspec: {selector: {istio: ingressgateway}, servers: [{port: {number: 8080, name: http, protocol: HTTP}, hosts: ['*']}]}\n"
	const deployment = "{apiVersion: apps/v1, kind: Deployment, metadata: {name: edge, namespace: web}, spec: {template: {metadata: {labels: {istio: ingressgateway}}, spec: {serviceAccountName: porter}}}}"
	for name, data := range map[string]string{"document": deployment + "\n---\n" + gateway, "list": "{apiVersion: v1, kind: List, items: [" + deployment + "]}\n---\n" + gateway} {
		got := renderAll(t, render.Config{Node: "router edge.web", Files: []validate.File{{Name: "a.yaml", Data: []byte(data)}}})
		for _, want := range []string{`"port_value": 8080`, `"istio": "ingressgateway"`} {
			if !bytes.Contains(got.bootstrap, []byte(want)) {
				t.Errorf("%s: no %s in the bootstrap:\n%s", name, want, got.notes)
			}
		}
	}
}
