package config

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	meshconfig "istio.io/api/mesh/v1alpha1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// The ConfigMap with the mesh's configuration and its keys, as Istio has them.
const (
	meshConfigMap   = "istio"
	keyMesh         = "mesh"
	keyMeshNetworks = "meshNetworks"
	rootNamespace   = "istio-system"
)

// maxEmbedded bounds the YAML in a key of a ConfigMap; Kubernetes bounds all keys together to 1 MiB.
const maxEmbedded = 1 << 20

// configMap takes the mesh's own configuration; other ConfigMaps say nothing to the mesh.
func (o *object) configMap() {
	root := cmp.Or(o.d.opts.RootNamespace, rootNamespace)
	if o.Ref.Name != meshConfigMap || o.Ref.Namespace != root {
		o.authorities()
		return
	}
	var c corev1.ConfigMap
	if !o.Into(&c) {
		return
	}
	o.Lenient = true
	if text, ok := c.Data[keyMesh]; ok {
		o.meshConfig(root, text)
	}
	o.Failed = false // the two keys stand for themselves
	if text, ok := c.Data[keyMeshNetworks]; ok {
		o.meshNetworks(text)
	}
}

// embedded turns the YAML of a key into JSON.
func (o *object) embedded(key, text string) ([]byte, bool) {
	if len(text) > maxEmbedded {
		o.Invalid("data."+key, fmt.Sprintf("it has %d bytes", len(text)), "shorten it")
		return nil, false
	}
	raw, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		o.Reject("data."+key, written.ReasonInvalidYAML, written.Clip(strings.Join(strings.Fields(strings.TrimPrefix(err.Error(), "error converting YAML to JSON: ")), " "), 200), "correct the YAML")
		return nil, false
	}
	if string(raw) == "null" {
		raw = []byte("{}")
	}
	return raw, true
}

func (o *object) meshConfig(root, text string) {
	raw, ok := o.embedded(keyMesh, text)
	if !ok {
		return
	}
	domain := cmp.Or(string(o.d.opts.TrustDomain), "cluster.local")
	spec := &meshconfig.MeshConfig{}
	if !o.Message("data."+keyMesh, raw, meshDefaults(root, domain), spec) {
		return
	}
	o.checkMesh(raw, meshDefaults(root, domain), spec)
	if spec.TrustDomain != domain && o.d.opts.TrustDomain != "" {
		o.Note("data.mesh.trustDomain", written.ReasonConflict, written.Show(spec.TrustDomain)+" is not the trust domain of this control plane, "+domain+", which is used", "write "+domain+", or set trustDomain in the configuration of isthmusd")
		spec.TrustDomain = domain
	}
	if spec.RootNamespace != root {
		o.Note("data.mesh.rootNamespace", written.ReasonConflict, written.Show(spec.RootNamespace)+" is not the namespace of this control plane, "+root+", which is used", "write "+root)
		spec.RootNamespace = root
	}
	o.d.in.MeshConfigs = append(o.d.in.MeshConfigs, &mesh.MeshConfig{Object: o.Ref, Spec: spec})
}

// meshDefaults are Istio's defaults (MeshConfig and ProxyConfig of its reference), in protobuf's JSON.
func meshDefaults(root, domain string) map[string]any {
	all := []any{"*"}
	return map[string]any{
		"proxyListenPort": 15001, "proxyInboundListenPort": 15006, "connectTimeout": "10s", "protocolDetectionTimeout": "0s",
		"ingressClass": "istio", "ingressService": "istio-ingressgateway", "ingressControllerMode": "STRICT",
		"enableTracing": true, "enablePrometheusMerge": true, "enableAutoMtls": true, "dnsRefreshRate": "60s",
		"outboundTrafficPolicy": map[string]any{"mode": "ALLOW_ANY"}, "inboundTrafficPolicy": map[string]any{"mode": "PASSTHROUGH"},
		"trustDomain": domain, "rootNamespace": root, "localityLbSetting": map[string]any{"enabled": true},
		"defaultServiceExportTo": all, "defaultVirtualServiceExportTo": all, "defaultDestinationRuleExportTo": all,
		"defaultConfig": map[string]any{
			"configPath": "./etc/istio/proxy", "binaryPath": "/usr/local/bin/envoy", "serviceCluster": "istio-proxy",
			"drainDuration": "45s", "terminationDrainDuration": "5s", "discoveryAddress": "istiod." + root + ".svc:15012",
			"proxyAdminPort": 15000, "controlPlaneAuthPolicy": "MUTUAL_TLS", "statNameLength": 189, "statusPort": 15020,
		},
	}
}

func (o *object) meshNetworks(text string) {
	raw, ok := o.embedded(keyMeshNetworks, text)
	if !ok {
		return
	}
	spec := &meshconfig.MeshNetworks{}
	if !o.Message("data."+keyMeshNetworks, raw, nil, spec) {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(spec.Networks)) {
		at := "data.meshNetworks.networks[" + name + "]"
		n := &mesh.Network{ID: mesh.NetworkID(name), Object: o.Ref}
		for i, e := range spec.Networks[name].GetEndpoints() {
			o.networkEndpoints(fmt.Sprintf("%s.endpoints[%d]", at, i), n, e)
		}
		for i, g := range spec.Networks[name].GetGateways() {
			if gw, ok := o.networkGateway(fmt.Sprintf("%s.gateways[%d]", at, i), n.ID, g); ok {
				n.Gateways = append(n.Gateways, gw...)
			}
		}
		o.d.in.Networks = append(o.d.in.Networks, n)
	}
}

func (o *object) networkEndpoints(at string, n *mesh.Network, e *meshconfig.Network_NetworkEndpoints) {
	switch x := e.GetNe().(type) {
	case *meshconfig.Network_NetworkEndpoints_FromRegistry:
		if x.FromRegistry == "" {
			o.Note(at+".fromRegistry", written.ReasonMissing, "names no cluster; it is left out", "name a cluster")
			return
		}
		n.Registries = append(n.Registries, mesh.ClusterID(x.FromRegistry))
	case *meshconfig.Network_NetworkEndpoints_FromCidr:
		p, err := netip.ParsePrefix(x.FromCidr)
		if err != nil {
			o.Note(at+".fromCidr", written.ReasonInvalidValue, written.Show(x.FromCidr)+" is not an address range; it is left out", "write for example 10.1.0.0/16")
			return
		}
		n.CIDRs = append(n.CIDRs, p.Masked())
	default:
		o.Note(at, written.ReasonMissing, "says neither fromRegistry nor fromCidr; it is left out", "write one of the two")
	}
}

// networkGateway reads one gateway; that of a Service has the addresses that the Service has.
func (o *object) networkGateway(at string, network mesh.NetworkID, g *meshconfig.Network_IstioNetworkGateway) ([]mesh.NetworkGateway, bool) {
	port := cmp.Or(g.GetPort(), gatewayPort)
	if port > 65535 {
		o.Note(at+".port", written.ReasonInvalidValue, fmt.Sprintf("%d is not a port; the gateway is left out", port), "write a number from 1 to 65535")
		return nil, false
	}
	if host := g.GetRegistryServiceName(); host != "" {
		var out []mesh.NetworkGateway
		for _, a := range o.d.opts.External[strings.TrimSuffix(strings.ToLower(host), ".")] {
			out = append(out, mesh.NetworkGateway{Object: o.Ref, Address: a, Port: port, Cluster: o.d.opts.Local, Locality: g.GetLocality()})
		}
		if len(out) == 0 {
			o.Note(at+".registryServiceName", ReasonNoAddress, "the Service "+written.Show(host)+" has no address outside of its cluster; the gateway is left out",
				"wait for its load balancer, write the address instead, or label the Service "+labelNetwork+": "+string(network))
		}
		return out, true
	}
	address := strings.ToLower(g.GetAddress())
	a, err := netip.ParseAddr(address)
	switch {
	case err == nil && a.IsUnspecified(), address == "":
		// Istio's documents write 0.0.0.0 for a gateway that is not known yet.
		o.Note(at+".address", ReasonNoAddress, written.Show(address)+" is not an address that can be reached; the gateway is left out", "write the gateway's address when it is known")
		return nil, false
	case err == nil && a.Zone() == "":
		address = a.Unmap().String()
	case !isHostName(address):
		o.Note(at+".address", written.ReasonInvalidValue, written.Show(address)+" is neither an IP address nor a host name; the gateway is left out", "correct it")
		return nil, false
	}
	return []mesh.NetworkGateway{{Object: o.Ref, Address: address, Port: port, Locality: g.GetLocality()}}, true
}
