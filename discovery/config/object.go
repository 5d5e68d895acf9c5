package config

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// maxLists bounds how deep lists may stand in lists.
const maxLists = 3

// object is one API object while it is decoded.
type object struct {
	d      *decoder
	doc    *document
	prefix string // path of the object in its document, "" or "items[3]."
	raw    []byte // JSON
	typed  any    // pointer to the Kubernetes type, instead of raw
	group  string
	ref    mesh.ObjectRef
	meta   metav1.ObjectMeta
	labels map[string]string // of a Namespace
	failed bool
	// lenient makes fields that a message does not have a Problem that the object outlives.
	lenient bool
}

// header is what every API object has.
type header struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Name      string            `json:"name"`
		Namespace string            `json:"namespace"`
		Labels    map[string]string `json:"labels"`
	} `json:"metadata"`
	Items []json.RawMessage `json:"items"`
}

// add registers the object in raw, or those in a list. apiVersion and kind say what the items of a typed list are.
func (d *decoder) add(doc *document, raw []byte, prefix, itemKind string, depth int) {
	if string(raw) == "null" {
		return
	}
	line := doc.line
	if prefix != "" {
		if n := doc.lineOf(strings.TrimSuffix(prefix, ".")); n > 0 {
			line = n
		}
	}
	var h header
	err := json.Unmarshal(raw, &h)
	if itemKind != "" && h.Kind == "" {
		h.APIVersion, h.Kind, _ = cutLast(itemKind, "/")
	}
	ref := mesh.ObjectRef{Kind: oneLine(h.Kind), Namespace: oneLine(h.Metadata.Namespace), Name: oneLine(h.Metadata.Name), Source: d.at(line)}
	if h.APIVersion == "" || h.Kind == "" {
		what := "apiVersion and kind are missing"
		if err != nil && raw[0] != '{' {
			what = "the document is not a mapping"
		} else if err != nil {
			what = typeMessage(err)
		}
		d.problems = append(d.problems, mesh.Problem{Object: d.document(line), Reason: ReasonNotAnObject, Message: what,
			Remedy: "write a Kubernetes object, or move the file out of the folder"})
		return
	}
	group, _, ok := strings.Cut(h.APIVersion, "/")
	if !ok {
		group = ""
	}
	if ref.Namespace == "" && handled(group) && h.Kind != "Namespace" {
		ref.Namespace = "default"
	}
	if kind, isList := strings.CutSuffix(h.Kind, "List"); isList && err == nil && handled(group) {
		if depth == maxLists {
			d.problems = append(d.problems, mesh.Problem{Object: ref, Reason: ReasonInvalidValue, Message: "lists stand too deep in lists", Remedy: "write the objects as documents of their own"})
			return
		}
		item := ""
		if kind != "" {
			item = h.APIVersion + "/" + kind
		}
		for i, it := range h.Items {
			d.add(doc, it, fmt.Sprintf("%sitems[%d].", prefix, i), item, depth+1)
		}
		return
	}
	d.objects = append(d.objects, &object{d: d, doc: doc, prefix: prefix, raw: raw, group: group, ref: ref, labels: h.Metadata.Labels})
	_, version, _ := cutLast("/"+h.APIVersion, "/")
	d.objects[len(d.objects)-1].checkVersion(version)
}

// cutLast cuts s at the last sep.
func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// handled reports whether this package knows the kinds of an API group.
func handled(group string) bool { return versions(group) != nil }

// versions lists those of a group whose kinds are decoded.
func versions(group string) []string {
	switch group {
	case "", "discovery.k8s.io":
		return []string{"v1"}
	case "networking.istio.io":
		return []string{"v1", "v1beta1", "v1alpha3"}
	case "security.istio.io":
		return []string{"v1", "v1beta1"}
	case "multicluster.x-k8s.io":
		return []string{"v1beta1", "v1alpha1"}
	}
	return nil
}

// Kinds of the handled groups: those decoded, those that say nothing to the mesh, and those not honoured.
func kinds(group string) (decoded, ignored, unsupported []string) {
	switch group {
	case "":
		return []string{"Service", "Pod", "Namespace", "Endpoints", "ConfigMap", "Secret"}, []string{"Binding", "ComponentStatus", "Event", "LimitRange", "Node",
			"PersistentVolume", "PersistentVolumeClaim", "PodTemplate", "ReplicationController", "ResourceQuota", "ServiceAccount"}, nil
	case "discovery.k8s.io":
		return []string{"EndpointSlice"}, nil, nil
	case "networking.istio.io":
		return []string{"ServiceEntry", "WorkloadEntry", "VirtualService", "DestinationRule", "Gateway", "Sidecar", "EnvoyFilter"}, nil,
			[]string{"ProxyConfig", "WorkloadGroup"}
	case "security.istio.io":
		return []string{"PeerAuthentication", "AuthorizationPolicy", "RequestAuthentication"}, nil, nil
	case "multicluster.x-k8s.io":
		return []string{"ServiceExport"}, []string{"ServiceImport"}, nil
	case "gateway.networking.k8s.io", "telemetry.istio.io", "extensions.istio.io":
		return nil, nil, nil
	}
	return nil, nil, nil
}

// checkVersion refuses versions that the object's group never had.
func (o *object) checkVersion(version string) {
	if v := versions(o.group); v != nil && !slices.Contains(v, version) {
		if _, ignored, _ := kinds(o.group); !slices.Contains(ignored, o.ref.Kind) {
			o.reject("apiVersion", ReasonUnknownKind, fmt.Sprintf("version %s of %s is not known", show(version), o.ref.Kind), "use version "+v[0])
		}
	}
}

// decode adds what the object says to the decoder's Input.
func (o *object) decode() {
	if o.failed {
		return
	}
	if o.eastWest() {
		if o.ref.Kind += "." + o.group; o.named() {
			o.eastWestGateway()
		}
		return
	}
	if o.d.opts.Remote && o.group == groupGatewayAPI {
		return // routes and other gateways are said in the cluster of the control plane
	}
	if !o.known() || !o.named() {
		return
	}
	switch o.ref.Kind {
	case "Service":
		o.service()
	case "Pod":
		o.pod()
	case "Namespace":
		o.namespace()
	case "ConfigMap":
		o.configMap()
	case "Secret":
		o.secret()
	case "Endpoints":
		o.endpoints()
	case "EndpointSlice":
		o.endpointSlice()
	case "ServiceEntry":
		o.serviceEntry()
	case "WorkloadEntry":
		o.workloadEntry()
	case "VirtualService":
		o.virtualService()
	case "DestinationRule":
		o.destinationRule()
	case "Gateway":
		o.gateway()
	case "Sidecar":
		o.sidecar()
	case "PeerAuthentication":
		o.peerAuthentication()
	case "AuthorizationPolicy":
		o.authorizationPolicy()
	case "RequestAuthentication":
		o.requestAuthentication()
	case "EnvoyFilter":
		o.envoyFilter()
	case "ServiceExport":
		o.serviceExport()
	}
}

// known reports whether the object's kind is decoded, and says what is wrong with it if it looks as if it should be.
func (o *object) known() bool {
	decoded, ignored, unsupported := kinds(o.group)
	kind := o.ref.Kind
	switch {
	case slices.Contains(decoded, kind):
		return true
	case slices.Contains(ignored, kind):
	case slices.Contains(unsupported, kind), o.group == "gateway.networking.k8s.io", o.group == "telemetry.istio.io", o.group == "extensions.istio.io":
		o.unhonoured()
	case retired[o.group] != "":
		o.reject("kind", ReasonUnsupported, o.ref.Kind+" is a kind of Istio's first policy API, which no Istio since 1.6 reads", retired[o.group])
	case handled(o.group):
		remedy := "correct the spelling or remove the object"
		if near := closest(kind, append(slices.Clone(decoded), ignored...)); near != "" {
			remedy = "did you mean " + near + "?"
		}
		o.reject("kind", ReasonUnknownKind, "the API group "+show(cmp.Or(o.group, "core"))+" has no kind "+show(kind), remedy)
	}
	return false
}

// rewritesGlobal reports whether an EnvoyFilter is Istio's for gateways of several control planes, which turns names
// below .global into local ones by a filter that Envoy no longer has, and does nothing else.
func (o *object) rewritesGlobal() bool {
	var f struct {
		Spec struct {
			Filters []struct {
				Name string `json:"filterName"`
			} `json:"filters"`
			Patches []struct {
				Patch struct {
					Value struct {
						Name string `json:"name"`
					} `json:"value"`
				} `json:"patch"`
			} `json:"configPatches"`
		} `json:"spec"`
	}
	if json.Unmarshal(o.raw, &f) != nil {
		return false
	}
	var names []string
	for _, x := range f.Spec.Filters {
		names = append(names, x.Name)
	}
	for _, x := range f.Spec.Patches {
		names = append(names, x.Patch.Value.Name)
	}
	if len(names) == 0 { // an API server with Istio's definition of the kind keeps nothing of the old fields
		return o.ref.Name == "istio-multicluster-ingressgateway"
	}
	return !slices.ContainsFunc(names, func(n string) bool { return !strings.HasSuffix(n, "network.tcp_cluster_rewrite") })
}

// named checks and defaults name and namespace, and refuses what the file already has.
func (o *object) named() bool {
	if o.ref.Name == "" {
		o.reject("metadata.name", ReasonMissing, "the object has no name", "give it one")
		return false
	}
	if e := validation.IsDNS1123Subdomain(o.ref.Name); len(e) > 0 {
		o.reject("metadata.name", ReasonInvalidValue, show(o.ref.Name)+" is not a name", rule(e))
		return false
	}
	if o.ref.Kind == "Namespace" {
		o.ref.Namespace = ""
	}
	if e := validation.IsDNS1123Label(o.ref.Namespace); o.ref.Namespace != "" && len(e) > 0 {
		o.reject("metadata.namespace", ReasonInvalidValue, show(o.ref.Namespace)+" is not a namespace", rule(e))
		return false
	}
	if first, twice := o.d.seen[o.ref.String()]; twice {
		o.reject("", ReasonDuplicate, "is also declared at "+first+", which is used", "remove one of the two")
		return false
	}
	o.d.seen[o.ref.String()] = o.ref.Source
	return true
}

// reject reports an error: the object is left out.
func (o *object) reject(field, reason, message, remedy string) {
	o.failed = true
	o.note(field, reason, message, remedy)
}

// invalid rejects a value.
func (o *object) invalid(field, message, remedy string) {
	o.reject(field, ReasonInvalidValue, message, remedy)
}

// unsupported reports a field that is understood and not honoured, and what that means for the object.
func (o *object) unsupported(field, consequence string) {
	o.note(field, ReasonUnsupported, "is not supported: "+consequence, "remove the field so that nobody relies on it")
}

// note reports a Problem; the object is used nevertheless. The message begins with the line of the field.
func (o *object) note(field, reason, message, remedy string) {
	if field != "" && o.doc != nil {
		if n := o.doc.lineOf(o.prefix + field); n > 0 {
			message = fmt.Sprintf("line %d: %s", n, message)
		}
	}
	o.d.problems = append(o.d.problems, mesh.Problem{Object: o.ref, Field: oneLine(field), Reason: reason, Message: message, Remedy: remedy})
}

// host writes a host out in full: a name without a dot is a Service of the object's namespace.
func (o *object) host(h string) string {
	h = strings.TrimSuffix(strings.ToLower(h), ".")
	if h == "" || strings.ContainsAny(h, ".*:") {
		return mesh.FromClusterSet(h) // rules on either name are for both
	}
	return h + "." + o.ref.Namespace + ".svc." + o.d.opts.Domain
}

// show quotes a user's value in a message.
func show(s string) string { return fmt.Sprintf("%q", clip(s, 80)) }
