// Package jwt turns the RequestAuthentications of one workload into Envoy's JWT filter. It is pure: keys that stand
// behind a URL are fetched by Envoy itself, so that no control plane calls where users' objects point.
package jwt

import (
	"cmp"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	jwtv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/jwt_authn/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/emptypb"
	security "istio.io/api/security/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/target"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// Where the claims of an accepted token are found in the request's metadata.
const (
	MetadataNamespace = "envoy.filters.http.jwt_authn"
	PayloadKey        = "payload"
)

const (
	filterName  = "envoy.filters.http.jwt_authn"
	systemRoots = "/etc/ssl/certs/ca-certificates.crt"

	// keysTimeout bounds one fetch of keys where the rule does not, keysLast how long fetched keys are used.
	keysTimeout = 5 * time.Second
	keysLast    = 20 * time.Minute
)

// Filter returns the filter of p's workload, nil for none, the clusters it fetches keys from, and what could not be
// honoured. A token of an issuer whose keys are not known is refused.
func Filter(snap *mesh.Snapshot, p *mesh.Proxy) (*hcmv3.HttpFilter, []*clusterv3.Cluster, []mesh.Problem) {
	b := &builder{snap: snap, routed: p.Type == mesh.Router, config: &jwtv3.JwtAuthentication{Providers: map[string]*jwtv3.JwtProvider{}, BypassCorsPreflight: true}}
	root := target.Root(snap)
	for _, ra := range snap.RequestAuthentications {
		s := ra.Spec
		refs := s.GetTargetRefs()
		if len(refs) == 0 && s.GetTargetRef() != nil {
			refs = append(refs, s.GetTargetRef())
		}
		if !target.Applies(root, p, ra.Object.Namespace, s.GetSelector().GetMatchLabels(), refs) {
			continue
		}
		if ra.Closed {
			b.closed(ra.Object)
		}
		for i, r := range s.GetJwtRules() {
			b.rule(ra.Object, i, r)
		}
	}
	if len(b.names) == 0 {
		return nil, nil, nil
	}
	b.config.Rules = []*jwtv3.RequirementRule{{
		Match:           &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		RequirementType: &jwtv3.RequirementRule_Requires{Requires: b.requirement()},
	}}
	return &hcmv3.HttpFilter{Name: filterName, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: wire.Pack(b.config)}}, b.clusters, b.problems
}

type builder struct {
	snap     *mesh.Snapshot
	routed   bool // routes may ask for claims: they are chosen again when a token is accepted
	config   *jwtv3.JwtAuthentication
	names    []string // of the providers, in the order of the rules
	clusters []*clusterv3.Cluster
	problems []mesh.Problem
}

// closed takes no token: a provider of any issuer, whose keys nobody has.
func (b *builder) closed(object mesh.ObjectRef) {
	name := fmt.Sprintf("ns[%s]-request[%s]-closed", object.Namespace, object.Name)
	b.config.Providers[name] = &jwtv3.JwtProvider{
		JwksSourceSpecifier: &jwtv3.JwtProvider_LocalJwks{LocalJwks: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: nobodysKeys}}},
	}
	b.names = append(b.names, name)
}

func (b *builder) rule(object mesh.ObjectRef, i int, r *security.JWTRule) {
	name := fmt.Sprintf("ns[%s]-request[%s]-rule[%d]", object.Namespace, object.Name, i)
	p := &jwtv3.JwtProvider{
		Issuer: r.GetIssuer(), Audiences: r.GetAudiences(), Forward: r.GetForwardOriginalToken(),
		FromParams: r.GetFromParams(), FromCookies: r.GetFromCookies(), ForwardPayloadHeader: r.GetOutputPayloadToHeader(),
		PayloadInMetadata: PayloadKey, ClearRouteCache: b.routed,
		NormalizePayloadInMetadata: &jwtv3.JwtProvider_NormalizePayload{
			SpaceDelimitedClaims: slices.Compact(slices.Sorted(slices.Values(append([]string{"permission", "scope"}, r.GetSpaceDelimitedClaims()...)))),
		},
	}
	for _, h := range r.GetFromHeaders() {
		p.FromHeaders = append(p.FromHeaders, &jwtv3.JwtHeader{Name: h.GetName(), ValuePrefix: h.GetPrefix()})
	}
	for _, c := range r.GetOutputClaimToHeaders() {
		p.ClaimToHeaders = append(p.ClaimToHeaders, &jwtv3.JwtClaimToHeader{HeaderName: c.GetHeader(), ClaimName: c.GetClaim()})
	}
	b.keys(object, fmt.Sprintf("spec.jwtRules[%d]", i), r, p)
	b.config.Providers[name], b.names = p, append(b.names, name)
}

// keys says where a rule's keys come from. Without any, every token of the issuer is refused.
func (b *builder) keys(object mesh.ObjectRef, at string, r *security.JWTRule, p *jwtv3.JwtProvider) {
	local := func(text string) {
		p.JwksSourceSpecifier = &jwtv3.JwtProvider_LocalJwks{LocalJwks: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: text}}}
	}
	unknown := func(field, why string) {
		b.problems = append(b.problems, mesh.Problem{
			Object: object, Field: at + field, Reason: "NoKeys", Message: why + "; every token of the issuer is refused", Remedy: "write the URL of the keys, or the keys themselves in jwks",
		})
		local(nobodysKeys)
	}
	if r.GetJwks() != "" {
		if set, ok := usable(r.GetJwks()); ok {
			local(set)
		} else {
			unknown(".jwks", "there is no key that can be used (RSA, EC on P-256, P-384 or P-521, Ed25519, or a shared secret)")
		}
		return
	}
	cluster, err := b.cluster(r.GetJwksUri())
	if err != nil {
		unknown(".jwksUri", err.Error())
		return
	}
	timeout := r.GetTimeout()
	if timeout == nil {
		timeout = wire.Duration(keysTimeout)
	}
	p.JwksSourceSpecifier = &jwtv3.JwtProvider_RemoteJwks{RemoteJwks: &jwtv3.RemoteJwks{
		HttpUri:       &corev3.HttpUri{Uri: r.GetJwksUri(), HttpUpstreamType: &corev3.HttpUri_Cluster{Cluster: cluster}, Timeout: timeout},
		CacheDuration: wire.Duration(keysLast),
		// The listener does not wait for an issuer that is away; a request that comes before the keys is refused.
		AsyncFetch: &jwtv3.JwksAsyncFetch{FastListener: true},
	}}
}

// cluster returns the name of the cluster that serves the URL: that of a service of the mesh, or one of its own.
func (b *builder) cluster(text string) (string, error) {
	if text == "" {
		return "", fmt.Errorf("the rule names no keys; they are not looked up at the issuer")
	}
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https" {
		return "", fmt.Errorf("%q is not a URL of HTTP", text)
	}
	port, err := strconv.ParseUint(cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme]), 10, 16)
	if err != nil || port == 0 {
		return "", fmt.Errorf("%q has no valid port", text)
	}
	host := strings.ToLower(u.Hostname())
	if s := b.snap.Service(host); s != nil && u.Scheme == "http" && !s.External {
		if _, ok := s.Port(uint32(port)); ok {
			return "outbound|" + wire.Itoa(uint32(port)) + "||" + host, nil
		}
	}
	c := keysCluster(u.Scheme, host, uint32(port))
	if !slices.ContainsFunc(b.clusters, func(x *clusterv3.Cluster) bool { return x.Name == c.Name }) {
		b.clusters = append(b.clusters, c)
	}
	return c.Name, nil
}

// keysCluster reaches a host outside by the name that DNS has; over HTTPS the certificate must be the host's.
func keysCluster(scheme, host string, port uint32) *clusterv3.Cluster {
	name := "keys|" + scheme + "|" + wire.Itoa(port) + "|" + host
	out := &clusterv3.Cluster{
		Name: name, ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STRICT_DNS}, ConnectTimeout: wire.Duration(keysTimeout),
		DnsLookupFamily: clusterv3.Cluster_ALL,
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: wire.Socket(host, port)}}}},
		}}},
	}
	if scheme == "https" {
		serverName, kind := host, tlsv3.SubjectAltNameMatcher_DNS
		if _, err := netip.ParseAddr(host); err == nil { // an address is no server name
			serverName, kind = "", tlsv3.SubjectAltNameMatcher_IP_ADDRESS
		}
		out.TransportSocket = &corev3.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: wire.Pack(&tlsv3.UpstreamTlsContext{
			Sni: serverName,
			CommonTlsContext: &tlsv3.CommonTlsContext{ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
				TrustedCa:                 &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: systemRoots}},
				MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{SanType: kind, Matcher: wire.Exact(host)}},
			}}},
		})}}
	}
	return out
}

// requirement lets requests without a token pass, and refuses those with one that no rule takes. A token that one rule
// takes suffices: rules may look for theirs in the same place.
func (b *builder) requirement() *jwtv3.JwtRequirement {
	var any, all []*jwtv3.JwtRequirement
	for _, name := range b.names {
		one := &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_ProviderName{ProviderName: name}}
		any = append(any, one)
		all = append(all, anyOf([]*jwtv3.JwtRequirement{one, {RequiresType: &jwtv3.JwtRequirement_AllowMissing{AllowMissing: &emptypb.Empty{}}}}))
	}
	if len(all) == 1 {
		return all[0]
	}
	return anyOf(append(any, &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_RequiresAll{RequiresAll: &jwtv3.JwtRequirementAndList{Requirements: all}}}))
}

func anyOf(list []*jwtv3.JwtRequirement) *jwtv3.JwtRequirement {
	return &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_RequiresAny{RequiresAny: &jwtv3.JwtRequirementOrList{Requirements: list}}}
}
