package config_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/written"
)

// TestStrictKinds: these kinds are checked strictly, those without an effect as well.
func TestStrictKinds(t *testing.T) {
	for _, c := range []struct{ kind, spec, want string }{
		{"security.istio.io/v1/AuthorizationPolicy", `{}`, ""},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{from: [{source: {principals: ["cluster.local/ns/a/sa/b"]}}], to: [{operation: {methods: [GET], paths: ["/info*", "/a/{*}/b/{**}"], ports: ["80"]}}], when: [{key: "request.headers[x]", values: [a]}]}]}`, ""},
		{"security.istio.io/v1beta1/AuthorizationPolicy", `{action: DENY}`, "spec.rules: Missing"},
		{"security.istio.io/v1/AuthorizationPolicy", `{action: CUSTOM, rules: [{}]}`, "spec.provider.name: Missing"},
		{"security.istio.io/v1/AuthorizationPolicy", `{action: REFUSE}`, "spec.action: InvalidValue"},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{from: [{source: {ipBlocks: ["10.0.0.0/33"]}}]}]}`, "spec.rules[0].from[0].source.ipBlocks[0]: InvalidValue"},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{from: [{source: {}}]}]}`, "spec.rules[0].from[0].source: Missing"},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{to: [{operation: {ports: ["http"]}}]}]}`, "spec.rules[0].to[0].operation.ports[0]: InvalidValue"},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{to: [{operation: {paths: ["/{**}/{**}"]}}]}]}`, "spec.rules[0].to[0].operation.paths[0]: InvalidValue"},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{when: [{key: "request.header[x]", values: [a]}]}]}`, "spec.rules[0].when[0].key: InvalidValue"},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{when: [{key: source.ip, notValues: [x]}]}]}`, "spec.rules[0].when[0].notValues[0]: InvalidValue"},
		{"security.istio.io/v1/AuthorizationPolicy", `{rule: []}`, "spec.rule: UnknownField"},
		{"security.istio.io/v1/AuthorizationPolicy", `{selector: {matchLabels: {a: b}}, targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: g}]}`, "spec.targetRefs: Conflict"},
		{"security.istio.io/v1/RequestAuthentication", `{jwtRules: [{issuer: a, jwksUri: "https://x/y"}]}`, ""},
		{"security.istio.io/v1/RequestAuthentication", `{jwtRules: [{jwksUri: "https://x/y"}]}`, "spec.jwtRules[0].issuer: Missing"},
		{"security.istio.io/v1/RequestAuthentication", `{jwtRules: [{issuer: a, jwksUri: "ftp://x"}]}`, "spec.jwtRules[0].jwksUri: InvalidValue"},
		{"networking.istio.io/v1/Sidecar", `{egress: [{bind: 127.0.0.1, hosts: ["./*"]}]}`, "spec.egress[0].port: Missing"},
		{"networking.istio.io/v1/Sidecar", `{ingress: [{port: {number: 9080, protocol: HTTP}, tls: {mode: SIMPLE}}]}`, "spec.ingress[0].tls: Unsupported"},
		{"security.istio.io/v1/AuthorizationPolicy", `{targetRefs: [{kind: Service, name: g}]}`, "spec.targetRefs[0].kind: Unsupported"},
		{"security.istio.io/v1/AuthorizationPolicy", `{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: g}]}`, ""},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{from: [{source: {trustDomains: [a.mesh], serviceAccounts: [b]}}]}]}`, ""},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{from: [{source: {serviceAccounts: ["b*"]}}]}]}`, "spec.rules[0].from[0].source.serviceAccounts[0]: InvalidValue"},
		{"security.istio.io/v1/AuthorizationPolicy", `{rules: [{when: [{key: "request.auth.claims[a][b]", values: [x]}, {key: source.trustDomain, values: [x]}]}]}`, ""},
		{"security.istio.io/v1/RequestAuthentication", `{jwtRules: [{issuer: a, jwks: "secret"}]}`, "spec.jwtRules[0].jwks: InvalidValue"},
		{"security.istio.io/v1/RequestAuthentication", `{jwtRules: [{issuer: a, jwksUri: "http://x/y", outputClaimToHeaders: [{header: "", claim: b}]}]}`, "spec.jwtRules[0].outputClaimToHeaders[0].header: InvalidValue"},
		{"networking.istio.io/v1/Sidecar", `{egress: [{hosts: ["reviews"]}]}`, "spec.egress[0].hosts[0]: InvalidValue"},
		{"networking.istio.io/v1/Sidecar", `{ingress: [{port: {number: 9080, protocol: HTTP}, defaultEndpoint: "10.0.0.1:8080"}]}`, "spec.ingress[0].defaultEndpoint: InvalidValue"},
		{"networking.istio.io/v1alpha3/EnvoyFilter", `{configPatches: [{applyTo: HTTP_FILTER, patch: {operation: INSERT_BEFORE, value: {name: x, typed_config: {"@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua"}}}}]}`, ""},
		{"networking.istio.io/v1alpha3/EnvoyFilter", `{configPatches: [{applyTo: HTTP_FILTER, patch: {operation: INSERT_BEFORE, value: {name: x, typed_config: {"@type": "type.googleapis.com/envoy.config.filter.http.lua.v2.Lua"}}}}]}`, "spec.configPatches[0].patch.value.typed_config: InvalidValue"},
		{"networking.istio.io/v1alpha3/EnvoyFilter", `{configPatches: [{applyTo: HTTP_FILTER, patch: {operation: MERGE}}]}`, "spec.configPatches[0].patch.value: Missing"},
		{"networking.istio.io/v1alpha3/EnvoyFilter", `{configPatches: [{patch: {operation: REMOVE}}]}`, "spec.configPatches[0].applyTo: Missing"},
		{"networking.istio.io/v1alpha3/EnvoyFilter", `{configPatches: [{applyTo: BOOTSTRAP, patch: {operation: MERGE, value: {a: b}}}]}`, "spec.configPatches[0].applyTo: Unsupported"},
		{"networking.istio.io/v1alpha3/EnvoyFilter", `{configPatches: [{applyTo: CLUSTER, match: {context: WAYPOINT}, patch: {operation: REMOVE}}]}`, "spec.configPatches[0].match: Unsupported"},
		{"networking.istio.io/v1alpha3/EnvoyFilter", `{configPatches: [{applyTo: CLUSTER, match: {proxy: {proxyVersion: "("}}, patch: {operation: REMOVE}}]}`, "spec.configPatches[0].match.proxy.proxyVersion: InvalidValue"},
		{"networking.istio.io/v1alpha3/EnvoyFilter", `{configPatches: [{applyTo: LISTENER, patch: {operation: ADD, value: {filter_chains: [{filters: [{typed_config: {"@type": type.googleapis.com/envoy.config.filter.network.tcp_proxy.v2.TcpProxy}}]}]}}}]}`, "spec.configPatches[0].patch.value.filter_chains[0].filters[0].typed_config: InvalidValue"},
		{"rbac.istio.io/v1alpha1/ServiceRole", `{rules: [{services: ["*"]}]}`, "kind: Unsupported"},
		{"rbac.istio.io/v1alpha1/ClusterRbacConfig", `{mode: ON}`, "kind: Unsupported"},
		{"authentication.istio.io/v1alpha1/MeshPolicy", `{peers: [{mtls: {}}]}`, "kind: Unsupported"},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], http: [{headers: {request: {set: {x: "%REQ(a):5% %% %START_TIME(%s)% %PROTOCOL%"}}}, route: [{destination: {host: a.b}}]}]}`, ""},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], http: [{headers: {request: {set: {x: "100%"}}}, route: [{destination: {host: a.b}}]}]}`, "spec.http[0].headers.request.set[x]: InvalidValue"},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], http: [{headers: {response: {add: {x: "%BOGUS%"}}}, route: [{destination: {host: a.b}}]}]}`, "spec.http[0].headers.response.add[x]: InvalidValue"},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], http: [{route: [{destination: {host: a.b}, headers: {request: {add: {x: "%REQ%"}}}}]}]}`, "spec.http[0].route[0].headers.request.add[x]: InvalidValue"},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], http: [{timeout: 1ns, route: [{destination: {host: a.b}}]}]}`, "spec.http[0].timeout: InvalidValue"},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], http: [{timeout: 0s, route: [{destination: {host: a.b}}]}]}`, ""},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], http: [{redirect: {uri: "/a\nb"}}]}`, "spec.http[0].redirect.uri: InvalidValue"},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], http: [{rewrite: {uriRegexRewrite: {match: "a", rewrite: '\1'}}, route: [{destination: {host: a.b}}]}]}`, "spec.http[0].rewrite.uriRegexRewrite.rewrite: InvalidValue"},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], http: [{rewrite: {uriRegexRewrite: {match: "(a)", rewrite: '\1\0'}}, route: [{destination: {host: a.b}}]}]}`, ""},
		{"networking.istio.io/v1alpha3/VirtualService", `{hosts: [a.b], http: [{fault: {abort: {percent: 10, httpStatus: 500}}, websocketUpgrade: true, appendHeaders: {x: some}, removeResponseHeaders: [z], route: [{destination: {host: a.b}}]}]}`, ""},
		{"networking.istio.io/v1/DestinationRule", `{host: a.b, trafficPolicy: {loadBalancer: {simple: 99}}}`, "spec.trafficPolicy.loadBalancer.simple: InvalidValue"},
		{"networking.istio.io/v1/DestinationRule", `{host: a.b, trafficPolicy: {loadBalancer: {simple: 2}}}`, ""},
		{"networking.istio.io/v1/DestinationRule", `{host: a.b, trafficPolicy: {tls: {mode: SIMPLE, sni: "a b"}}}`, "spec.trafficPolicy.tls.sni: InvalidValue"},
		{"security.istio.io/v1/PeerAuthentication", `{mtls: {mode: 9}}`, "spec.mtls.mode: InvalidValue"},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], gateways: [g], http: [{match: [{headers: {"@request.auth.claims[a][b]": {exact: x}, "@request.auth.claims.a.b": {}}, withoutHeaders: {"@request.auth.claims.c": {regex: "x.*"}}}], route: [{destination: {host: a.b}}]}]}`, ""},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], gateways: [g], http: [{match: [{headers: {"@request.auth.claim.a": {exact: x}}}], route: [{destination: {host: a.b}}]}]}`, "spec.http[0].match[0].headers[@request.auth.claim.a]: InvalidValue"},
		{"networking.istio.io/v1/VirtualService", `{hosts: [a.b], gateways: [g], http: [{match: [{headers: {"@request.auth.claims": {exact: x}}}], route: [{destination: {host: a.b}}]}]}`, "spec.http[0].match[0].headers[@request.auth.claims]: InvalidValue"},
		{"networking.istio.io/v1/ServiceEntry", `{hosts: [a.example.com], resolution: DYNAMIC_DNS, ports: [{number: 80, name: http, protocol: HTTP}]}`, "spec.hosts[0]: Conflict"},
		{"networking.istio.io/v1/ServiceEntry", `{hosts: ["*.example.com"], resolution: DYNAMIC_DNS, ports: [{number: 80, name: tcp, protocol: TCP}]}`, "spec.ports[0].protocol: Conflict"},
		{"networking.istio.io/v1/ServiceEntry", `{hosts: ["*.example.com"], resolution: DYNAMIC_DNS, ports: [{number: 80, name: http, protocol: HTTP}], endpoints: [{address: 1.2.3.4}]}`, "spec.endpoints: Unsupported"},
		{"networking.istio.io/v1/ServiceEntry", `{hosts: ["*.example.com"], resolution: DYNAMIC_DNS, ports: [{number: 80, name: http, protocol: HTTP}, {number: 443, name: tls, protocol: TLS}]}`, ""},
		{"networking.istio.io/v1/VirtualService", `{hosts: ["*.example.com"], http: [{route: [{destination: {host: "*.example.com"}}]}]}`, ""},
		{"networking.istio.io/v1/VirtualService", `{hosts: ["*.example.com"], http: [{route: [{destination: {host: "*"}}]}]}`, "spec.http[0].route[0].destination.host: InvalidValue"},
		{"networking.istio.io/v1beta1/ProxyConfig", `{concurrency: 2, environmentVariables: {A: b}}`, ""},
		{"networking.istio.io/v1beta1/ProxyConfig", `{image: {imageType: debug}}`, "spec.image: Unsupported"},
		{"networking.istio.io/v1beta1/ProxyConfig", `{environmentVariables: {"a b": c}}`, "spec.environmentVariables[a b]: InvalidValue"},
		{"networking.istio.io/v1beta1/ProxyConfig", `{concurrency: many}`, "spec.concurrency: InvalidValue"},
		{"networking.istio.io/v1/WorkloadGroup", `{template: {serviceAccount: a, ports: {http: 8080}}, probe: {httpGet: {port: 8080}}}`, "Unsupported"},
		{"networking.istio.io/v1/WorkloadGroup", `{metadata: {labels: {a: b}}}`, "spec.template: Missing"},
		{"networking.istio.io/v1/WorkloadGroup", `{template: {ports: {http: 70000}}}`, "spec.template.ports[http]: InvalidValue"},
		{"telemetry.istio.io/v1/Telemetry", `{accessLogging: [{providers: [{name: envoy}]}]}`, "Unsupported"},
		{"telemetry.istio.io/v1/Telemetry", `{accessLoging: []}`, "spec.accessLoging: UnknownField"},
		{"extensions.istio.io/v1alpha1/WasmPlugin", `{url: "oci://x/y"}`, "Unsupported"},
	} {
		cut := strings.LastIndex(c.kind, "/")
		doc := fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: x}\nspec: %s\n", c.kind[:cut], c.kind[cut+1:], c.spec)
		_, problems := config.Decode("f.yaml", []byte(doc), config.Options{})
		if c.want == "" && len(problems) == 0 {
			continue
		}
		if n := len(problems); n > 1 && problems[n-1].Reason == written.ReasonClosed { // its effect, beside what is wrong
			problems = problems[:n-1]
		}
		if c.want == "" || len(problems) != 1 || !strings.Contains(problems[0].Field+": "+problems[0].Reason, c.want) {
			t.Errorf("%s %s: got %v, want %s", c.kind, c.spec, problems, c.want)
		}
	}
}
