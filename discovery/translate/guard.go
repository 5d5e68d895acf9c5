package translate

import (
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	meshconfig "istio.io/api/mesh/v1alpha1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/authz"
	"github.com/isthmus-mesh/isthmus/discovery/translate/dynamic"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/jwt"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// resolvers are the filters of connection managers that find the servers of wildcard hosts.
func (v *view) resolvers() []*hcmv3.HttpFilter { return dynamic.Filters(v.scope.Services()) }

// manager is a connection manager of what leaves.
func (v *view) manager(m *hcmv3.HttpConnectionManager) *listenerv3.Filter {
	m.HttpProtocolOptions = httprule.Versions(v.proxy.Metadata)
	return connectionManager(m, v.resolvers()...)
}

// guard is what policies put in front of the traffic that comes to a workload or a gateway.
type guard struct {
	http     []*hcmv3.HttpFilter // of connection managers
	paths    meshconfig.MeshConfig_ProxyPathNormalization_NormalizationType
	tcp      []*listenerv3.Filter // of chains that pass bytes on
	clusters []*clusterv3.Cluster // that the filters call, beside those of services
	http10   *corev3.Http1ProtocolOptions
	local    *mesh.Cluster
}

// guard returns what RequestAuthentications and AuthorizationPolicies ask for. It is the same at each port.
func (v *view) guard() guard {
	g := guard{local: v.snap.Local, http10: httprule.Versions(v.proxy.Metadata), paths: v.meshConfig().GetPathNormalization().GetNormalization()}
	tokens, clusters, problems := jwt.Filter(v.full, v.proxy)
	if tokens != nil {
		g.http, g.clusters = append(g.http, tokens), clusters
	}
	rules, more := authz.For(v.full, v.proxy)
	g.http, g.tcp = append(g.http, rules.HTTP...), rules.TCP
	v.problems.list = append(append(v.problems.list, problems...), more...)
	return g
}

// manager is a connection manager with the guard's filters, which see paths as pathNormalization of the mesh says.
func (g guard) manager(m *hcmv3.HttpConnectionManager, more ...*hcmv3.HttpFilter) *listenerv3.Filter {
	m.HttpProtocolOptions = g.http10
	switch g.paths {
	case meshconfig.MeshConfig_ProxyPathNormalization_NONE:
		m.NormalizePath = wire.No()
	case meshconfig.MeshConfig_ProxyPathNormalization_DECODE_AND_MERGE_SLASHES:
		m.PathWithEscapedSlashesAction = hcmv3.HttpConnectionManager_UNESCAPE_AND_FORWARD
		m.MergeSlashes = true
	case meshconfig.MeshConfig_ProxyPathNormalization_MERGE_SLASHES:
		m.MergeSlashes = true
	}
	return connectionManager(m, append(slices.Clone(g.http), more...)...)
}

// before puts the filters of a guard in front of those of a chain.
func (g guard) before(filters ...*listenerv3.Filter) []*listenerv3.Filter {
	return append(g.tcp[:len(g.tcp):len(g.tcp)], filters...)
}
