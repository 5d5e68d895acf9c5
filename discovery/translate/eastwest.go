package translate

import (
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

type listener = listenerv3.Listener

// eastwestName names the internal listener that stands for a remote cluster, and the cluster of its gateways.
func eastwestName(id mesh.ClusterID) string { return "eastwest|" + string(id) }

// gatewayListener takes what is sent to endpoints of the remote cluster and forwards it, bytes unseen, to one of its
// gateways; a gateway that does not answer is replaced by the next.
func gatewayListener(id mesh.ClusterID) *listener {
	name := eastwestName(id)
	return &listener{
		Name:              name,
		ListenerSpecifier: &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{tcpFilter(&tcpproxyv3.TcpProxy{
			StatPrefix:         name,
			ClusterSpecifier:   &tcpproxyv3.TcpProxy_Cluster{Cluster: name},
			MaxConnectAttempts: wire.U32(3),
			IdleTimeout:        wire.Duration(0),
		})}}},
	}
}

// gatewayCluster holds the remote cluster's gateways. They are probed by TCP connect, rarely while nothing is sent
// there; connections through a gateway that fails its probes are closed, so that clients retry on another.
func gatewayCluster(remote *mesh.Cluster) *clusterv3.Cluster {
	name := eastwestName(remote.ID)
	endpoints := &endpointv3.LocalityLbEndpoints{}
	for _, g := range remote.Gateways {
		endpoints.LbEndpoints = append(endpoints.LbEndpoints, hostEndpoint(wire.Socket(g.Addr().Unmap().String(), uint32(g.Port()))))
	}
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       wire.Duration(time.Second),
		CircuitBreakers:      unlimited(),
		CommonLbConfig:       noPanic(0),
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

func hostEndpoint(a *corev3.Address) *endpointv3.LbEndpoint {
	return &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: a}}}
}

// noPanic keeps traffic off endpoints that are set aside while at least percent of them are not; 0 means always.
func noPanic(percent float64) *clusterv3.Cluster_CommonLbConfig {
	return &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: percent}}
}
