package status

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// merged is what all exports of one name come to by the policy of KEP-1645: of properties that differ the oldest
// export's counts; ports add up where they do not contradict.
type merged struct {
	facts     mesh.Facts // Ports are those of the import
	exporters []mesh.Exporter
	// conflicts say in what exports differ from the oldest, in the order of the reasons below.
	conflicts []conflict
}

// conflict is one property that not every export has alike.
type conflict struct {
	reason mcsv1beta1.ServiceExportConditionReason
	with   []mesh.ClusterID // those that differ from the oldest, sorted by age
	detail string           // of the first of them
}

// comparison of one property of an export with the oldest's; it returns "" when they agree.
type comparison struct {
	reason mcsv1beta1.ServiceExportConditionReason
	differ func(oldest, other *mesh.Facts) string
}

// comparisons in the order in which reasons are written. IP families are not among them: an import's addresses are
// the mesh's own, of both families, whatever those of the exported Services are.
var comparisons = []comparison{
	{mcsv1beta1.ServiceExportReasonPortConflict, differentPorts},
	{mcsv1beta1.ServiceExportReasonTypeConflict, func(a, b *mesh.Facts) string {
		return differ(typeOf(a), typeOf(b))
	}},
	{mcsv1beta1.ServiceExportReasonSessionAffinityConflict, func(a, b *mesh.Facts) string {
		return differ(affinityOf(a), affinityOf(b))
	}},
	{mcsv1beta1.ServiceExportReasonSessionAffinityConfigConflict, func(a, b *mesh.Facts) string {
		if affinityOf(a) != affinityOf(b) {
			return ""
		}
		return differ(strconv.Itoa(int(a.AffinitySeconds))+" s", strconv.Itoa(int(b.AffinitySeconds))+" s")
	}},
	{mcsv1beta1.ServiceExportReasonInternalTrafficPolicyConflict, func(a, b *mesh.Facts) string {
		return differ(policyOf(a), policyOf(b))
	}},
	{mcsv1beta1.ServiceExportReasonTrafficDistributionConflict, func(a, b *mesh.Facts) string {
		return differ(said(a.TrafficDistribution), said(b.TrafficDistribution))
	}},
	{mcsv1beta1.ServiceExportReasonLabelsConflict, func(a, b *mesh.Facts) string {
		return differ(pairs(a.Labels), pairs(b.Labels))
	}},
	{mcsv1beta1.ServiceExportReasonAnnotationsConflict, func(a, b *mesh.Facts) string {
		return differ(pairs(a.Annotations), pairs(b.Annotations))
	}},
}

// merge settles the exports of one name. The exporters come as Snapshot.Exporters orders them; a cluster that tells
// nothing of its export adds nothing and contradicts nobody.
func merge(exporters []mesh.Exporter) merged {
	m := merged{exporters: exporters}
	var oldest *mesh.Facts
	for _, e := range exporters {
		if oldest == nil {
			oldest = e.Facts
		}
	}
	if f := mesh.Settle(exporters); f != nil {
		m.facts = *f
	}
	for _, c := range comparisons {
		found := conflict{reason: c.reason}
		for _, e := range exporters {
			if e.Facts == nil || e.Facts == oldest {
				continue
			}
			if d := c.differ(oldest, e.Facts); d != "" {
				if found.with = append(found.with, e.Cluster); found.detail == "" {
					found.detail = d
				}
			}
		}
		if len(found.with) > 0 {
			m.conflicts = append(m.conflicts, found)
		}
	}
	return m
}

func differentPorts(a, b *mesh.Facts) string {
	x, y := portNames(a.Ports), portNames(b.Ports)
	return differ(x, y)
}

// portNames writes ports for people, in an order that does not depend on the Service's.
func portNames(ports []mesh.ExportedPort) string {
	var out []string
	for _, p := range ports {
		s := strconv.FormatUint(uint64(p.Number), 10) + "/" + p.Protocol
		if p.Name != "" {
			s = p.Name + " " + s
		}
		if p.AppProtocol != "" {
			s += " (" + p.AppProtocol + ")"
		}
		out = append(out, s)
	}
	slices.Sort(out)
	return list(out)
}

// list joins at most eight items.
func list(items []string) string {
	if n := len(items); n > 8 {
		return strings.Join(items[:8], ", ") + fmt.Sprintf(" and %d more", n-8)
	}
	if len(items) == 0 {
		return "none"
	}
	return strings.Join(items, ", ")
}

// differ returns "" if the two are equal, else both: the oldest export's first.
func differ(oldest, other string) string {
	if oldest == other {
		return ""
	}
	return other + " instead of " + oldest
}

func typeOf(f *mesh.Facts) string {
	if f.Headless {
		return string(mcsv1beta1.Headless)
	}
	return string(mcsv1beta1.ClusterSetIP)
}

func affinityOf(f *mesh.Facts) string {
	if f.SessionAffinity == "" {
		return "None"
	}
	return f.SessionAffinity
}

// policyOf returns Cluster where nothing is said: that is the API server's default.
func policyOf(f *mesh.Facts) string {
	if f.InternalTrafficPolicy == "" {
		return "Cluster"
	}
	return f.InternalTrafficPolicy
}

func said(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

func pairs(m map[string]string) string {
	var out []string
	for k, v := range m {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	if len(out) > 8 { // two long maps that differ late are still told apart
		return list(out) + fmt.Sprintf(" (%08x)", hash(out...))
	}
	return list(out)
}

// conflictCondition says in what the export of the local cluster, and others', conflict.
func (m merged) conflictCondition() (status bool, reason, message string) {
	if len(m.conflicts) == 0 {
		return false, string(mcsv1beta1.ServiceExportReasonNoConflicts), ""
	}
	var reasons, details []string
	for _, c := range m.conflicts {
		reasons = append(reasons, string(c.reason))
		var with []string
		for _, id := range c.with {
			with = append(with, string(id))
		}
		details = append(details, fmt.Sprintf("%s of %s: %s", strings.TrimSuffix(string(c.reason), "Conflict"), list(with), c.detail))
	}
	i := slices.IndexFunc(m.exporters, func(e mesh.Exporter) bool { return e.Facts != nil })
	oldest := m.exporters[i]
	since := ""
	if !oldest.Facts.Created.IsZero() {
		since = " (of " + oldest.Facts.Created.Format(time.RFC3339) + ")"
	}
	message = "the oldest export counts, that of cluster " + string(oldest.Cluster) + since + "; " + strings.Join(details, "; ")
	if len(message) > 1024 {
		message = message[:1021] + "..."
	}
	return true, strings.Join(reasons, ","), message
}
