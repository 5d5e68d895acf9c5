package config_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/refs"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestGolden decodes the *.yaml and *.json of each archive and compares with its input.json and problems.txt.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			var in mesh.Input
			var problems []mesh.Problem
			for _, f := range archive.Files {
				if ext := filepath.Ext(f.Name); f.Name != "input.json" && (ext == ".yaml" || ext == ".json") {
					one, p := config.Decode(f.Name, f.Data, config.Options{})
					again, q := config.Decode(f.Name, bytes.ReplaceAll(f.Data, []byte("\n"), []byte("\r\n")), config.Options{})
					if render(t, one) != render(t, again) || lines(p) != lines(q) {
						t.Errorf("%s: with CRLF it decodes to something else:\n%s", f.Name, lines(q))
					}
					in, problems = join(in, one), append(problems, p...)
				}
			}
			got["input.json"], got["problems.txt"] = render(t, in), lines(problems)
			for i, f := range archive.Files {
				want, isGolden := got[f.Name]
				if !isGolden {
					continue
				}
				delete(got, f.Name)
				if string(f.Data) != want && !*update {
					t.Errorf("%s: got\n%s\nwant\n%s", f.Name, want, f.Data)
				}
				archive.Files[i].Data = []byte(want)
			}
			for _, name := range []string{"input.json", "problems.txt"} {
				if data, missing := got[name]; missing {
					archive.Files = append(archive.Files, txtar.File{Name: name, Data: []byte(data)})
					if !*update {
						t.Errorf("%s is missing; run with -update", name)
					}
				}
			}
			if *update {
				if err := os.WriteFile(file, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func join(a, b mesh.Input) mesh.Input {
	va, vb := reflect.ValueOf(&a).Elem(), reflect.ValueOf(b)
	for i := range va.NumField() {
		va.Field(i).Set(reflect.AppendSlice(va.Field(i), vb.Field(i)))
	}
	return a
}

// render writes the fields of an Input that are not empty.
func render(t *testing.T, in mesh.Input) string {
	t.Helper()
	v, out := reflect.ValueOf(in), map[string]any{}
	for i := range v.NumField() {
		if v.Field(i).Len() > 0 {
			out[v.Type().Field(i).Name] = v.Field(i).Interface()
		}
	}
	data, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return string(data) + "\n"
}

func lines(problems []mesh.Problem) string {
	var b strings.Builder
	for _, p := range problems {
		fmt.Fprintln(&b, p)
	}
	return b.String()
}

const virtualService = `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - %s
`

// TestVirtualServiceRules says which rules are refused, and for which field.
func TestVirtualServiceRules(t *testing.T) {
	route := "route: [{destination: {host: reviews}}]"
	for rule, want := range map[string]string{
		"{" + route + "}":                                                             "",
		"{" + route + ", timeout: 1m}":                                                "",
		"{" + route + ", match: [{}]}":                                                "",
		"{" + route + ", match: [{headers: {end-user: {}}}]}":                         "",
		"{" + route + ", timeout: soon}":                                              "spec.http[0].timeout",
		"{" + route + ", timeout: -1s}":                                               "spec.http[0].timeout",
		"{" + route + ", match: [{uri: {}}]}":                                         "spec.http[0].match[0].uri",
		"{" + route + ", match: [{uri: {regex: '(?=x)'}}]}":                           "spec.http[0].match[0].uri.regex",
		"{" + route + ", match: [{headers: {'a b': {exact: x}}}]}":                    "spec.http[0].match[0].headers[a b]",
		"{" + route + ", match: [{port: 70000}]}":                                     "spec.http[0].match[0].port",
		"{" + route + ", match: [{prt: 1}]}":                                          "spec.http[0].match[0].prt",
		"{" + route + ", mirror: {host: x}, mirrorPercentage: {value: 101}}":          "spec.http[0].mirrorPercentage.value",
		"{" + route + ", redirect: {uri: /x}}":                                        "spec.http[0]",
		"{" + route + ", retries: {attempts: 2, retryOn: '5xx,never'}}":               "spec.http[0].retries.retryOn",
		"{" + route + ", fault: {abort: {httpStatus: 99}}}":                           "spec.http[0].fault.abort.httpStatus",
		"{" + route + ", fault: {delay: {fixedDelay: 1s, percentage: {value: -1}}}}":  "spec.http[0].fault.delay.percentage",
		"{" + route + ", headers: {request: {set: {'x y': z}}}}":                      "spec.http[0].headers.request.set[x y]",
		"{redirect: {redirectCode: 200, uri: /}}":                                     "spec.http[0].redirect.redirectCode",
		"{directResponse: {status: 1}}":                                               "spec.http[0].directResponse.status",
		"{match: [{uri: {prefix: /a}}]}":                                              "spec.http[0].route",
		"{route: [{destination: {host: reviews}, weight: -1}]}":                       "spec.http[0].route[0].weight",
		"{route: [{destination: {host: reviews}}, {destination: {host: other}}]}":     "spec.http[0].route",
		"{route: [{destination: {host: reviews, port: {number: 0}}}]}":                "spec.http[0].route[0].destination.port.number",
		"{route: [{destination: {host: 'a_b'}}]}":                                     "spec.http[0].route[0].destination.host",
		"{route: [{destination: {host: reviews}, weight: many}]}":                     "spec.http[0].route[0].weight",
		"{route: [{destination: {}}]}":                                                "spec.http[0].route[0].destination.host",
		"{route: [{}]}":                                                               "spec.http[0].route[0].destination",
		"{" + route + ", corsPolicy: {allowOrigins: [{regex: '['}]}}":                 "spec.http[0].corsPolicy.allowOrigins[0].regex",
		"{" + route + ", rewrite: {uri: /, uriRegexRewrite: {match: a, rewrite: b}}}": "spec.http[0].rewrite.uri",
		"{" + route + ", rewrite: {uriRegexRewrite: {match: '(', rewrite: b}}}":       "spec.http[0].rewrite.uriRegexRewrite.match",
		"{" + route + ", match: [{uri: {exact: a, prefix: b}}]}":                      "spec.http[0].match[0].uri.prefix",
		"{" + route + ", match: [{method: GET}]}":                                     "spec.http[0].match[0].method",
	} {
		in, problems := config.Decode("f.yaml", fmt.Appendf(nil, virtualService, rule), config.Options{})
		switch {
		case want == "" && (len(problems) > 0 || len(in.VirtualServices) != 1):
			t.Errorf("%s: refused: %v", rule, problems)
		case want != "" && (len(problems) != 1 || problems[0].Field != want || len(in.VirtualServices) != 0):
			t.Errorf("%s: got %v, want one problem with %s", rule, problems, want)
		case want != "" && !strings.HasPrefix(problems[0].Message, "line 8: ") && want != "spec.http[0]":
			t.Errorf("%s: %q does not name line 8", rule, problems[0].Message)
		}
	}
}

// TestTooDeep gives the parsers what makes naive ones fall over.
func TestTooDeep(t *testing.T) {
	for name, data := range map[string]string{
		"flow":    strings.Repeat("[", 100000),
		"maps":    strings.Repeat("{a: ", 50000),
		"aliases": "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g,*g]\n",
		"lists":   strings.Repeat(`{"apiVersion": "v1", "kind": "List", "items": [`, 50) + strings.Repeat("]}", 50),
	} {
		if _, problems := config.Decode("f.yaml", []byte(data), config.Options{}); len(problems) == 0 {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestNamespaces(t *testing.T) {
	data := []byte("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {isthmus.io/export: 'true'}}\n")
	if got := config.Namespaces(data); got["shop"]["isthmus.io/export"] != "true" {
		t.Errorf("got %v", got)
	}
	service := []byte("apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\nspec: {ports: [{port: 80}]}\n")
	in, problems := config.Decode("f.yaml", service, config.Options{Domain: "example.org", Namespaces: config.Namespaces(data)})
	if len(problems) > 0 || !in.Services[0].Export || in.Services[0].Hosts[0] != "cart.shop.svc.example.org" {
		t.Errorf("got %v, %v", in.Services, problems)
	}
}

// FuzzDecode wants no panic, no error that names no place, and the same answer twice.
func FuzzDecode(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.txtar")
	for _, file := range files {
		archive, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		for _, a := range archive.Files {
			if strings.HasSuffix(a.Name, ".yaml") {
				for doc := range bytes.SplitSeq(a.Data, []byte("---\n")) {
					f.Add(doc)
				}
			}
		}
	}
	f.Add(fmt.Appendf(nil, virtualService, "{}"))
	f.Add([]byte("--- {\n...\n%YAML 1.2\n---\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<16 {
			return
		}
		in, problems := config.Decode("f.yaml", data, config.Options{})
		_, again := config.Decode("f.yaml", data, config.Options{})
		if !reflect.DeepEqual(problems, again) {
			t.Errorf("two answers:\n%s\n%s", lines(problems), lines(again))
		}
		for _, p := range problems {
			if p.Reason == "" || p.Message == "" || p.Remedy == "" || !strings.HasPrefix(p.Object.Source, "f.yaml:") || strings.Contains(p.String(), "\n") {
				t.Errorf("incomplete: %q", p)
			}
		}
		snap := &mesh.Snapshot{VirtualServices: in.VirtualServices, DestinationRules: in.DestinationRules, Gateways: in.Gateways}
		refs.Check(snap)
	})
}

// TestPodTakesMeshTLS: pods with a sidecar do, gateways do not.
func TestPodTakesMeshTLS(t *testing.T) {
	for meta, want := range map[string]bool{
		`{name: p, labels: {sidecar.istio.io/inject: "true"}}`:                                                                 true,
		`{name: p, labels: {sidecar.istio.io/inject: "false"}}`:                                                                false,
		`{name: p, namespace: meshed}`:                                                                                         true,
		`{name: p, namespace: meshed, labels: {istio: ingressgateway}}`:                                                        false,
		`{name: p, labels: {sidecar.istio.io/inject: "true"}, annotations: {inject.istio.io/templates: gateway}}`:              false,
		`{name: p, namespace: meshed, labels: {istio: ingressgateway, security.istio.io/tlsMode: istio}}`:                      true,
		`{name: p, namespace: meshed, labels: {istio: pilot}, annotations: {inject.istio.io/templates: "sidecar,grpc-agent"}}`: true,
	} {
		data := []byte("apiVersion: v1\nkind: Pod\nmetadata: " + meta + "\nstatus: {podIP: 10.0.0.1}\n")
		in, problems := config.Decode("x.yaml", data, config.Options{Namespaces: map[string]map[string]string{"meshed": {"istio-injection": "enabled"}}})
		if len(problems) > 0 || len(in.Workloads) != 1 || in.Workloads[0].TLS != want {
			t.Errorf("%s: want %v; %v %v", meta, want, in.Workloads, problems)
		}
	}
}

// TestGatewayOfAnotherCluster: an endpoint at port 15443 of a .global host takes mesh TLS without saying so.
func TestGatewayOfAnotherCluster(t *testing.T) {
	const entry = `apiVersion: networking.istio.io/v1alpha3
kind: ServiceEntry
metadata: {name: httpbin-bar, namespace: foo}
spec:
  hosts: [httpbin.bar.global]
  location: MESH_INTERNAL
  ports: [{name: http1, number: 8000, protocol: http}]
  resolution: STATIC
  addresses: [127.255.0.2]
  endpoints: [{address: 172.31.0.21, network: external, ports: {http1: 15443}}]
`
	for _, c := range []struct {
		old, new string
		want     bool
	}{
		{"", "", true},
		{"network: external", "network: network2", true},
		{"resolution: STATIC", "resolution: DNS", true},
		{"hosts: [httpbin.bar.global]", "hosts: [httpbin.example.com]", false},
		{"MESH_INTERNAL", "MESH_EXTERNAL", false},
		{"http1: 15443", "http1: 8000", false},
	} {
		in, problems := config.Decode("x.yaml", []byte(strings.Replace(entry, c.old, c.new, 1)), config.Options{})
		if len(in.Services) != 1 || len(problems) > 0 {
			t.Fatalf("%s: %v", c.new, problems)
		}
		e := in.Services[0].Endpoints[0]
		if e.TLS != c.want || e.Ports[8000] == 0 || (e.Network == "") != (c.want && c.new == "network: network2") {
			t.Errorf("%s: got %+v", c.new, e)
		}
	}
}
