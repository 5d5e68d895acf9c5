package translate

import (
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	corsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/cors/v3"
	faultv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

type listener = listenerv3.Listener

const (
	inboundDirection  = corev3.TrafficDirection_INBOUND
	outboundDirection = corev3.TrafficDirection_OUTBOUND

	routerFilter = "envoy.filters.http.router"

	// inspectTimeout bounds the wait for a client's first bytes, which say whether it speaks TLS.
	inspectTimeout = 5 * time.Second
)

func listenerFilter(name string, config *anypb.Any) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: name, ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: config}}
}

func networkFilter(name string, config *anypb.Any) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: config}}
}

func httpFilter(name string, config *anypb.Any) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: config}}
}

// tcpProxy forwards connections to one cluster; idle connections stay open.
func tcpProxy(stat, cluster string) *listenerv3.Filter {
	return tcpFilter(&tcpproxyv3.TcpProxy{StatPrefix: stat, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: cluster}, IdleTimeout: wire.Duration(0)})
}

func tcpFilter(t *tcpproxyv3.TcpProxy) *listenerv3.Filter {
	return networkFilter("envoy.filters.network.tcp_proxy", wire.Pack(t))
}

// connectionManager fills in what all HTTP listeners have in common. guards see requests before they are routed, and
// after CORS, which answers a browser's question without a token.
func connectionManager(m *hcmv3.HttpConnectionManager, guards ...*hcmv3.HttpFilter) *listenerv3.Filter {
	m.StreamIdleTimeout = wire.Duration(0)
	if m.NormalizePath == nil {
		m.NormalizePath = wire.Yes()
	}
	m.UpgradeConfigs = []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}}
	m.HttpFilters = append([]*hcmv3.HttpFilter{httpFilter(httprule.CorsFilter, wire.Pack(&corsv3.Cors{}))}, guards...)
	m.HttpFilters = append(m.HttpFilters,
		httpFilter(httprule.FaultFilter, wire.Pack(&faultv3.HTTPFault{})),
		httpFilter(routerFilter, wire.Pack(&routerv3.Router{})),
	)
	return networkFilter("envoy.filters.network.http_connection_manager", wire.Pack(m))
}

// rds takes the routes from the aggregated stream.
func rds(name string) *hcmv3.HttpConnectionManager_Rds {
	return &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: name, ConfigSource: wire.ADS(0)}}
}
