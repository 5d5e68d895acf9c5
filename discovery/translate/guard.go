package translate

import (
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"

	"github.com/isthmus-mesh/isthmus/discovery/translate/authz"
	"github.com/isthmus-mesh/isthmus/discovery/translate/jwt"
)

// guard is what policies put in front of the traffic that comes to a workload or a gateway.
type guard struct {
	http     []*hcmv3.HttpFilter  // of connection managers
	tcp      []*listenerv3.Filter // of chains that pass bytes on
	clusters []*clusterv3.Cluster // that the filters call, beside those of services
}

// guard returns what RequestAuthentications and AuthorizationPolicies ask for. It is the same at each port.
func (v *view) guard() guard {
	var g guard
	tokens, clusters, problems := jwt.Filter(v.full, v.proxy)
	if tokens != nil {
		g.http, g.clusters = append(g.http, tokens), clusters
	}
	rules, more := authz.For(v.full, v.proxy)
	g.http, g.tcp = append(g.http, rules.HTTP...), rules.TCP
	v.problems.list = append(append(v.problems.list, problems...), more...)
	return g
}

// before puts the filters of a guard in front of those of a chain.
func (g guard) before(filters ...*listenerv3.Filter) []*listenerv3.Filter {
	return append(g.tcp[:len(g.tcp):len(g.tcp)], filters...)
}
