package patch

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	envoyfilter "istio.io/api/networking/v1alpha3"
)

// clusters applies a patch to the clusters.
func (a *applier) clusters() (err error) {
	e := edit[*clusterv3.Cluster]{match: a.matchesCluster, fresh: func() *clusterv3.Cluster { return &clusterv3.Cluster{} }}
	a.out.Clusters, err = patched(a, Cluster, e, a.out.Clusters)
	return err
}

// touchChanged notes the patch at what is new or another.
func (a *applier) touchChanged(kind Kind, before, after map[string]any) {
	for name, x := range after {
		if was, ok := before[name]; !ok || was != x {
			a.touch(kind, name)
		}
	}
	for name := range before {
		if _, ok := after[name]; !ok {
			a.touch(kind, name)
		}
	}
}

func (a *applier) matchesCluster(c *clusterv3.Cluster) bool {
	inbound := strings.HasPrefix(c.GetName(), "inbound|") || strings.HasPrefix(c.GetName(), "Inbound")
	if !a.inContext(inbound) {
		return false
	}
	m := a.patch.GetMatch().GetCluster()
	if m == nil {
		return true
	}
	if m.GetName() != "" {
		return m.GetName() == c.GetName()
	}
	if m.GetPortNumber() == 0 && m.GetService() == "" && m.GetSubset() == "" {
		return true
	}
	parts := strings.Split(c.GetName(), "|") // outbound|PORT|SUBSET|HOST
	if len(parts) != 4 {
		return false
	}
	return (m.GetPortNumber() == 0 || strconv.FormatUint(uint64(m.GetPortNumber()), 10) == parts[1]) &&
		(m.GetService() == "" || m.GetService() == parts[3]) && (m.GetSubset() == "" || m.GetSubset() == parts[2])
}

// extensions adds configuration that filters fetch by name.
func (a *applier) extensions() error {
	if a.patch.GetPatch().GetOperation() != envoyfilter.EnvoyFilter_Patch_ADD {
		return fmt.Errorf("patch.operation %s is not honoured for EXTENSION_CONFIG, only ADD is", a.patch.GetPatch().GetOperation())
	}
	if !a.inContext(false) && !a.inContext(true) {
		return nil
	}
	x := &corev3.TypedExtensionConfig{}
	if err := decode(a.patch.GetPatch().GetValue(), x); err != nil {
		return err
	}
	if err := valid(x); err != nil {
		return err
	}
	if slices.ContainsFunc(a.out.Extensions, func(e *corev3.TypedExtensionConfig) bool { return e.Name == x.Name }) {
		return fmt.Errorf("there is an extension configuration %s already", x.Name)
	}
	a.out.Extensions = append(slices.Clone(a.out.Extensions), x)
	a.touch(Extension, x.Name)
	return nil
}
