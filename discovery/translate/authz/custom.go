package authz

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	httpauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	tcpauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/ext_authz/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	meshconfig "istio.io/api/mesh/v1alpha1"
	security "istio.io/api/security/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

const (
	httpAuthz = "envoy.filters.http.ext_authz"
	tcpAuthz  = "envoy.filters.network.ext_authz"

	// customPrefix begins the names of rules that ask an authorizer, customShadow the metadata that names the one that matched.
	customPrefix = "istio-ext-authz-"
	customShadow = "istio_ext_authz_"

	// authorizerTimeout is how long Istio waits for an answer when the provider does not say.
	authorizerTimeout = 600 * time.Second
)

type provider = meshconfig.MeshConfig_ExtensionProvider

// custom adds, for each provider that a CUSTOM policy names, a filter that marks what the policies match and one that
// asks the provider about what is marked. A provider that cannot be asked is taken to refuse.
func (b *builder) custom() {
	by := map[string][]*mesh.AuthorizationPolicy{}
	for _, p := range b.of(security.AuthorizationPolicy_CUSTOM, false) {
		name := p.Spec.GetProvider().GetName()
		by[name] = append(by[name], p)
	}
	for _, name := range slices.Sorted(maps.Keys(by)) {
		policies := by[name]
		p, why := b.provider(name)
		if why != "" {
			for _, x := range policies {
				b.problem(x.Object, "spec.provider.name", "UnknownProvider", why+"; what the policy matches is refused", "correct meshConfig.extensionProviders, or name a provider that it has")
			}
			b.add(false, b.rules(policies, rbacv3.RBAC_DENY, false, customPrefix), nil, "")
			b.add(true, b.rules(policies, rbacv3.RBAC_DENY, true, customPrefix), nil, "")
			continue
		}
		shadow := customShadow + name + "_"
		b.add(false, nil, b.rules(policies, rbacv3.RBAC_DENY, false, customPrefix), shadow)
		b.out.HTTP = append(b.out.HTTP, httpFilter(httpAuthz, httpAuthorizer(p, marked(httpFilterName, shadow))))
		if g := p.GetEnvoyExtAuthzGrpc(); g != nil { // the others understand requests only
			b.add(true, nil, b.rules(policies, rbacv3.RBAC_DENY, true, customPrefix), shadow)
			b.out.TCP = append(b.out.TCP, &listenerv3.Filter{Name: tcpAuthz, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: wire.Pack(&tcpauthzv3.ExtAuthz{
				StatPrefix: "tcp.", FailureModeAllow: g.GetFailOpen(), TransportApiVersion: corev3.ApiVersion_V3,
				GrpcService: grpcService(g), FilterEnabledMetadata: marked(tcpFilterName, shadow),
			})}})
		}
	}
}

// marked matches what the RBAC filter before found to match.
func marked(filter, shadow string) *matcherv3.MetadataMatcher {
	return metadata(filter, &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_StringMatch{
		StringMatch: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: customPrefix}},
	}}, shadow+"shadow_effective_policy_id")
}

// provider returns the authorizer of that name, and the cluster of its service in place of the service's name.
func (b *builder) provider(name string) (*provider, string) {
	var found *provider
	if b.snap.MeshConfig != nil {
		for _, p := range b.snap.MeshConfig.Spec.GetExtensionProviders() {
			if p.GetName() == name && found == nil {
				found = p
			}
		}
	}
	if found == nil {
		return nil, fmt.Sprintf("meshConfig.extensionProviders has no %q", name)
	}
	found = proto.Clone(found).(*provider)
	var why string
	switch {
	case found.GetEnvoyExtAuthzHttp() != nil:
		h := found.GetEnvoyExtAuthzHttp()
		h.Service, why = b.clusterOf(h.GetService(), h.GetPort())
		if _, ok := statusOf(h.GetStatusOnError()); !ok && why == "" {
			why = fmt.Sprintf("statusOnError %q of provider %s is not an HTTP status", h.GetStatusOnError(), name)
		}
		if why == "" && h.GetPathPrefix() != "" && !strings.HasPrefix(h.GetPathPrefix(), "/") {
			why = fmt.Sprintf("pathPrefix %q of provider %s does not begin with a slash", h.GetPathPrefix(), name)
		}
	case found.GetEnvoyExtAuthzGrpc() != nil:
		g := found.GetEnvoyExtAuthzGrpc()
		g.Service, why = b.clusterOf(g.GetService(), g.GetPort())
		if _, ok := statusOf(g.GetStatusOnError()); !ok && why == "" {
			why = fmt.Sprintf("statusOnError %q of provider %s is not an HTTP status", g.GetStatusOnError(), name)
		}
	default:
		why = fmt.Sprintf("provider %s is neither envoyExtAuthzHttp nor envoyExtAuthzGrpc", name)
	}
	return found, why
}

// clusterOf returns the cluster that every proxy has for a port of a service, which may stand behind NAMESPACE/.
func (b *builder) clusterOf(service string, port uint32) (cluster, why string) {
	_, host, ok := strings.Cut(service, "/")
	if !ok {
		host = service
	}
	host = strings.ToLower(host)
	s := b.snap.Service(host)
	if s == nil {
		return "", "the service " + strconv.Quote(service) + " is not known"
	}
	if _, ok := s.Port(port); !ok {
		return "", fmt.Sprintf("the service %s has no port %d", host, port)
	}
	return "outbound|" + wire.Itoa(port) + "||" + host, ""
}

func httpFilter(name string, config proto.Message) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: wire.Pack(config)}}
}

func httpAuthorizer(p *provider, when *matcherv3.MetadataMatcher) *httpauthzv3.ExtAuthz {
	out := &httpauthzv3.ExtAuthz{TransportApiVersion: corev3.ApiVersion_V3, FilterEnabledMetadata: when}
	body := p.GetEnvoyExtAuthzGrpc().GetIncludeRequestBodyInCheck()
	if g := p.GetEnvoyExtAuthzGrpc(); g != nil {
		out.FailureModeAllow, out.ClearRouteCache = g.GetFailOpen(), g.GetClearRouteCache()
		out.StatusOnError, _ = statusOf(g.GetStatusOnError())
		out.Services = &httpauthzv3.ExtAuthz_GrpcService{GrpcService: grpcService(g)}
	}
	if h := p.GetEnvoyExtAuthzHttp(); h != nil {
		body = h.GetIncludeRequestBodyInCheck()
		out.FailureModeAllow, out.ClearRouteCache = h.GetFailOpen(), h.GetClearRouteCache()
		out.StatusOnError, _ = statusOf(h.GetStatusOnError())
		out.AllowedHeaders = patterns(slices.Concat(h.GetIncludeHeadersInCheck(), h.GetIncludeRequestHeadersInCheck()))
		out.Services = &httpauthzv3.ExtAuthz_HttpService{HttpService: httpService(h)}
	}
	if body != nil {
		out.WithRequestBody = &httpauthzv3.BufferSettings{
			MaxRequestBytes: body.GetMaxRequestBytes(), AllowPartialMessage: body.GetAllowPartialMessage(), PackAsBytes: body.GetPackAsBytes(),
		}
	}
	return out
}

func httpService(h *meshconfig.MeshConfig_ExtensionProvider_EnvoyExternalAuthorizationHttpProvider) *httpauthzv3.HttpService {
	_, host, _ := cutLast(h.GetService(), "|")
	var add []*corev3.HeaderValue
	for _, k := range slices.Sorted(maps.Keys(h.GetIncludeAdditionalHeadersInCheck())) {
		add = append(add, &corev3.HeaderValue{Key: k, Value: h.GetIncludeAdditionalHeadersInCheck()[k]})
	}
	out := &httpauthzv3.HttpService{
		PathPrefix: h.GetPathPrefix(),
		ServerUri: &corev3.HttpUri{
			Uri: "http://" + host, Timeout: timeout(h.GetTimeout()), HttpUpstreamType: &corev3.HttpUri_Cluster{Cluster: h.GetService()},
		},
		AuthorizationResponse: &httpauthzv3.AuthorizationResponse{
			AllowedUpstreamHeaders: patterns(h.GetHeadersToUpstreamOnAllow()), AllowedClientHeaders: patterns(h.GetHeadersToDownstreamOnDeny()),
			AllowedClientHeadersOnSuccess: patterns(h.GetHeadersToDownstreamOnAllow()),
		},
	}
	if len(add) > 0 {
		out.AuthorizationRequest = &httpauthzv3.AuthorizationRequest{HeadersToAdd: add}
	}
	return out
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+len(sep):], true
}

func grpcService(g *meshconfig.MeshConfig_ExtensionProvider_EnvoyExternalAuthorizationGrpcProvider) *corev3.GrpcService {
	_, host, _ := cutLast(g.GetService(), "|")
	return &corev3.GrpcService{
		Timeout:         timeout(g.GetTimeout()),
		TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: g.GetService(), Authority: host}},
	}
}

func timeout(d *durationpb.Duration) *durationpb.Duration {
	if d == nil {
		return wire.Duration(authorizerTimeout)
	}
	return d
}

func statusOf(text string) (*typev3.HttpStatus, bool) {
	if text == "" {
		return nil, true
	}
	n, err := strconv.Atoi(text)
	if err != nil || typev3.StatusCode_name[int32(n)] == "" {
		return nil, false
	}
	return &typev3.HttpStatus{Code: typev3.StatusCode(n)}, true
}

func patterns(names []string) *matcherv3.ListStringMatcher {
	if len(names) == 0 {
		return nil
	}
	out := &matcherv3.ListStringMatcher{}
	for _, n := range names {
		out.Patterns = append(out.Patterns, text(n, true))
	}
	return out
}
