package mesh

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// ClusterSetSuffix is the DNS zone of multi-cluster services (KEP-1645): NAME.NAMESPACE.svc.clusterset.local.
const ClusterSetSuffix = ".svc.clusterset.local"

// ClusterSetHost returns the multi-cluster services' name for what is GlobalHost here.
func ClusterSetHost(name, namespace string) string { return name + "." + namespace + ClusterSetSuffix }

// ClusterSetAlias returns the multi-cluster services' name of a ".global" host, or "".
func ClusterSetAlias(host string) string {
	if base, ok := strings.CutSuffix(host, GlobalSuffix); ok && base != "" && base[0] != '*' {
		return base + ClusterSetSuffix
	}
	return ""
}

// FromClusterSet returns the ".global" host that a multi-cluster services' name stands for; another host is returned as it is.
func FromClusterSet(host string) string {
	if base, ok := strings.CutSuffix(host, ClusterSetSuffix); ok && base != "" {
		return base + GlobalSuffix
	}
	return host
}

// ExportedPort is one port of an exported Service as the Service declares it.
type ExportedPort struct {
	Name        string `json:"name,omitempty"`
	Number      uint32 `json:"number"`                // 1..65535
	Protocol    string `json:"protocol"`              // TCP, UDP or SCTP
	AppProtocol string `json:"appProtocol,omitempty"` // as written; empty: not said
}

// Facts are what multi-cluster services compare between the exports of one name (KEP-1645), beyond what traffic needs.
type Facts struct {
	Created               time.Time         `json:"created,omitzero"` // of the ServiceExport, or of a Service that is exported by label; zero: unknown. In UTC, whole seconds
	Headless              bool              `json:"headless,omitempty"`
	Ports                 []ExportedPort    `json:"ports,omitempty"`           // in the order of the Service
	SessionAffinity       string            `json:"sessionAffinity,omitempty"` // None or ClientIP; empty: None
	AffinitySeconds       uint32            `json:"affinitySeconds,omitempty"` // of ClientIP; 0: not said
	InternalTrafficPolicy string            `json:"internalTrafficPolicy,omitempty"`
	TrafficDistribution   string            `json:"trafficDistribution,omitempty"`
	Labels                map[string]string `json:"labels,omitempty"`      // ServiceExport's exportedLabels
	Annotations           map[string]string `json:"annotations,omitempty"` // ServiceExport's exportedAnnotations
}

// Exporter is one cluster's export of a name.
type Exporter struct {
	Cluster ClusterID
	Facts   *Facts // nil: the cluster tells none
}

// Exporters returns who exports NAME in NAMESPACE as this cluster sees it, itself included, in the order in which
// conflicts are settled: the oldest first, an unknown age last, and of one age by cluster name (KEP-1645).
func (s *Snapshot) Exporters(name, namespace string) []Exporter {
	var out []Exporter
	if svc := s.Service(LocalHost(name, namespace)); svc != nil && svc.Exported {
		out = append(out, Exporter{Cluster: s.Local.ID, Facts: svc.Facts})
	}
	i, _ := slices.BinarySearchFunc(s.Imports, [2]string{namespace, name}, func(x *Import, key [2]string) int {
		return cmp.Or(cmp.Compare(x.Namespace, key[0]), cmp.Compare(x.Name, key[1]))
	})
	for ; i < len(s.Imports) && s.Imports[i].Namespace == namespace && s.Imports[i].Name == name; i++ {
		out = append(out, Exporter{Cluster: s.Imports[i].Cluster, Facts: s.Imports[i].Facts})
	}
	slices.SortStableFunc(out, CompareExporters)
	return out
}

// Settle returns the facts of all exports of one name taken together, by the policy of KEP-1645: the oldest export's,
// but for ports, which add up where they do not contradict. Exporters are in the order of CompareExporters; nil when
// none tells any.
func Settle(exporters []Exporter) *Facts {
	var out *Facts
	for _, e := range exporters {
		switch {
		case e.Facts == nil:
		case out == nil:
			first := *e.Facts
			first.Ports = addPorts(nil, first.Ports)
			out = &first
		default:
			out.Ports = addPorts(out.Ports, e.Facts.Ports)
		}
	}
	return out
}

// addPorts adds those ports that no older export's port excludes: by the same name, or by the same number and protocol.
func addPorts(older, more []ExportedPort) []ExportedPort {
	out := slices.Clone(older)
	for _, p := range more {
		if !slices.ContainsFunc(older, func(q ExportedPort) bool {
			return p.Name == q.Name || p.Number == q.Number && p.Protocol == q.Protocol
		}) {
			out = append(out, p)
		}
	}
	return out
}

// CompareExporters orders exports by age, as Snapshot.Exporters does.
func CompareExporters(a, b Exporter) int {
	created := func(e Exporter) time.Time {
		if e.Facts == nil {
			return time.Time{}
		}
		return e.Facts.Created
	}
	x, y := created(a), created(b)
	if x.IsZero() != y.IsZero() {
		if x.IsZero() {
			return 1
		}
		return -1
	}
	return cmp.Or(x.Compare(y), cmp.Compare(a.Cluster, b.Cluster))
}

// Aliases returns other names of the same service, with the same addresses: the multi-cluster services' name of a
// ".global" host that clusters export. A hand-made object of that name wins.
func (s *Snapshot) Aliases(svc *Service) []string {
	if !svc.Global || svc.Facts == nil {
		return nil
	}
	alias := ClusterSetAlias(svc.Host)
	if alias == "" || s.Service(alias) != nil {
		return nil
	}
	return []string{alias}
}
