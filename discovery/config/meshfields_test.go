package config

import (
	"strings"
	"testing"

	meshconfig "istio.io/api/mesh/v1alpha1"
)

// TestMeshFields: every field is honoured or refused by name, and what the defaults say is refused never.
func TestMeshFields(t *testing.T) {
	honoured := strings.Fields(`connectTimeout tcpKeepalive protocolDetectionTimeout enableTracing defaultConfig
		outboundTrafficPolicy enablePrometheusMerge trustDomain trustDomainAliases defaultServiceExportTo defaultVirtualServiceExportTo defaultDestinationRuleExportTo
		rootNamespace localityLbSetting h2UpgradePolicy extensionProviders pathNormalization defaultHttpRetryPolicy`)
	known := map[string]bool{}
	for _, name := range honoured {
		known[name] = true
	}
	fields := (&meshconfig.MeshConfig{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		name := fields.Get(i).JSONName()
		if _, refused := meshUnhonoured[name]; refused == known[name] {
			t.Errorf("%s is honoured: %v, refused: %v", name, known[name], refused)
		}
	}
	for name := range meshUnhonoured {
		if fields.ByJSONName(name) == nil {
			t.Errorf("MeshConfig has no field %s", name)
		}
	}
	for text, want := range map[string]string{
		"accessLogFile: /dev/stdout":                "data.mesh.accessLogFile",
		"ingressClass: istio":                       "",
		"ingressClass: nginx":                       "data.mesh.ingressClass",
		"proxyListenPort: 15001":                    "",
		"proxyListenPort: 15002":                    "data.mesh.proxyListenPort",
		"enableAutoMtls: true":                      "",
		"enableAutoMtls: false":                     "data.mesh.enableAutoMtls",
		"inboundTrafficPolicy: {mode: PASSTHROUGH}": "",
		"accessLogFile: ''":                         "",
		"pathNormalization: {normalization: BASE}":  "",
		"extensionProviders: [{name: z, zipkin: {service: a.b, port: 1}}]":            "data.mesh.extensionProviders[0]",
		"extensionProviders: [{name: z, envoyExtAuthzGrpc: {service: a.b, port: 1}}]": "",
	} {
		doc := "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    " + text + "\n"
		_, problems := Decode("f.yaml", []byte(doc), Options{})
		got := ""
		for _, p := range problems {
			got += p.Field
		}
		if got != want {
			t.Errorf("%s: %v, want %q", text, problems, want)
		}
	}
}
