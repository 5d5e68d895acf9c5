package inject

import (
	"cmp"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	meshconfig "istio.io/api/mesh/v1alpha1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// lay lays what a ProxyConfig says over another. A concurrency of 0 says something: all cores.
func lay(under, over *meshconfig.ProxyConfig) {
	proto.Merge(under, over)
	if over.GetConcurrency() != nil {
		under.Concurrency = over.GetConcurrency()
	}
}

// said is what an object of kind ProxyConfig says, as a part of the mesh's defaultConfig.
func said(p *mesh.ProxyConfig) *meshconfig.ProxyConfig {
	if p == nil {
		return &meshconfig.ProxyConfig{}
	}
	return &meshconfig.ProxyConfig{Concurrency: p.Spec.GetConcurrency(), ProxyMetadata: p.Spec.GetEnvironmentVariables()}
}

// proxyConfigs are the objects that are for a Pod: that of the root namespace, that of its own, and the one that selects
// it. Of several of a kind the oldest counts, as with Istio.
type proxyConfigs struct{ root, namespace, workload *mesh.ProxyConfig }

func proxyConfigsFor(all []*mesh.ProxyConfig, root, namespace string, labels map[string]string) (out proxyConfigs) {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b *mesh.ProxyConfig) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Object.String(), b.Object.String()))
	})
	first := func(at **mesh.ProxyConfig, p *mesh.ProxyConfig) {
		if *at == nil {
			*at = p
		}
	}
	for _, p := range all {
		selector := p.Spec.GetSelector().GetMatchLabels()
		switch {
		case p.Object.Namespace == namespace && len(selector) > 0:
			matches := true
			for k, v := range selector {
				matches = matches && labels[k] == v
			}
			if matches {
				first(&out.workload, p)
			}
		case len(selector) > 0:
		case p.Object.Namespace == root:
			first(&out.root, p)
		case p.Object.Namespace == namespace:
			first(&out.namespace, p)
		}
	}
	return out
}
