//lint:file-ignore SA1019 users still write the fields that Istio has deprecated

// Package traffic writes what a DestinationRule says of load balancing, connections and outliers into clusters. It is pure.
package traffic

import (
	"cmp"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	upstreamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

const httpOptionsKey = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// Apply sets what the policy says. distribute: localities have fixed shares.
func Apply(c *clusterv3.Cluster, policy *networking.TrafficPolicy, distribute bool) {
	balance(c, policy.GetLoadBalancer())
	if tcp := policy.GetConnectionPool().GetTcp(); tcp != nil {
		limits := c.GetCircuitBreakers().GetThresholds()[0]
		if n := tcp.GetMaxConnections(); n > 0 {
			limits.MaxConnections = wire.U32(uint32(n))
		}
		if t := tcp.GetConnectTimeout(); t.AsDuration() > 0 {
			c.ConnectTimeout = t
		}
		if k := tcp.GetTcpKeepalive(); k != nil {
			alive := &corev3.TcpKeepalive{}
			if k.GetProbes() > 0 {
				alive.KeepaliveProbes = wire.U32(k.GetProbes())
			}
			if s := k.GetTime().GetSeconds(); s > 0 {
				alive.KeepaliveTime = wire.U32(uint32(s))
			}
			if s := k.GetInterval().GetSeconds(); s > 0 {
				alive.KeepaliveInterval = wire.U32(uint32(s))
			}
			c.UpstreamConnectionOptions = &clusterv3.UpstreamConnectionOptions{TcpKeepalive: alive}
		}
	}
	if h := policy.GetConnectionPool().GetHttp(); h != nil {
		limits := c.GetCircuitBreakers().GetThresholds()[0]
		if n := h.GetHttp1MaxPendingRequests(); n > 0 {
			limits.MaxPendingRequests = wire.U32(uint32(n))
		}
		if n := h.GetHttp2MaxRequests(); n > 0 {
			limits.MaxRequests = wire.U32(uint32(n))
		}
		if n := h.GetMaxRetries(); n > 0 {
			limits.MaxRetries = wire.U32(uint32(n))
		}
	}
	if o := policy.GetOutlierDetection(); o != nil {
		c.OutlierDetection = outliers(o)
		c.CommonLbConfig = &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: float64(o.GetMinHealthPercent())}}
	}
	if distribute && c.GetLbPolicy() != clusterv3.Cluster_CLUSTER_PROVIDED {
		if c.CommonLbConfig == nil {
			c.CommonLbConfig = &clusterv3.Cluster_CommonLbConfig{}
		}
		c.CommonLbConfig.LocalityConfigSpecifier = &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig_{
			LocalityWeightedLbConfig: &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig{},
		}
	}
}

// balance takes PASSTHROUGH as ROUND_ROBIN where the cluster has endpoints.
func balance(c *clusterv3.Cluster, lb *networking.LoadBalancerSettings) {
	if c.GetLbPolicy() == clusterv3.Cluster_CLUSTER_PROVIDED {
		return
	}
	if h := lb.GetConsistentHash(); h != nil {
		if m := h.GetMaglev(); m != nil {
			c.LbPolicy = clusterv3.Cluster_MAGLEV
			if m.GetTableSize() > 0 {
				c.LbConfig = &clusterv3.Cluster_MaglevLbConfig_{MaglevLbConfig: &clusterv3.Cluster_MaglevLbConfig{TableSize: wire.U64(m.GetTableSize())}}
			}
			return
		}
		size := cmp.Or(h.GetRingHash().GetMinimumRingSize(), h.GetMinimumRingSize(), 1024)
		c.LbPolicy = clusterv3.Cluster_RING_HASH
		c.LbConfig = &clusterv3.Cluster_RingHashLbConfig_{RingHashLbConfig: &clusterv3.Cluster_RingHashLbConfig{MinimumRingSize: wire.U64(size)}}
		return
	}
	switch lb.GetSimple() {
	case networking.LoadBalancerSettings_LEAST_CONN, networking.LoadBalancerSettings_LEAST_REQUEST:
		c.LbPolicy = clusterv3.Cluster_LEAST_REQUEST
	case networking.LoadBalancerSettings_RANDOM:
		c.LbPolicy = clusterv3.Cluster_RANDOM
	}
}

// outliers enforces what the rule names and nothing else.
func outliers(o *networking.OutlierDetection) *clusterv3.OutlierDetection {
	out := &clusterv3.OutlierDetection{
		SplitExternalLocalOriginErrors: o.GetSplitExternalLocalOriginErrors(),
		EnforcingSuccessRate:           wire.U32(0), EnforcingLocalOriginSuccessRate: wire.U32(0),
		Interval: o.GetInterval(), BaseEjectionTime: o.GetBaseEjectionTime(),
	}
	if n := o.GetConsecutive_5XxErrors(); n != nil {
		out.Consecutive_5Xx = n
		out.EnforcingConsecutive_5Xx = wire.U32(enforced(n.GetValue() > 0))
		if n.GetValue() == 0 {
			out.Consecutive_5Xx = nil
		}
	}
	gateway := o.GetConsecutiveGatewayErrors()
	if gateway == nil && o.GetConsecutiveErrors() > 0 {
		gateway = wire.U32(uint32(o.GetConsecutiveErrors()))
	}
	if gateway.GetValue() > 0 {
		out.ConsecutiveGatewayFailure, out.EnforcingConsecutiveGatewayFailure = gateway, wire.U32(100)
		if o.GetConsecutive_5XxErrors() == nil {
			out.EnforcingConsecutive_5Xx = wire.U32(0)
		}
	}
	if n := o.GetConsecutiveLocalOriginFailures(); n != nil {
		out.ConsecutiveLocalOriginFailure, out.EnforcingConsecutiveLocalOriginFailure = n, wire.U32(enforced(n.GetValue() > 0))
		if n.GetValue() == 0 {
			out.ConsecutiveLocalOriginFailure = nil
		}
	}
	if p := o.GetMaxEjectionPercent(); p > 0 {
		out.MaxEjectionPercent = wire.U32(uint32(min(p, 100)))
	}
	return out
}

func enforced(on bool) uint32 {
	if on {
		return 100
	}
	return 0
}

// HTTP says which HTTP the upstream speaks: HTTP/2 by the port's protocol or on request, else HTTP/1.1.
func HTTP(c *clusterv3.Cluster, p mesh.Protocol, h *networking.ConnectionPoolSettings_HTTPSettings) {
	if !p.IsHTTP() {
		return
	}
	o := &upstreamv3.HttpProtocolOptions{}
	http2 := &corev3.Http2ProtocolOptions{ConnectionKeepalive: &corev3.KeepaliveSettings{
		Interval: wire.Duration(5 * time.Second), Timeout: wire.Duration(2 * time.Second),
	}}
	if n := h.GetMaxConcurrentStreams(); n > 0 {
		http2.MaxConcurrentStreams = wire.U32(uint32(n))
	}
	switch {
	case h.GetUseClientProtocol():
		o.UpstreamProtocolOptions = &upstreamv3.HttpProtocolOptions_UseDownstreamProtocolConfig{
			UseDownstreamProtocolConfig: &upstreamv3.HttpProtocolOptions_UseDownstreamHttpConfig{
				HttpProtocolOptions: &corev3.Http1ProtocolOptions{}, Http2ProtocolOptions: http2,
			},
		}
	case p.IsHTTP2() || h.GetH2UpgradePolicy() == networking.ConnectionPoolSettings_HTTPSettings_UPGRADE:
		o.UpstreamProtocolOptions = explicit(&upstreamv3.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: http2},
		})
	default:
		o.UpstreamProtocolOptions = explicit(&upstreamv3.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &corev3.Http1ProtocolOptions{}},
		})
	}
	if t := h.GetIdleTimeout(); t != nil {
		o.CommonHttpProtocolOptions = &corev3.HttpProtocolOptions{IdleTimeout: t}
	}
	if n := h.GetMaxRequestsPerConnection(); n > 0 {
		if o.CommonHttpProtocolOptions == nil {
			o.CommonHttpProtocolOptions = &corev3.HttpProtocolOptions{}
		}
		o.CommonHttpProtocolOptions.MaxRequestsPerConnection = wire.U32(uint32(n))
	}
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptionsKey: wire.Pack(o)}
}

func explicit(e *upstreamv3.HttpProtocolOptions_ExplicitHttpConfig) *upstreamv3.HttpProtocolOptions_ExplicitHttpConfig_ {
	return &upstreamv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: e}
}

// EitherHTTP makes the upstream speak what the client speaks.
func EitherHTTP(c *clusterv3.Cluster) {
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptionsKey: wire.Pack(&upstreamv3.HttpProtocolOptions{
		UpstreamProtocolOptions: &upstreamv3.HttpProtocolOptions_UseDownstreamProtocolConfig{
			UseDownstreamProtocolConfig: &upstreamv3.HttpProtocolOptions_UseDownstreamHttpConfig{
				HttpProtocolOptions: &corev3.Http1ProtocolOptions{}, Http2ProtocolOptions: &corev3.Http2ProtocolOptions{},
			},
		},
	})}
}
