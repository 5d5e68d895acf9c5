package kube

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// kind is one kind that is read.
type kind struct {
	name     string // as users write it
	group    string
	resource string
	// said names it where its resource is read for two ends; empty: by the resource.
	said     string
	versions []string // that are understood, best first
	typed    func() runtime.Object
	// optional kinds may be missing: they are custom resources.
	optional bool
	// everywhere says that it is read in remote clusters, too.
	everywhere bool
	// root says that it is read in the root namespace only.
	root bool
	// labels and fields select on the server.
	labels, fields string
	// relabel says that an object is decoded anew when the labels of its namespace change.
	relabel bool
}

func (k *kind) gvr(version string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: k.group, Version: version, Resource: k.resource}
}

// name.group as users type it, for example virtualservices.networking.istio.io.
func (k *kind) fullName() string {
	if k.said != "" {
		return k.said
	}
	if k.group == "" {
		return k.resource
	}
	return k.resource + "." + k.group
}

// The kinds that others than the table itself look at.
const (
	kindNamespace = "Namespace"
	kindNode      = "Node"
	kindPod       = "Pod"
	kindService   = "Service"
	kindSlice     = "EndpointSlice"
	kindSecret    = "Secret"
	kindConfigMap = "ConfigMap"
	// kindCredential are the Secrets of gateways.
	kindCredential = "Credential"
	// kindAuthorities are ConfigMaps with certificate authorities of backends.
	kindAuthorities = "Authorities"
)

// RemoteSecretLabel marks the Secrets that hold the kubeconfigs of remote clusters, with value "true".
const RemoteSecretLabel = "istio/multiCluster"

const (
	groupGatewayAPI = "gateway.networking.k8s.io"
	groupIngress    = "networking.k8s.io"
)

var eastWestGateway = [2]string{"Gateway", "gateways"}

// otherSecrets keeps those Secrets away that cannot be credentials by their type; they are most.
const otherSecrets = "type!=kubernetes.io/service-account-token,type!=helm.sh/release.v1,type!=kubernetes.io/dockerconfigjson,type!=bootstrap.kubernetes.io/token"

// kinds lists what is read. EndpointSlices that the controller makes of Pods are not: readiness is taken from the Pod
// itself, which is told earlier, in one small change, and carries labels and identity besides. Secrets of gateways are
// those of the root namespace, or those of all.
func kinds(everySecret bool) []*kind {
	core := []*kind{
		{name: kindNamespace, resource: "namespaces", typed: func() runtime.Object { return &corev1.Namespace{} }, everywhere: true},
		{name: kindNode, resource: "nodes", typed: func() runtime.Object { return &corev1.Node{} }, everywhere: true},
		{name: kindPod, resource: "pods", typed: func() runtime.Object { return &corev1.Pod{} }, everywhere: true},
		{name: kindService, resource: "services", typed: func() runtime.Object { return &corev1.Service{} }, everywhere: true, relabel: true},
		{
			name: kindSlice, group: "discovery.k8s.io", resource: "endpointslices", typed: func() runtime.Object { return &discoveryv1.EndpointSlice{} }, everywhere: true,
			labels: discoveryv1.LabelManagedBy + "!=endpointslice-controller.k8s.io",
		},
		{name: kindSecret, resource: "secrets", typed: func() runtime.Object { return &corev1.Secret{} }, root: true, labels: RemoteSecretLabel + "=true"},
		{name: kindCredential, resource: "secrets", said: "secrets of gateways", typed: func() runtime.Object { return &corev1.Secret{} }, root: !everySecret, labels: RemoteSecretLabel + "!=true", fields: otherSecrets},
		{name: kindConfigMap, resource: "configmaps", typed: func() runtime.Object { return &corev1.ConfigMap{} }, root: true, fields: fields.OneTermEqualSelector("metadata.name", "istio").String()},
	}
	if everySecret { // authorities of backends; each namespace has its cluster's, which is none of them
		core = append(core, &kind{
			name: kindAuthorities, resource: "configmaps", said: "configmaps with authorities", typed: func() runtime.Object { return &corev1.ConfigMap{} },
			fields: fields.AndSelectors(fields.OneTermNotEqualSelector("metadata.name", "istio"), fields.OneTermNotEqualSelector("metadata.name", "kube-root-ca.crt"),
				fields.OneTermNotEqualSelector("metadata.name", "istio-ca-root-cert")).String(),
		})
	}
	for _, k := range core {
		k.versions = []string{"v1"}
	}
	for _, g := range []struct {
		group    string
		versions []string
		kinds    [][2]string
	}{
		{"networking.istio.io", []string{"v1", "v1beta1", "v1alpha3"}, [][2]string{
			{"VirtualService", "virtualservices"}, {"DestinationRule", "destinationrules"}, {"Gateway", "gateways"}, {"ServiceEntry", "serviceentries"},
			{"WorkloadEntry", "workloadentries"}, {"WorkloadGroup", "workloadgroups"}, {"Sidecar", "sidecars"}, {"EnvoyFilter", "envoyfilters"}, {"ProxyConfig", "proxyconfigs"},
		}},
		{"security.istio.io", []string{"v1", "v1beta1"}, [][2]string{
			{"PeerAuthentication", "peerauthentications"}, {"RequestAuthentication", "requestauthentications"}, {"AuthorizationPolicy", "authorizationpolicies"},
		}},
		{"telemetry.istio.io", []string{"v1", "v1alpha1"}, [][2]string{{"Telemetry", "telemetries"}}},
		{"extensions.istio.io", []string{"v1alpha1"}, [][2]string{{"WasmPlugin", "wasmplugins"}, {"TrafficExtension", "trafficextensions"}}},
		{"multicluster.x-k8s.io", []string{"v1beta1", "v1alpha1"}, [][2]string{{"ServiceExport", "serviceexports"}}},
		{groupGatewayAPI, []string{"v1", "v1beta1", "v1alpha3", "v1alpha2"}, [][2]string{
			eastWestGateway, {"GatewayClass", "gatewayclasses"}, {"HTTPRoute", "httproutes"}, {"GRPCRoute", "grpcroutes"}, {"TLSRoute", "tlsroutes"}, {"TCPRoute", "tcproutes"},
			{"ReferenceGrant", "referencegrants"}, {"BackendTLSPolicy", "backendtlspolicies"},
		}},
		{groupIngress, []string{"v1"}, [][2]string{{"Ingress", "ingresses"}, {"IngressClass", "ingressclasses"}}},
	} {
		for _, k := range g.kinds {
			core = append(core, &kind{
				name: k[0], group: g.group, resource: k[1], versions: g.versions, optional: true, relabel: k[0] == "ServiceEntry",
				everywhere: k == eastWestGateway && g.group == groupGatewayAPI, // it says where its network's gateway is
			})
		}
	}
	return core
}
