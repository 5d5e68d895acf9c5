package lint_test

import (
	"slices"
	"testing"

	networking "istio.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/isthmus-mesh/isthmus/discovery/lint"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func TestRoutes(t *testing.T) {
	for _, c := range []struct {
		name, spec string
		want       []string // fields
	}{
		{"a rule without a match hides all after it", "http: [{}, {match: [{uri: {prefix: /a}}]}, {}]", []string{"spec.http[1]", "spec.http[2]"}},
		{"narrow before wide", "http: [{match: [{uri: {exact: /a}}]}, {match: [{uri: {prefix: /a}}]}, {}]", nil},
		{"wide before narrow", "http: [{match: [{uri: {prefix: /a}}]}, {match: [{uri: {exact: /a/b}}]}, {match: [{uri: {prefix: /ab}}]}, {match: [{uri: {regex: /a.}}]}]", []string{"spec.http[1]", "spec.http[2]"}},
		{"prefix / is all", "http: [{match: [{uri: {prefix: /}}]}, {match: [{uri: {regex: x}}]}, {}]", []string{"spec.http[1]", "spec.http[2]"}},
		{"case", "http: [{match: [{uri: {prefix: /A}, ignoreUriCase: true}]}, {match: [{uri: {prefix: /aB}}]}, {match: [{uri: {prefix: /AB}, ignoreUriCase: true}]}]", []string{"spec.http[1]", "spec.http[2]"}},
		{"case of the later", "http: [{match: [{uri: {prefix: /a}}]}, {match: [{uri: {prefix: /a}, ignoreUriCase: true}]}]", nil},
		{"one match of two", "http: [{match: [{uri: {prefix: /a}}]}, {match: [{uri: {prefix: /b}}, {uri: {prefix: /ab}}]}]", []string{"spec.http[1].match[1]"}},
		{"regex", "http: [{match: [{uri: {regex: /a.*}}]}, {match: [{uri: {exact: /ab}}]}, {match: [{uri: {exact: /b/a}}]}, {match: [{uri: {regex: /a.*}}]}]", []string{"spec.http[1]", "spec.http[3]"}},
		{"headers", "http: [{match: [{headers: {a: {exact: x}}}]}, {match: [{headers: {a: {exact: x}, b: {prefix: yy}}}]}, {match: [{headers: {b: {prefix: yy}}}]}, {match: [{headers: {a: {exact: z}}}]}]", []string{"spec.http[1]"}},
		{"presence", "http: [{match: [{headers: {a: {}}}]}, {match: [{headers: {a: {exact: z}}}]}, {match: [{headers: {b: {}}}]}]", []string{"spec.http[1]"}},
		{"withoutHeaders", "http: [{match: [{withoutHeaders: {a: {exact: x}}}]}, {match: [{withoutHeaders: {a: {prefix: x}}}]}, {}]", []string{"spec.http[1]"}},
		{"without headers of the later only", "http: [{match: [{withoutHeaders: {a: {prefix: x}}}]}, {match: [{withoutHeaders: {a: {exact: x}}}]}]", nil},
		{"method, authority, scheme, query", "http: [{match: [{method: {exact: GET}}]}, {match: [{method: {exact: GET}, queryParams: {q: {exact: a}}}]}, {match: [{method: {exact: PUT}}]}, {match: [{authority: {prefix: a}}]}, {match: [{scheme: {exact: http}, authority: {exact: ab}}]}]", []string{"spec.http[1]", "spec.http[4]"}},
		{"port and source", "http: [{match: [{port: 80, sourceLabels: {app: a}}]}, {match: [{port: 80, sourceLabels: {app: a, v: b}, sourceNamespace: x}]}, {match: [{port: 80}]}, {match: [{port: 81, sourceLabels: {app: a}}]}]", []string{"spec.http[1]"}},
		{"gateways", "gateways: [mesh, a/edge], http: [{match: [{gateways: [a/edge]}]}, {match: [{uri: {prefix: /x}, gateways: [a/edge]}]}, {match: [{uri: {prefix: /x}, gateways: [mesh]}]}, {}]", []string{"spec.http[1]"}},
		{"a delegate may let through", "http: [{match: [{uri: {prefix: /a}}], delegate: {name: d}}, {match: [{uri: {prefix: /a/b}}]}]", nil},
		{"tls", "tls: [{match: [{sniHosts: ['*.a.com'], port: 443}]}, {match: [{sniHosts: [b.a.com], port: 443}]}, {match: [{sniHosts: [a.com], port: 443}]}, {match: [{sniHosts: [b.a.com]}]}]", []string{"spec.tls[1]"}},
		{"tcp", "tcp: [{match: [{port: 1}]}, {match: [{port: 1, destinationSubnets: [10.0.0.0/8]}]}, {}, {match: [{port: 2}]}]", []string{"spec.tcp[1]", "spec.tcp[3]"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			js, err := yaml.YAMLToJSON([]byte("{hosts: [x], " + c.spec + "}"))
			if err != nil {
				t.Fatal(err)
			}
			spec := &networking.VirtualService{}
			if err := protojson.Unmarshal(js, spec); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, p := range lint.Routes([]*mesh.VirtualService{{Object: mesh.ObjectRef{Kind: "VirtualService", Name: "x"}, Spec: spec}}) {
				if p.Reason != lint.ReasonUnreachable || p.Message == "" || p.Remedy == "" {
					t.Errorf("problem %+v", p)
				}
				got = append(got, p.Field)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("hidden: %q, want %q", got, c.want)
			}
		})
	}
}
