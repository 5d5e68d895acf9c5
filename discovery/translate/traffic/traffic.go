//lint:file-ignore SA1019 users still write the fields that Istio has deprecated

// Package traffic writes what a DestinationRule says of load balancing, connections and outliers into clusters. It is pure.
package traffic

import (
	"cmp"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	matcherconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	upstreamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
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
			c.UpstreamConnectionOptions = Keepalive(k)
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
	budget(c, policy.GetRetryBudget())
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
	warmUp(c, lb.GetWarmup())
}

// warmUp raises the share of a new endpoint slowly.
func warmUp(c *clusterv3.Cluster, w *networking.WarmupConfiguration) {
	if w.GetDuration().AsDuration() <= 0 {
		return
	}
	slow := &clusterv3.Cluster_SlowStartConfig{SlowStartWindow: w.GetDuration()}
	if a := w.GetAggression(); a != nil {
		slow.Aggression = &corev3.RuntimeDouble{DefaultValue: a.GetValue(), RuntimeKey: "isthmus.warmup.aggression"}
	}
	if p := w.GetMinimumPercent(); p != nil {
		slow.MinWeightPercent = &typev3.Percent{Value: p.GetValue()}
	}
	switch c.GetLbPolicy() {
	case clusterv3.Cluster_ROUND_ROBIN:
		c.LbConfig = &clusterv3.Cluster_RoundRobinLbConfig_{RoundRobinLbConfig: &clusterv3.Cluster_RoundRobinLbConfig{SlowStartConfig: slow}}
	case clusterv3.Cluster_LEAST_REQUEST:
		c.LbConfig = &clusterv3.Cluster_LeastRequestLbConfig_{LeastRequestLbConfig: &clusterv3.Cluster_LeastRequestLbConfig{SlowStartConfig: slow}}
	}
}

// budget bounds retries by the requests under way instead of by a number.
func budget(c *clusterv3.Cluster, b *networking.TrafficPolicy_RetryBudget) {
	if b == nil {
		return
	}
	out := &clusterv3.CircuitBreakers_Thresholds_RetryBudget{BudgetInterval: b.GetBudgetInterval()}
	if p := b.GetPercent(); p != nil {
		out.BudgetPercent = &typev3.Percent{Value: p.GetValue()}
	}
	if n := b.GetMinRetryConcurrency(); n > 0 {
		out.MinRetryConcurrency = wire.U32(n)
	}
	c.GetCircuitBreakers().GetThresholds()[0].RetryBudget = out
}

// Keepalive turns TCP's probes of idle connections on.
func Keepalive(k interface {
	GetProbes() uint32
	GetTime() *durationpb.Duration
	GetInterval() *durationpb.Duration
}) *clusterv3.UpstreamConnectionOptions {
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
	return &clusterv3.UpstreamConnectionOptions{TcpKeepalive: alive}
}

// TCP sets what a policy says of connections that are passed on as bytes.
func TCP(t *tcpproxyv3.TcpProxy, policy *networking.TrafficPolicy) {
	tcp := policy.GetConnectionPool().GetTcp()
	if d := tcp.GetIdleTimeout(); d != nil {
		t.IdleTimeout = d
	}
	if d := tcp.GetMaxConnectionDuration(); d.AsDuration() > 0 {
		t.MaxDownstreamConnectionDuration = d
	}
	if policy.GetLoadBalancer().GetConsistentHash().GetUseSourceIp() {
		t.HashPolicy = []*typev3.HashPolicy{{PolicySpecifier: &typev3.HashPolicy_SourceIp_{SourceIp: &typev3.HashPolicy_SourceIp{}}}}
	}
	if x := policy.GetTunnel(); x != nil {
		host := x.GetTargetHost()
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		t.TunnelingConfig = &tcpproxyv3.TcpProxy_TunnelingConfig{
			Hostname: host + ":" + wire.Itoa(x.GetTargetPort()), UsePost: strings.EqualFold(x.GetProtocol(), "POST"),
		}
	}
}

// Defaulted returns the policy with the mesh's wish to speak HTTP/2 where the policy says nothing of it.
func Defaulted(p *networking.TrafficPolicy, upgrade bool) *networking.TrafficPolicy {
	if !upgrade || p.GetConnectionPool().GetHttp().GetH2UpgradePolicy() != networking.ConnectionPoolSettings_HTTPSettings_DEFAULT {
		return p
	}
	p = proto.CloneOf(p)
	if p.ConnectionPool == nil {
		p.ConnectionPool = &networking.ConnectionPoolSettings{}
	}
	if p.ConnectionPool.Http == nil {
		p.ConnectionPool.Http = &networking.ConnectionPoolSettings_HTTPSettings{}
	}
	p.ConnectionPool.Http.H2UpgradePolicy = networking.ConnectionPoolSettings_HTTPSettings_UPGRADE
	return p
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

// HTTP says which HTTP the upstream speaks: HTTP/2 by the port's protocol or on request, else HTTP/1.1; what the client
// speaks where nobody knows. At a gateway it is HTTP/1.1 then: what its clients speak says nothing of the Service.
func HTTP(c *clusterv3.Cluster, port mesh.Port, policy *networking.TrafficPolicy, gateway bool) {
	p := port.Protocol
	h := policy.GetConnectionPool().GetHttp()
	if !p.IsHTTP() && !port.Sniffed {
		return
	}
	o := &upstreamv3.HttpProtocolOptions{}
	http2 := &corev3.Http2ProtocolOptions{ConnectionKeepalive: &corev3.KeepaliveSettings{
		Interval: wire.Duration(5 * time.Second), Timeout: wire.Duration(2 * time.Second),
	}}
	if k := h.GetHttp2KeepAlive(); k != nil {
		if d := k.GetInterval(); d.AsDuration() > 0 {
			http2.ConnectionKeepalive.Interval = d
		}
		if d := k.GetTimeout(); d.AsDuration() > 0 {
			http2.ConnectionKeepalive.Timeout = d
		}
	}
	if n := h.GetMaxConcurrentStreams(); n > 0 {
		http2.MaxConcurrentStreams = wire.U32(uint32(n))
	}
	switch {
	case h.GetUseClientProtocol(), port.Sniffed && !gateway:
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
	common := &corev3.HttpProtocolOptions{IdleTimeout: h.GetIdleTimeout()}
	if n := h.GetMaxRequestsPerConnection(); n > 0 {
		common.MaxRequestsPerConnection = wire.U32(uint32(n))
	}
	if d := policy.GetConnectionPool().GetTcp().GetMaxConnectionDuration(); d.AsDuration() > 0 {
		common.MaxConnectionDuration = d
	}
	if common.IdleTimeout != nil || common.MaxRequestsPerConnection != nil || common.MaxConnectionDuration != nil {
		o.CommonHttpProtocolOptions = common
	}
	o.OutlierDetection = errorCodes(policy.GetOutlierDetection().GetOutlierDetectionHttpErrorCodes())
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptionsKey: wire.Pack(o)}
}

// errorCodes says which answers count as errors; nil: 5xx.
func errorCodes(codes []uint32) *upstreamv3.HttpProtocolOptions_OutlierDetection {
	if len(codes) == 0 {
		return nil
	}
	list := &matcherconfigv3.MatchPredicate_MatchSet{}
	for _, code := range codes {
		list.Rules = append(list.Rules, &matcherconfigv3.MatchPredicate{Rule: &matcherconfigv3.MatchPredicate_HttpResponseHeadersMatch{
			HttpResponseHeadersMatch: &matcherconfigv3.HttpHeadersMatch{Headers: []*routev3.HeaderMatcher{{
				Name: ":status", HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: wire.Exact(wire.Itoa(code))},
			}}},
		}})
	}
	if len(list.Rules) == 1 {
		return &upstreamv3.HttpProtocolOptions_OutlierDetection{ErrorMatcher: list.Rules[0]}
	}
	return &upstreamv3.HttpProtocolOptions_OutlierDetection{ErrorMatcher: &matcherconfigv3.MatchPredicate{Rule: &matcherconfigv3.MatchPredicate_OrMatch{OrMatch: list}}}
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

// Empty leaves a cluster without an endpoint: nothing must be sent where TLS cannot be spoken as it is asked for.
func Empty(c *clusterv3.Cluster) {
	c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}
	c.LoadAssignment, c.EdsClusterConfig = nil, nil
	if c.LbPolicy == clusterv3.Cluster_CLUSTER_PROVIDED {
		c.LbPolicy = clusterv3.Cluster_ROUND_ROBIN
	}
}
