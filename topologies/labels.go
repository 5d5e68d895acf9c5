package topologies

import (
	"strings"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// The labels that every endpoint and proxy has by where it is, as Istio and Kubernetes call them.
const (
	RegionLabel  = "topology.kubernetes.io/region"
	ZoneLabel    = "topology.kubernetes.io/zone"
	SubzoneLabel = "topology.istio.io/subzone"
	NetworkLabel = "topology.istio.io/network"
	ClusterLabel = "topology.istio.io/cluster"
)

// SplitLocality reads region/zone/subzone; what is missing is empty.
func SplitLocality(s string) (region, zone, subzone string) {
	region, rest, _ := strings.Cut(s, "/")
	zone, subzone, _ = strings.Cut(rest, "/")
	return region, zone, subzone
}

// Label returns the value of an endpoint's label, or of what is known of where it is. A label of the endpoint's own
// counts first.
func Label(e *mesh.Endpoint, key string) string {
	return labelOf(e.Labels, e.Locality, e.Network, e.Cluster, key)
}

// ProxyLabel is Label for a proxy that Place has placed.
func ProxyLabel(p *mesh.Proxy, key string) string {
	return labelOf(p.Labels, p.Locality, p.Network, p.Cluster, key)
}

func labelOf(labels map[string]string, locality string, network mesh.NetworkID, cluster mesh.ClusterID, key string) string {
	own, ok := labels[key]
	if ok || !strings.HasPrefix(key, "topology.") {
		return own
	}
	region, zone, subzone := SplitLocality(locality)
	switch key {
	case RegionLabel:
		return region
	case ZoneLabel:
		return zone
	case SubzoneLabel:
		return subzone
	case NetworkLabel:
		return string(network)
	case ClusterLabel:
		return string(cluster)
	}
	return ""
}

// Selects reports whether the endpoint has all the labels.
func Selects(selector map[string]string, e *mesh.Endpoint) bool {
	for k, want := range selector {
		if Label(e, k) != want {
			return false
		}
	}
	return true
}

// Nearness says how much of its locality an endpoint shares with a client: 0 all, 1 region and zone, 2 the region, 3
// nothing.
func Nearness(client, endpoint string) uint32 {
	region, zone, subzone := SplitLocality(client)
	r, z, s := SplitLocality(endpoint)
	switch {
	case region != r:
		return 3
	case zone != z:
		return 2
	case subzone != s:
		return 1
	}
	return 0
}
