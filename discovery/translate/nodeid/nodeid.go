// Package nodeid reads what a client of the control plane says of itself. It is pure.
package nodeid

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// What one node may claim in INSTANCE_IPS and REQUESTED_NETWORK_VIEW.
const (
	maxInstanceIPs = 64
	maxNetworks    = 64
	maxTexts       = 128
	maxText        = 1024 // key and value
)

// Parse reads an Istio node id (TYPE~IP~NAME.NAMESPACE~DOMAIN) and Istio's node metadata. identity is the SPIFFE
// id that the client proved, empty on the plaintext port; a node of another namespace than the identity's is refused.
func Parse(node *corev3.Node, identity string) (*mesh.Proxy, error) {
	id := node.GetId()
	parts := strings.Split(id, "~")
	if len(parts) != 4 {
		return nil, fmt.Errorf("node id %q: want TYPE~IP~NAME.NAMESPACE~DOMAIN", id)
	}
	dot := strings.LastIndexByte(parts[2], '.')
	if dot <= 0 || dot == len(parts[2])-1 {
		return nil, fmt.Errorf("node id %q: %q is not NAME.NAMESPACE", id, parts[2])
	}
	meta := node.GetMetadata().GetFields()
	p := &mesh.Proxy{
		ID: id, Name: parts[2][:dot], Namespace: parts[2][dot+1:], Domain: parts[3],
		Network: mesh.NetworkID(meta["NETWORK"].GetStringValue()), Cluster: mesh.ClusterID(meta["CLUSTER_ID"].GetStringValue()),
		Locality: localityOf(node.GetLocality()), NetworkView: networkView(meta["REQUESTED_NETWORK_VIEW"]), Labels: stringMap(meta["LABELS"]), Identity: identity,
		Version: meta["ISTIO_VERSION"].GetStringValue(), Metadata: texts(meta),
	}
	if ns := meta["NAMESPACE"].GetStringValue(); ns != "" && ns != p.Namespace {
		return nil, fmt.Errorf("node id %q: metadata NAMESPACE is %q", id, ns)
	}
	if ns, ok := identityNamespace(identity); ok && ns != p.Namespace {
		return nil, fmt.Errorf("node id %q: client is %s, of another namespace", id, identity)
	}
	switch {
	case meta["GENERATOR"].GetStringValue() == "grpc":
		p.Type = mesh.Proxyless
	case parts[0] == string(mesh.Sidecar):
		p.Type = mesh.Sidecar
		p.Transparent = meta["INTERCEPTION_MODE"].GetStringValue() == "TPROXY"
	case parts[0] == string(mesh.Router):
		p.Type = mesh.Router
		p.EastWest = p.Labels["istio"] == "eastwestgateway"
	default:
		return nil, fmt.Errorf("node id %q: type %q is none of sidecar, router", id, parts[0])
	}
	var err error
	p.Addresses, err = nodeAddresses(parts[1], meta["INSTANCE_IPS"].GetStringValue())
	if err != nil {
		return nil, fmt.Errorf("node id %q: %w", id, err)
	}
	return p, nil
}

func nodeAddresses(first, rest string) ([]netip.Addr, error) {
	var out []netip.Addr
	for i, s := range append([]string{first}, strings.SplitN(rest, ",", maxInstanceIPs+1)...) {
		s = strings.TrimSpace(s)
		if s == "" && i > 0 || i > maxInstanceIPs {
			continue
		}
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("address %q: not an IP", s)
		}
		if a = a.Unmap(); !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out, nil
}

// localityOf writes region/zone/subzone, without what is missing at the end.
func localityOf(l *corev3.Locality) string {
	return strings.TrimRight(l.GetRegion()+"/"+l.GetZone()+"/"+l.GetSubZone(), "/")
}

// networkView reads a list, or names with commas between them.
func networkView(v *structpb.Value) (out []mesh.NetworkID) {
	names := strings.Split(v.GetStringValue(), ",")
	for _, x := range v.GetListValue().GetValues() {
		names = append(names, x.GetStringValue())
	}
	for _, n := range names {
		if n = strings.TrimSpace(n); n != "" && len(out) < maxNetworks {
			out = append(out, mesh.NetworkID(n))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// texts returns the metadata that are texts, as many and as long as a node may have.
func texts(meta map[string]*structpb.Value) map[string]string {
	out := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(meta)) {
		if v := meta[k].GetStringValue(); v != "" && len(k)+len(v) <= maxText && len(out) < maxTexts {
			out[k] = v
		}
	}
	return out
}

func stringMap(v *structpb.Value) map[string]string {
	fields := v.GetStructValue().GetFields()
	if len(fields) == 0 {
		return nil
	}
	out := make(map[string]string, len(fields))
	for _, k := range slices.Sorted(maps.Keys(fields)) {
		out[k] = fields[k].GetStringValue()
	}
	return out
}

// identityNamespace returns the namespace in spiffe://TD/ns/NAMESPACE/sa/ACCOUNT.
func identityNamespace(id string) (string, bool) {
	rest, ok := strings.CutPrefix(id, "spiffe://")
	if !ok {
		return "", false
	}
	parts := strings.Split(rest, "/")
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" {
		return "", false
	}
	return parts[2], true
}
