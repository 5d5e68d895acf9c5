package status

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/dns/zone"
)

// perSlice is how many endpoints one EndpointSlice holds, as the API server's own controller has it.
const perSlice = 100

// endpointSlices are the EndpointSlices of one name: at least one for each exporting cluster, with the pods that clients
// here can dial by an address of their own. A pod behind gateways that has none is left out, and the slice of its
// cluster says how many there are in an annotation.
func endpointSlices(snap *mesh.Snapshot, key types.NamespacedName, exporters []mesh.Exporter) []*discoveryv1.EndpointSlice {
	global := snap.Service(mesh.GlobalHost(key.Name, key.Namespace))
	if global == nil {
		return nil
	}
	var out []*discoveryv1.EndpointSlice
	for _, e := range exporters {
		ports := importedPorts(e, global)
		var v4, v6 []discoveryv1.Endpoint
		behind := 0
		for _, ep := range global.EndpointsIn(e.Cluster) {
			addresses := zone.Reachable(snap, global, ep)
			if len(addresses) == 0 {
				behind++
			}
			ready := ep.Ready && ep.Freshness != mesh.Expired
			for _, text := range addresses {
				d := discoveryv1.Endpoint{Addresses: []string{text}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}
				if name := zone.HostName(ep); mesh.IsLabel(name) {
					d.Hostname = &name // as in DNS
				}
				if addr, err := netip.ParseAddr(text); err == nil && addr.Is4() {
					v4 = append(v4, d)
				} else {
					v6 = append(v6, d)
				}
			}
		}
		for n, part := range chunks(v4) {
			out = append(out, slice(key, e.Cluster, discoveryv1.AddressTypeIPv4, n, part, ports))
		}
		if len(v6) > 0 {
			for n, part := range chunks(v6) {
				out = append(out, slice(key, e.Cluster, discoveryv1.AddressTypeIPv6, n, part, ports))
			}
		}
		if behind > 0 {
			for _, s := range out {
				if s.Labels[mcsv1beta1.LabelSourceCluster] == string(e.Cluster) {
					s.Annotations = map[string]string{annotationBehind: fmt.Sprint(behind)}
				}
			}
		}
	}
	return out
}

// annotationBehind says how many endpoints of the cluster are reached through its gateways alone.
const annotationBehind = "isthmus.io/endpoints-behind-gateways"

// chunks cuts the endpoints up; of none it makes one empty chunk.
func chunks(in []discoveryv1.Endpoint) [][]discoveryv1.Endpoint {
	slices.SortFunc(in, func(a, b discoveryv1.Endpoint) int { return cmp.Compare(a.Addresses[0], b.Addresses[0]) })
	if len(in) == 0 {
		return [][]discoveryv1.Endpoint{{}}
	}
	return slices.Collect(slices.Chunk(in, perSlice))
}

func slice(key types.NamespacedName, cluster mesh.ClusterID, kind discoveryv1.AddressType, n int, endpoints []discoveryv1.Endpoint, ports []discoveryv1.EndpointPort) *discoveryv1.EndpointSlice {
	name := key.Name
	if len(name) > 40 {
		name = name[:40]
	}
	return &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: key.Namespace, Name: fmt.Sprintf("%s-%08x", name, hash(key.Name, string(cluster), string(kind), fmt.Sprint(n))),
			Labels: map[string]string{
				mcsv1beta1.LabelServiceName: key.Name, mcsv1beta1.LabelSourceCluster: string(cluster),
				discoveryv1.LabelManagedBy: sliceManagedBy, labelManagedBy: managedBy,
			},
		},
		AddressType: kind, Endpoints: endpoints, Ports: ports,
	}
}

// importedPorts are the ports at the endpoints of one cluster. Where pods have different ones those of most count.
func importedPorts(e mesh.Exporter, global *mesh.Service) []discoveryv1.EndpointPort {
	out := []discoveryv1.EndpointPort{}
	for _, p := range global.Ports {
		target := map[uint32]int{}
		for _, ep := range global.EndpointsIn(e.Cluster) {
			if n := ep.Ports[p.Number]; n != 0 {
				target[n]++
			}
		}
		best := p.Number
		for n, votes := range target {
			if v := target[best]; votes > v || votes == v && n < best {
				best = n
			}
		}
		number, protocol, name := int32(best), corev1.ProtocolTCP, p.Name
		if p.Protocol == mesh.UDP {
			protocol = corev1.ProtocolUDP
		}
		out = append(out, discoveryv1.EndpointPort{Name: &name, Port: &number, Protocol: &protocol})
	}
	return out
}
