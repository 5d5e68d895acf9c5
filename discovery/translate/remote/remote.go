// Package remote makes what leads a proxy to gateways: an internal listener that stands for a remote cluster or
// network, and the cluster of its gateways. It is pure.
package remote

import (
	"net/netip"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	dnscommonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/common/dns/v3"
	dnsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dns/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// PeerName names the internal listener that stands for a peer, and the cluster of its gateways.
func PeerName(id mesh.ClusterID) string { return "eastwest|" + string(id) }

// NetworkName names the internal listener that stands for a network of this control plane, and the cluster of its
// gateways.
func NetworkName(id mesh.NetworkID) string { return "network|" + string(id) }

// Listener takes what is sent to endpoints behind the gateways and forwards it, bytes unseen, to one of them; a gateway
// that does not answer is replaced by the next.
func Listener(name string) *listenerv3.Listener {
	return &listenerv3.Listener{
		Name:              name,
		ListenerSpecifier: &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{{
			Name: "envoy.filters.network.tcp_proxy", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: wire.Pack(&tcpproxyv3.TcpProxy{
				StatPrefix:         name,
				ClusterSpecifier:   &tcpproxyv3.TcpProxy_Cluster{Cluster: name},
				MaxConnectAttempts: wire.U32(3),
				IdleTimeout:        wire.Duration(0),
			})},
		}}}},
	}
}

// PeerCluster holds a peer's gateways.
func PeerCluster(peer *mesh.Cluster) *clusterv3.Cluster {
	var addresses []*corev3.Address
	for _, g := range peer.Gateways {
		addresses = append(addresses, wire.Socket(g.Addr().Unmap().String(), uint32(g.Port())))
	}
	return cluster(PeerName(peer.ID), addresses)
}

// NetworkCluster holds the gateways of a network of this control plane. Host names are resolved by Envoy, again and
// again.
func NetworkCluster(n *mesh.Network) *clusterv3.Cluster {
	var addresses []*corev3.Address
	for _, g := range n.Gateways {
		addresses = append(addresses, wire.Socket(g.Address, g.Port))
	}
	c := cluster(NetworkName(n.ID), addresses)
	if Named(n) {
		c.ClusterDiscoveryType = &clusterv3.Cluster_ClusterType{ClusterType: &clusterv3.Cluster_CustomClusterType{
			Name: "envoy.clusters.dns", TypedConfig: wire.Pack(&dnsv3.DnsCluster{RespectDnsTtl: true, DnsLookupFamily: dnscommonv3.DnsLookupFamily_ALL}),
		}}
	}
	return c
}

// Named reports whether some gateway is known by a host name.
func Named(n *mesh.Network) bool {
	for _, g := range n.Gateways {
		if _, err := netip.ParseAddr(g.Address); err != nil {
			return true
		}
	}
	return false
}

// cluster probes its gateways by TCP connect, rarely while nothing is sent there; connections through a gateway that
// fails its probes are closed, so that clients retry on another.
func cluster(name string, addresses []*corev3.Address) *clusterv3.Cluster {
	endpoints := &endpointv3.LocalityLbEndpoints{}
	for _, a := range addresses {
		endpoints.LbEndpoints = append(endpoints.LbEndpoints, Endpoint(a))
	}
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       wire.Duration(time.Second),
		CircuitBreakers:      wire.Unlimited(),
		CommonLbConfig:       &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{}},
		HealthChecks: []*corev3.HealthCheck{{
			Timeout:            wire.Duration(500 * time.Millisecond),
			Interval:           wire.Duration(500 * time.Millisecond),
			NoTrafficInterval:  wire.Duration(500 * time.Millisecond), // for gateways that do not answer: found again soon
			UnhealthyThreshold: wire.U32(2),
			HealthyThreshold:   wire.U32(1),
			// Until something is sent there, a healthy gateway is asked seldom.
			NoTrafficHealthyInterval: wire.Duration(5 * time.Second),
			HealthChecker:            &corev3.HealthCheck_TcpHealthCheck_{TcpHealthCheck: &corev3.HealthCheck_TcpHealthCheck{}},
		}},
		CloseConnectionsOnHostHealthFailure: true,
		UpstreamConnectionOptions: &clusterv3.UpstreamConnectionOptions{TcpKeepalive: &corev3.TcpKeepalive{
			KeepaliveTime: wire.U32(5), KeepaliveInterval: wire.U32(1), KeepaliveProbes: wire.U32(3),
		}},
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{endpoints}},
	}
}

// Endpoint is a host at the address.
func Endpoint(a *corev3.Address) *endpointv3.LbEndpoint {
	return &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: a}}}
}

// Gateways returns, for each peer that is reached through gateways and runs an endpoint of some service, and for
// the networks, the internal listener that stands for it and the cluster of its gateways.
func Gateways(snap *mesh.Snapshot, from mesh.NetworkID, services []*mesh.Service, networks map[mesh.NetworkID]bool) (clusters []*clusterv3.Cluster, listeners []*listenerv3.Listener) {
	used := map[mesh.ClusterID]bool{}
	for _, s := range services {
		for _, e := range s.Endpoints {
			if !used[e.Cluster] {
				p := topologies.Reach(snap, from, e)
				used[e.Cluster] = !p.Direct && p.Network == nil && p.Reachable()
			}
		}
	}
	for _, c := range snap.Clusters {
		if used[c.ID] {
			clusters = append(clusters, PeerCluster(c))
			listeners = append(listeners, Listener(PeerName(c.ID)))
		}
	}
	for _, n := range snap.Networks {
		if networks[n.ID] {
			clusters = append(clusters, NetworkCluster(n))
			listeners = append(listeners, Listener(NetworkName(n.ID)))
		}
	}
	return clusters, listeners
}
