// Package wire builds the small Envoy values that every resource is made of. It knows nothing of the mesh.
package wire

import (
	"math"
	"net/netip"
	"strconv"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Pack encodes m into an Any, map entries in order. Encoding fails only for strings that are not UTF-8; Envoy then
// refuses the empty message, and with it this one resource.
func Pack(m proto.Message) *anypb.Any {
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		value = nil
	}
	return &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Value: value}
}

// Duration is d as Envoy writes it.
func Duration(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

// U32 is a number that may be unset.
func U32(n uint32) *wrapperspb.UInt32Value { return wrapperspb.UInt32(n) }

// U64 is a number that may be unset.
func U64(n uint64) *wrapperspb.UInt64Value { return wrapperspb.UInt64(n) }

// Yes is a true that differs from unset.
func Yes() *wrapperspb.BoolValue { return wrapperspb.Bool(true) }

// No is a false that differs from unset.
func No() *wrapperspb.BoolValue { return wrapperspb.Bool(false) }

// Itoa writes a number in decimal.
func Itoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

// ADS is the configuration source "this resource comes over the aggregated stream".
func ADS(timeout time.Duration) *corev3.ConfigSource {
	c := &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		ResourceApiVersion:    corev3.ApiVersion_V3,
	}
	if timeout > 0 {
		c.InitialFetchTimeout = Duration(timeout)
	}
	return c
}

// GRPC is the configuration source of a static bootstrap cluster.
func GRPC(cluster string) *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion: corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
			ApiType: corev3.ApiConfigSource_GRPC, TransportApiVersion: corev3.ApiVersion_V3, SetNodeOnFirstMessageOnly: true,
			GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
				EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: cluster},
			}}},
		}},
	}
}

// Socket is an IP address, or a host name where Envoy resolves it, and a port.
func Socket(address string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: address, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

// Pipe is a unix socket; a path that begins with "@" is in Linux' abstract namespace.
func Pipe(path string) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path}}}
}

// Internal is an address at an internal listener; endpoint keeps hosts apart that share the listener.
func Internal(listener, endpoint string) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
		AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: listener}, EndpointId: endpoint,
	}}}
}

// JoinHostPort writes IPv6 addresses in brackets.
func JoinHostPort(a netip.Addr, port uint32) string { return HostAddress(a) + ":" + Itoa(port) }

// HostAddress writes an address as in a URL, IPv6 in brackets.
func HostAddress(a netip.Addr) string {
	if a.Is4() {
		return a.String()
	}
	return "[" + a.String() + "]"
}

// Ranges are addresses and ranges of addresses; what is neither is left out.
func Ranges(subnets []string) []*corev3.CidrRange {
	var out []netip.Prefix
	for _, s := range subnets {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p)
		} else if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return Prefixes(out)
}

// Prefixes are ranges of addresses.
func Prefixes(list []netip.Prefix) []*corev3.CidrRange {
	var out []*corev3.CidrRange
	for _, p := range list {
		out = append(out, &corev3.CidrRange{AddressPrefix: p.Masked().Addr().String(), PrefixLen: U32(uint32(p.Bits()))})
	}
	return out
}

// Regex is an RE2 expression that must match the whole value.
func Regex(expr string) *matcherv3.RegexMatcher { return &matcherv3.RegexMatcher{Regex: expr} }

// Exact matches the value itself.
func Exact(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
}

// Strings is a struct of names and string values, given in turn.
func Strings(kv ...string) *structpb.Struct {
	s := &structpb.Struct{Fields: make(map[string]*structpb.Value, len(kv)/2)}
	for i := 0; i+1 < len(kv); i += 2 {
		s.Fields[kv[i]] = structpb.NewStringValue(kv[i+1])
	}
	return s
}

// Percent is an Envoy fraction in steps of 0.0001 %.
func Percent(p float64) *typev3.FractionalPercent {
	return &typev3.FractionalPercent{
		Numerator: uint32(min(max(p, 0), 100) * 10000), Denominator: typev3.FractionalPercent_MILLION,
	}
}

// Unlimited lifts Envoy's default limits (1,024 connections), which would fail requests that no rule limits.
func Unlimited() *clusterv3.CircuitBreakers {
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections: U32(math.MaxUint32), MaxPendingRequests: U32(math.MaxUint32),
		MaxRequests: U32(math.MaxUint32), MaxRetries: U32(math.MaxUint32),
	}}}
}
