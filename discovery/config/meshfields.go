package config

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"

	meshconfig "istio.io/api/mesh/v1alpha1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
)

// meshUnhonoured are the fields of MeshConfig that change nothing here, unless they have their default, and what to do
// instead. The others are honoured: names and trust, exports and outbound policy, connections and retries, localities,
// paths, sniffing, authorizers, and what injection reads. Tracing is off, whatever enableTracing says.
var meshUnhonoured = map[string]string{
	"proxyListenPort": "leave it out: proxies listen at 15001", "proxyInboundListenPort": "leave it out: proxies listen at 15006",
	"proxyHttpPort": "leave it out: there is no HTTP proxy port",
	"ingressClass":  "write a Gateway and a VirtualService: Ingress is not read", "ingressService": "write a Gateway and a VirtualService: Ingress is not read",
	"ingressControllerMode": "write a Gateway and a VirtualService: Ingress is not read", "ingressSelector": "write a Gateway and a VirtualService: Ingress is not read",
	"accessLogFile": "add an access log by EnvoyFilter", "accessLogFormat": "add an access log by EnvoyFilter", "accessLogEncoding": "add an access log by EnvoyFilter",
	"enableEnvoyAccessLogService": "add an access log by EnvoyFilter", "disableEnvoyListenerLog": "leave it out: listeners have no log",
	"defaultProviders": "name providers where they are used", "discoverySelectors": "limit what proxies see by Sidecar or exportTo",
	"dnsRefreshRate": "leave it out: Envoy follows the records' own times", "inboundTrafficPolicy": "leave it out: ports without a Service are passed on",
	"inboundClusterStatName": "leave it out", "outboundClusterStatName": "leave it out", "certificates": "leave it out",
	"caCertificates": "give every cluster its roots, or join clusters by token", "ca": "leave it out: isthmusd signs certificates itself",
	"configSources": "give isthmusd its source in its own configuration", "meshMTLS": "leave it out: mutual TLS is TLS 1.3", "tlsDefaults": "set TLS where it is used",
	"serviceSettings": "limit what proxies see by exportTo", "serviceScopeConfigs": "limit what proxies see by exportTo",
	"verifyCertificateAtClient": "set caCertificates in the DestinationRule", "enableAutoMtls": "set tls mode DISABLE in DestinationRules", "zoneAwareLbSetting": "use localityLbSetting", "defaultTrafficPolicy": "write a DestinationRule in the root namespace",
	"serviceEntryVisibility": "limit what proxies see by exportTo", "hboneIdleTimeout": "leave it out: there is no HBONE",
}

// checkMesh reports what the mesh's configuration says that is not honoured.
func (o *object) checkMesh(raw []byte, defaults map[string]any, spec *meshconfig.MeshConfig) {
	var said map[string]any
	if json.Unmarshal(raw, &said) != nil {
		return // reported
	}
	for _, name := range slices.Sorted(maps.Keys(said)) {
		if remedy, ok := meshUnhonoured[name]; ok && !isDefault(said[name], defaults[name]) {
			o.Note("data.mesh."+name, written.ReasonUnsupported, "is not honoured: it has no effect", remedy)
		}
	}
	for i, p := range spec.GetExtensionProviders() {
		if p.GetEnvoyExtAuthzHttp() == nil && p.GetEnvoyExtAuthzGrpc() == nil {
			o.Note(fmt.Sprintf("data.mesh.extensionProviders[%d]", i), written.ReasonUnsupported, "provider "+written.Show(p.GetName())+" is not honoured: only envoyExtAuthzHttp and envoyExtAuthzGrpc are",
				"remove it so that nobody relies on it")
		}
	}
}

// isDefault reports whether a value says no more than if it were left out.
func isDefault(v, def any) bool {
	if n, ok := def.(int); ok {
		def = float64(n)
	}
	return v == nil || reflect.DeepEqual(v, def) || reflect.ValueOf(v).IsZero() && def == nil
}
