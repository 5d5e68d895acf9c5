package gateway

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	dnscommonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/common/dns/v3"
	dnsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dns/v3"
	filterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	inspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

const (
	helloTimeout   = 5 * time.Second // for a client to send its whole ClientHello
	connectTimeout = 2 * time.Second // for one attempt; there are connectAttempts
	idleTimeout    = time.Hour       // without a byte in either direction

	connectAttempts = 3
	bufferLimit     = 256 << 10 // octets held for a slow reader, in each direction
	keepaliveTime   = 60        // seconds before the first probe of a silent connection
	keepaliveEvery  = 10        // seconds between probes
	keepaliveProbes = 6         // unanswered ones that end it

	// clusterKey is the filter state that tcp_proxy takes its cluster from.
	clusterKey = "envoy.tcp_proxy.cluster"
)

// target is one pod, or one address of the control plane.
type target struct {
	name      string
	namespace string
	endpoint  *mesh.Endpoint // nil: none of a service
	weight    uint32
	addrs     []netip.AddrPort // of one pod with several addresses: all of them
	host      string           // instead of addrs: a name to resolve, with its port
	port      uint32
}

func (t target) compare(o target) int {
	return cmp.Or(slices.CompareFunc(t.addrs, o.addrs, netip.AddrPort.Compare), strings.Compare(t.host, o.host), cmp.Compare(t.port, o.port), strings.Compare(t.name, o.name))
}

// chain is one filter chain: connections with one of these server names go to one cluster.
type chain struct {
	name    string
	names   []string
	alpn    []string // one of these must be offered; empty: no demand
	byName  bool     // the cluster is PodPrefix and the server name
	cluster string   // otherwise
	shares  []share  // instead of one cluster
	tls     bool     // without names: any TLS connection, else any connection
}

// share is a cluster and its weight.
type share struct {
	cluster string
	weight  uint32
}

// keys are what no two chains of a listener may share.
func (c chain) keys() []string {
	switch {
	case len(c.names) > 0:
		return c.names
	case c.tls:
		return []string{"any TLS"}
	}
	return []string{"any connection"}
}

func (c chain) proto() *listenerv3.FilterChain {
	proxy := &tcpproxyv3.TcpProxy{
		StatPrefix:         ListenerName,
		ClusterSpecifier:   &tcpproxyv3.TcpProxy_Cluster{Cluster: c.cluster},
		IdleTimeout:        durationpb.New(idleTimeout),
		MaxConnectAttempts: wrapperspb.UInt32(connectAttempts),
	}
	var filters []*listenerv3.Filter
	if c.byName {
		proxy.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: BlackHole}
		filters = append(filters, filter("envoy.filters.network.set_filter_state", clusterFromServerName()))
	}
	if len(c.shares) > 0 {
		w := &tcpproxyv3.TcpProxy_WeightedCluster{}
		for _, s := range c.shares {
			w.Clusters = append(w.Clusters, &tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight{Name: s.cluster, Weight: s.weight})
		}
		proxy.ClusterSpecifier = &tcpproxyv3.TcpProxy_WeightedClusters{WeightedClusters: w}
	}
	match := &listenerv3.FilterChainMatch{ServerNames: c.names, ApplicationProtocols: c.alpn}
	if c.tls && len(c.names) == 0 {
		match.TransportProtocol = "tls"
	}
	return &listenerv3.FilterChain{
		Name:             c.name,
		FilterChainMatch: match,
		Filters:          append(filters, filter("envoy.filters.network.tcp_proxy", proxy)),
	}
}

func clusterFromServerName() *setstatev3.Config {
	format := &corev3.SubstitutionFormatString{Format: &corev3.SubstitutionFormatString_TextFormatSource{
		TextFormatSource: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: PodPrefix + "%REQUESTED_SERVER_NAME%"}},
	}}
	return &setstatev3.Config{OnNewConnection: []*filterstatev3.FilterStateValue{{
		Key:   &filterstatev3.FilterStateValue_ObjectKey{ObjectKey: clusterKey},
		Value: &filterstatev3.FilterStateValue_FormatString{FormatString: format},
	}}}
}

func (o Options) listener(name string, port uint32, chains []*listenerv3.FilterChain) *listenerv3.Listener {
	host := "0.0.0.0"
	if o.Address.IsValid() {
		host = o.Address.String()
	}
	l := &listenerv3.Listener{
		Name:    name,
		Address: address(host, port),
		ListenerFilters: []*listenerv3.ListenerFilter{{
			Name:       "envoy.filters.listener.tls_inspector",
			ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(&inspectorv3.TlsInspector{})},
		}},
		ListenerFiltersTimeout:        durationpb.New(helloTimeout),
		FilterChains:                  chains,
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		SocketOptions: []*corev3.SocketOption{ // accepted sockets take them over; Linux numbers
			socketOption("SO_KEEPALIVE", 1, 9, 1),
			socketOption("TCP_KEEPIDLE", 6, 4, keepaliveTime),
			socketOption("TCP_KEEPINTVL", 6, 5, keepaliveEvery),
			socketOption("TCP_KEEPCNT", 6, 6, keepaliveProbes),
		},
	}
	if o.IPv6 {
		l.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: address("::", port)}}
	}
	return l
}

// cluster returns a STATIC cluster without a limit on connections: those that count are the pods' own.
func cluster(name string, targets []target) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(connectTimeout),
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections:     wrapperspb.UInt32(math.MaxUint32),
			MaxPendingRequests: wrapperspb.UInt32(math.MaxUint32),
		}}},
		UpstreamConnectionOptions: &clusterv3.UpstreamConnectionOptions{TcpKeepalive: &corev3.TcpKeepalive{
			KeepaliveTime:     wrapperspb.UInt32(keepaliveTime),
			KeepaliveInterval: wrapperspb.UInt32(keepaliveEvery),
			KeepaliveProbes:   wrapperspb.UInt32(keepaliveProbes),
		}},
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name},
	}
	if len(targets) == 0 {
		return c
	}
	locality := &endpointv3.LocalityLbEndpoints{}
	for _, t := range targets {
		if t.host != "" {
			c.ClusterDiscoveryType = &clusterv3.Cluster_ClusterType{ClusterType: &clusterv3.Cluster_CustomClusterType{
				Name: "envoy.clusters.dns", TypedConfig: pack(&dnsv3.DnsCluster{RespectDnsTtl: true, DnsLookupFamily: dnscommonv3.DnsLookupFamily_ALL}),
			}}
		}
		locality.LbEndpoints = append(locality.LbEndpoints, t.proto())
	}
	c.LoadAssignment.Endpoints = []*endpointv3.LocalityLbEndpoints{locality}
	return c
}

func (t target) proto() *endpointv3.LbEndpoint {
	e := &endpointv3.Endpoint{Address: address(t.host, t.port)}
	for i, a := range t.addrs {
		if i == 0 {
			e.Address = socketAddress(a)
			continue
		}
		e.AdditionalAddresses = append(e.AdditionalAddresses, &endpointv3.Endpoint_AdditionalAddress{Address: socketAddress(a)})
	}
	out := &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: e}}
	if t.weight > 1 {
		out.LoadBalancingWeight = wrapperspb.UInt32(t.weight)
	}
	return out
}

func socketAddress(a netip.AddrPort) *corev3.Address {
	return address(a.Addr().String(), uint32(a.Port()))
}

func address(host string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:       host,
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

func socketOption(description string, level, name, value int64) *corev3.SocketOption {
	return &corev3.SocketOption{
		Description: description, Level: level, Name: name,
		Value: &corev3.SocketOption_IntValue{IntValue: value},
		State: corev3.SocketOption_STATE_LISTENING,
	}
}

func filter(name string, config proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(config)}}
}

// pack encodes m with the same bytes every time. It can fail only for text that is not UTF-8, and every name was
// checked before.
func pack(m proto.Message) *anypb.Any {
	out := &anypb.Any{}
	if err := anypb.MarshalFrom(out, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		panic("encode " + string(m.ProtoReflect().Descriptor().FullName()) + ": " + err.Error())
	}
	return out
}
