package gatewayapi

import (
	"encoding/json"
	"maps"
	"slices"
	"strconv"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

const (
	managedByLabel = "app.kubernetes.io/managed-by"
	managedBy      = "isthmus"
	classLabel     = "gateway.networking.k8s.io/gateway-class-name"
	healthPort     = 15021
)

// object is what is written as JSON.
type object = map[string]any

// deploy wants a ServiceAccount, a Deployment and a Service for a Gateway that names no Service of its own (GEP-1762).
// Injection makes the pod a gateway.
func (c *converter) deploy(g *gateway) {
	if !c.cfg.Deploy || g.named || g.invalid.kind != "" && !g.invalid.status {
		return
	}
	name := g.ref.Name + "-" + ClassName
	own := map[string]string{GatewayNameLabel: g.ref.Name, classLabel: string(g.obj.Spec.GatewayClassName), managedByLabel: managedBy}
	labels, annotations := map[string]string{}, map[string]string{}
	if i := g.obj.Spec.Infrastructure; i != nil {
		for k, v := range i.Labels {
			labels[string(k)] = string(v)
		}
		for k, v := range i.Annotations {
			annotations[string(k)] = string(v)
		}
	}
	maps.Copy(labels, own)
	want := func(apiGroup, version, resource, kind string, spec object) {
		meta := object{"name": name, "namespace": g.ref.Namespace, "labels": labels, "annotations": annotations}
		if g.obj.UID != "" {
			meta["ownerReferences"] = []any{object{"apiVersion": group + "/v1", "kind": "Gateway", "name": g.ref.Name, "uid": string(g.obj.UID)}}
		}
		out := object{"apiVersion": version, "kind": kind, "metadata": meta}
		if apiGroup != "" {
			out["apiVersion"] = apiGroup + "/" + version
		}
		if spec != nil {
			out["spec"] = spec
		}
		raw, err := json.Marshal(out)
		if err != nil { // maps of texts and numbers
			c.problem(g.ref, "", "Invalid", err.Error(), "")
			return
		}
		c.out.Objects = append(c.out.Objects, &mesh.WantedObject{Group: apiGroup, Version: version, Resource: resource, For: g.ref, Namespace: g.ref.Namespace, Name: name, JSON: raw})
	}
	pod := maps.Clone(labels)
	pod["sidecar.istio.io/inject"], pod["service.istio.io/canonical-name"] = "true", name
	onPod := maps.Clone(annotations)
	onPod["inject.istio.io/templates"] = "gateway"
	selector := object{GatewayNameLabel: g.ref.Name}
	want("", "v1", "serviceaccounts", "ServiceAccount", nil)
	want("apps", "v1", "deployments", "Deployment", object{
		"selector": object{"matchLabels": selector},
		"template": object{
			"metadata": object{"labels": pod, "annotations": onPod},
			"spec": object{
				"serviceAccountName": name,
				"securityContext":    object{"sysctls": []any{object{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}}},
				"containers":         []any{object{"name": "istio-proxy", "image": "auto", "ports": []any{object{"name": "http-health", "containerPort": healthPort, "protocol": "TCP"}}}},
			},
		},
	})
	want("", "v1", "services", "Service", object{"type": "LoadBalancer", "selector": selector, "ports": servicePorts(g.obj.Spec.Listeners)})
}

// servicePorts are those of the listeners, and that of the health check.
func servicePorts(listeners []gatewayv1.Listener) (out []any) {
	numbers := map[int]bool{healthPort: true}
	for _, l := range listeners {
		if l.Port > 0 && l.Port <= 65535 {
			numbers[int(l.Port)] = true
		}
	}
	for _, n := range slices.Sorted(maps.Keys(numbers)) {
		out = append(out, object{"name": "port-" + strconv.Itoa(n), "port": n, "targetPort": n, "protocol": "TCP"})
	}
	return out
}
