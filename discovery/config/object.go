package config

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/isthmus-mesh/isthmus/discovery/config/security"
	"github.com/isthmus-mesh/isthmus/discovery/config/traffic"
	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// maxLists bounds how deep lists may stand in lists.
const maxLists = 3

// object is one API object while it is decoded.
type object struct {
	*written.Object
	d *decoder
}

// object gives what stands somewhere its decoder.
func (d *decoder) object(w written.Object) *object {
	w.Domain, w.Problems = d.opts.Domain, &d.problems
	return &object{&w, d}
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
func (d *decoder) add(doc *written.Document, raw []byte, prefix, itemKind string, depth int) {
	if string(raw) == "null" {
		return
	}
	line := doc.Line
	if prefix != "" {
		if n := doc.LineOf(strings.TrimSuffix(prefix, ".")); n > 0 {
			line = n
		}
	}
	var h header
	err := json.Unmarshal(raw, &h)
	if itemKind != "" && h.Kind == "" {
		h.APIVersion, h.Kind, _ = written.CutLast(itemKind, "/")
	}
	ref := mesh.ObjectRef{Kind: written.OneLine(h.Kind), Namespace: written.OneLine(h.Metadata.Namespace), Name: written.OneLine(h.Metadata.Name), Source: d.at(line)}
	if h.APIVersion == "" || h.Kind == "" {
		what := "apiVersion and kind are missing"
		if err != nil && raw[0] != '{' {
			what = "the document is not a mapping"
		} else if err != nil {
			what = written.TypeMessage(err)
		}
		d.problems = append(d.problems, mesh.Problem{Object: d.document(line), Reason: written.ReasonNotAnObject, Message: what,
			Remedy: "write a Kubernetes object, or move the file out of the folder"})
		return
	}
	group, _, ok := strings.Cut(h.APIVersion, "/")
	if !ok {
		group = ""
	}
	if ref.Namespace == "" && handled(group) && !slices.Contains(clusterScoped, h.Kind) {
		ref.Namespace = "default"
	}
	if kind, isList := strings.CutSuffix(h.Kind, "List"); isList && err == nil && handled(group) {
		if depth == maxLists {
			d.problems = append(d.problems, mesh.Problem{Object: ref, Reason: written.ReasonInvalidValue, Message: "lists stand too deep in lists", Remedy: "write the objects as documents of their own"})
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
	d.objects = append(d.objects, d.object(written.Object{Doc: doc, Prefix: prefix, Raw: raw, Group: group, Ref: ref, Labels: h.Metadata.Labels}))
	_, version, _ := written.CutLast("/"+h.APIVersion, "/")
	d.objects[len(d.objects)-1].checkVersion(version)
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
	case groupGatewayAPI:
		return []string{"v1", "v1beta1", "v1alpha3", "v1alpha2"}
	case groupIngress:
		return []string{"v1"}
	}
	return nil
}

// kinds of the handled groups: those decoded, those that say nothing to the mesh, and those not honoured.
func kinds(group string) (decoded, ignored, unsupported []string) {
	switch group {
	case "":
		return []string{"Service", "Pod", "Namespace", "Endpoints", "ConfigMap", "Secret"}, []string{"Binding", "ComponentStatus", "Event", "LimitRange", "Node",
			"PersistentVolume", "PersistentVolumeClaim", "PodTemplate", "ReplicationController", "ResourceQuota", "ServiceAccount"}, nil
	case "discovery.k8s.io":
		return []string{"EndpointSlice"}, nil, nil
	case "networking.istio.io":
		return []string{"ServiceEntry", "WorkloadEntry", "VirtualService", "DestinationRule", "Gateway", "Sidecar", "EnvoyFilter", "ProxyConfig", "WorkloadGroup"}, nil, nil
	case "security.istio.io":
		return []string{"PeerAuthentication", "AuthorizationPolicy", "RequestAuthentication"}, nil, nil
	case "multicluster.x-k8s.io":
		return []string{"ServiceExport"}, []string{"ServiceImport"}, nil
	case groupGatewayAPI:
		return slices.Sorted(maps.Keys(kubeKinds[group])), nil, []string{"UDPRoute", "ListenerSet"}
	case groupIngress:
		return slices.Sorted(maps.Keys(kubeKinds[group])), []string{"NetworkPolicy", "IPAddress", "ServiceCIDR"}, nil
	case "telemetry.istio.io", "extensions.istio.io":
		return nil, nil, nil
	}
	return nil, nil, nil
}

// checkVersion refuses versions that the object's group never had.
func (o *object) checkVersion(version string) {
	if v := versions(o.Group); v != nil && !slices.Contains(v, version) {
		if _, ignored, _ := kinds(o.Group); !slices.Contains(ignored, o.Ref.Kind) {
			o.Reject("apiVersion", written.ReasonUnknownKind, fmt.Sprintf("version %s of %s is not known", written.Show(version), o.Ref.Kind), "use version "+v[0])
		}
	}
}

// decode adds what the object says to the decoder's Input.
func (o *object) decode() {
	if o.Failed {
		return
	}
	if o.eastWest() {
		if o.Ref.Kind += "." + o.Group; o.named() {
			o.eastWestGateway()
		}
		return
	}
	if o.d.opts.Remote && o.Group == groupGatewayAPI {
		return // routes and other gateways are said in the cluster of the control plane
	}
	if !o.known() {
		return
	}
	if _, ok := kubeKinds[o.Group][o.Ref.Kind]; ok {
		if o.namedAs(o.Ref.Kind + "." + o.Group) {
			o.kubeObject()
		}
		return
	}
	if !o.named() {
		return
	}
	switch o.Ref.Kind {
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
		o.d.in.VirtualServices = add(o.d.in.VirtualServices, traffic.VirtualService(o.Object))
	case "DestinationRule":
		o.d.in.DestinationRules = add(o.d.in.DestinationRules, traffic.DestinationRule(o.Object))
	case "Gateway":
		o.d.in.Gateways = add(o.d.in.Gateways, traffic.Gateway(o.Object))
	case "Sidecar":
		o.d.in.Sidecars = add(o.d.in.Sidecars, traffic.Sidecar(o.Object))
	case "PeerAuthentication":
		o.d.in.PeerAuthentications = add(o.d.in.PeerAuthentications, security.PeerAuthentication(o.Object))
	case "AuthorizationPolicy":
		o.d.in.AuthorizationPolicies = add(o.d.in.AuthorizationPolicies, security.AuthorizationPolicy(o.Object))
	case "RequestAuthentication":
		o.d.in.RequestAuthentications = add(o.d.in.RequestAuthentications, security.RequestAuthentication(o.Object))
	case "EnvoyFilter":
		o.d.in.EnvoyFilters = add(o.d.in.EnvoyFilters, traffic.EnvoyFilter(o.Object))
	case "ProxyConfig":
		o.d.in.ProxyConfigs = add(o.d.in.ProxyConfigs, traffic.ProxyConfig(o.Object))
	case "WorkloadGroup":
		o.d.in.WorkloadGroups = add(o.d.in.WorkloadGroups, traffic.WorkloadGroup(o.Object))
	case "ServiceExport":
		o.serviceExport()
	}
}

// retired are API groups of Istio's first policies, and what says the same today.
var retired = map[string]string{
	"authentication.istio.io": "write a PeerAuthentication for mutual TLS; for tokens a RequestAuthentication, and an AuthorizationPolicy that asks for requestPrincipals",
	"rbac.istio.io":           "write AuthorizationPolicies of security.istio.io: ON is one with spec {}, roles and bindings are its rules",
}

// known reports whether the object's kind is decoded, and says what is wrong with it if it looks as if it should be.
func (o *object) known() bool {
	decoded, ignored, unsupported := kinds(o.Group)
	kind := o.Ref.Kind
	switch {
	case slices.Contains(decoded, kind):
		return true
	case slices.Contains(ignored, kind):
	case slices.Contains(unsupported, kind), o.Group == "telemetry.istio.io", o.Group == "extensions.istio.io":
		o.unhonoured()
	case retired[o.Group] != "":
		o.Reject("kind", written.ReasonUnsupported, o.Ref.Kind+" is a kind of Istio's first policy API, which no Istio since 1.6 reads", retired[o.Group])
	case handled(o.Group):
		remedy := "correct the spelling or remove the object"
		if near := written.Closest(kind, append(slices.Clone(decoded), ignored...)); near != "" {
			remedy = "did you mean " + near + "?"
		}
		o.Reject("kind", written.ReasonUnknownKind, "the API group "+written.Show(cmp.Or(o.Group, "core"))+" has no kind "+written.Show(kind), remedy)
	}
	return false
}

// named checks and defaults name and namespace, and refuses what the file already has.
func (o *object) named() bool { return o.namedAs(o.Ref.Kind) }

// namedAs is named for a kind that another group has, too.
func (o *object) namedAs(kind string) bool {
	if o.Ref.Name == "" {
		o.Reject("metadata.name", written.ReasonMissing, "the object has no name", "give it one")
		return false
	}
	if e := validation.IsDNS1123Subdomain(o.Ref.Name); len(e) > 0 {
		o.Reject("metadata.name", written.ReasonInvalidValue, written.Show(o.Ref.Name)+" is not a name", written.Rule(e))
		return false
	}
	if slices.Contains(clusterScoped, o.Ref.Kind) {
		o.Ref.Namespace = ""
	}
	if e := validation.IsDNS1123Label(o.Ref.Namespace); o.Ref.Namespace != "" && len(e) > 0 {
		o.Reject("metadata.namespace", written.ReasonInvalidValue, written.Show(o.Ref.Namespace)+" is not a namespace", written.Rule(e))
		return false
	}
	id := o.Ref
	id.Kind = kind
	if first, twice := o.d.seen[id.String()]; twice {
		o.Reject("", written.ReasonDuplicate, "is also declared at "+first+", which is used", "remove one of the two")
		return false
	}
	o.d.seen[id.String()] = o.Ref.Source
	return true
}

// add appends what could be decoded.
func add[T any](list []*T, v *T) []*T {
	if v == nil {
		return list
	}
	return append(list, v)
}
