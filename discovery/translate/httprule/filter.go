//lint:file-ignore SA1019 users still write the fields that Istio has deprecated

package httprule

import (
	"strings"

	faultcommonv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/fault/v3"
	corsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/cors/v3"
	faultv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// Names of the HTTP filters that a route may change.
const (
	CorsFilter  = "envoy.filters.http.cors"
	FaultFilter = "envoy.filters.http.fault"
)

// PerRoute returns the settings of HTTP filters that a route changes, nil when there are none.
func PerRoute(h *networking.HTTPRoute) map[string]*anypb.Any {
	out := map[string]*anypb.Any{}
	if f := fault(h.GetFault()); f != nil {
		out[FaultFilter] = wire.Pack(f)
	}
	if c := h.GetCorsPolicy(); c != nil {
		out[CorsFilter] = wire.Pack(cors(c))
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

func fault(f *networking.HTTPFaultInjection) *faultv3.HTTPFault {
	out := &faultv3.HTTPFault{}
	if d := f.GetDelay(); d.GetFixedDelay() != nil {
		share := d.GetPercentage().GetValue()
		if d.GetPercentage() == nil {
			share = deprecatedPercent(d.GetPercent())
		}
		out.Delay = &faultcommonv3.FaultDelay{
			FaultDelaySecifier: &faultcommonv3.FaultDelay_FixedDelay{FixedDelay: d.GetFixedDelay()}, Percentage: wire.Percent(share),
		}
	}
	if a := f.GetAbort(); a != nil {
		share := 100.0
		if a.GetPercentage() != nil {
			share = a.GetPercentage().GetValue()
		}
		abort := &faultv3.FaultAbort{Percentage: wire.Percent(share)}
		switch e := a.GetErrorType().(type) {
		case *networking.HTTPFaultInjection_Abort_HttpStatus:
			abort.ErrorType = &faultv3.FaultAbort_HttpStatus{HttpStatus: uint32(e.HttpStatus)}
		case *networking.HTTPFaultInjection_Abort_GrpcStatus:
			if code, ok := grpcCodes[strings.ToUpper(e.GrpcStatus)]; ok {
				abort.ErrorType = &faultv3.FaultAbort_GrpcStatus{GrpcStatus: code}
			}
		}
		if abort.ErrorType != nil {
			out.Abort = abort
		}
	}
	if out.Delay == nil && out.Abort == nil {
		return nil
	}
	return out
}

// deprecatedPercent reads the integer field, whose absence means all requests.
func deprecatedPercent(p int32) float64 {
	if p == 0 {
		return 100
	}
	return float64(p)
}

var grpcCodes = map[string]uint32{
	"OK": 0, "CANCELLED": 1, "UNKNOWN": 2, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5, "ALREADY_EXISTS": 6,
	"PERMISSION_DENIED": 7, "RESOURCE_EXHAUSTED": 8, "FAILED_PRECONDITION": 9, "ABORTED": 10, "OUT_OF_RANGE": 11,
	"UNIMPLEMENTED": 12, "INTERNAL": 13, "UNAVAILABLE": 14, "DATA_LOSS": 15, "UNAUTHENTICATED": 16,
}

func cors(c *networking.CorsPolicy) *corsv3.CorsPolicy {
	out := &corsv3.CorsPolicy{
		AllowMethods: strings.Join(c.GetAllowMethods(), ","), AllowHeaders: strings.Join(c.GetAllowHeaders(), ","),
		ExposeHeaders: strings.Join(c.GetExposeHeaders(), ","), AllowCredentials: c.GetAllowCredentials(),
	}
	if c.GetMaxAge() != nil {
		out.MaxAge = maxAge(c.GetMaxAge().AsDuration())
	}
	for _, o := range c.GetAllowOrigins() {
		if m := stringMatch(o); m != nil {
			out.AllowOriginStringMatch = append(out.AllowOriginStringMatch, m)
		}
	}
	for _, o := range c.GetAllowOrigin() {
		m := wire.Exact(o)
		if o == "*" {
			m = &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: wire.Regex(".*")}}
		}
		out.AllowOriginStringMatch = append(out.AllowOriginStringMatch, m)
	}
	if c.GetUnmatchedPreflights() == networking.CorsPolicy_IGNORE {
		out.ForwardNotMatchingPreflights = wire.No()
	}
	return out
}
