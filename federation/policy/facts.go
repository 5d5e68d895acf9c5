package policy

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

const (
	// maxExported is how many labels, and how many annotations, an export may carry; maxExportedBytes caps their sizes.
	maxExported      = 64
	maxExportedBytes = 16 << 10
	maxFact          = 63 // bytes of one word
	maxAppProtocol   = 253 + 1 + 63
	maxAffinity      = 86400 // seconds, as of a Service
)

// exportBody tells what multi-cluster services compare.
func exportBody(f *mesh.Facts) *federationv1.Export {
	if f == nil {
		return nil
	}
	out := &federationv1.Export{
		Headless: f.Headless, SessionAffinity: f.SessionAffinity, AffinitySeconds: f.AffinitySeconds,
		InternalTrafficPolicy: f.InternalTrafficPolicy, TrafficDistribution: f.TrafficDistribution, Labels: f.Labels, Annotations: f.Annotations,
	}
	if !f.Created.IsZero() {
		out.Created = f.Created.Unix()
	}
	for _, p := range f.Ports {
		out.Ports = append(out.Ports, &federationv1.ExportedPort{Name: p.Name, Number: p.Number, Protocol: p.Protocol, AppProtocol: p.AppProtocol})
	}
	return out
}

// readFacts takes what a peer says of its export. What cannot be is left out by itself: traffic does not need it.
func (in *importer) readFacts(ref mesh.ObjectRef, x *federationv1.Export) *mesh.Facts {
	if x == nil {
		return nil
	}
	f := &mesh.Facts{Headless: x.Headless, AffinitySeconds: min(x.AffinitySeconds, maxAffinity)}
	if x.Created > 0 {
		f.Created = time.Unix(x.Created, 0).UTC()
	}
	for i, p := range x.Ports {
		field := "export.ports[" + strconv.Itoa(i) + "]"
		switch {
		case i >= maxPorts:
			in.problem(ref, "export.ports", "TooManyPorts", "%d ports, %d are allowed", len(x.Ports), maxPorts)
		case p.Number == 0 || p.Number > 65535:
			in.problem(ref, field, "BadPort", "port %d is not 1..65535", p.Number)
		case p.Name != "" && !mesh.IsLabel(p.Name):
			in.problem(ref, field, "BadName", "port name %s is not a DNS label", quote(p.Name))
		case !slices.Contains([]string{"TCP", "UDP", "SCTP"}, p.Protocol):
			in.problem(ref, field, "BadProtocol", "protocol %s is not TCP, UDP or SCTP", quote(p.Protocol))
		case len(p.AppProtocol) > maxAppProtocol || !printable(p.AppProtocol):
			in.problem(ref, field, "BadProtocol", "application protocol %s is not a name", quote(p.AppProtocol))
		default:
			f.Ports = append(f.Ports, mesh.ExportedPort{Name: p.Name, Number: p.Number, Protocol: p.Protocol, AppProtocol: p.AppProtocol})
			continue
		}
		if i >= maxPorts {
			break
		}
	}
	for _, w := range []struct {
		field, said string
		to          *string
		allowed     []string
	}{
		{"sessionAffinity", x.SessionAffinity, &f.SessionAffinity, []string{"", "None", "ClientIP"}},
		{"internalTrafficPolicy", x.InternalTrafficPolicy, &f.InternalTrafficPolicy, []string{"", "Cluster", "Local"}},
		{"trafficDistribution", x.TrafficDistribution, &f.TrafficDistribution, nil},
	} {
		if w.allowed != nil && !slices.Contains(w.allowed, w.said) || len(w.said) > maxFact || !printable(w.said) {
			in.problem(ref, "export."+w.field, "BadValue", "%s is not a %s", quote(w.said), w.field)
			continue
		}
		*w.to = w.said
	}
	f.Labels = in.readExported(ref, "labels", x.Labels, isLabelValue)
	f.Annotations = in.readExported(ref, "annotations", x.Annotations, func(string) bool { return true })
	return f
}

// readExported takes a map of labels or annotations whole or not at all: half of it would be another one.
func (in *importer) readExported(ref mesh.ObjectRef, field string, m map[string]string, value func(string) bool) map[string]string {
	if len(m) == 0 {
		return nil
	}
	if len(m) > maxExported {
		in.problem(ref, "export."+field, "TooMany", "%d %s, %d are allowed; none is used", len(m), field, maxExported)
		return nil
	}
	size := 0
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if size += len(k) + len(m[k]); size > maxExportedBytes {
			in.problem(ref, "export."+field, "TooMany", "%s have more than %d bytes; none is used", field, maxExportedBytes)
			return nil
		}
		if !isQualified(k) || !value(m[k]) {
			in.problem(ref, "export."+field, "BadName", "%s=%s is no entry of %s; none is used", quote(k), quote(m[k]), field)
			return nil
		}
	}
	return m
}

// isQualified reports whether s is the key of a label or annotation: a name of at most 63 bytes, with or without a DNS
// subdomain and a slash before it.
func isQualified(s string) bool {
	if prefix, name, ok := strings.Cut(s, "/"); ok {
		if len(prefix) > 253 {
			return false
		}
		for l := range strings.SplitSeq(prefix, ".") {
			if !mesh.IsLabel(l) {
				return false
			}
		}
		s = name
	}
	return s != "" && isLabelValue(s)
}

// isLabelValue reports whether s can be the value of a label: at most 63 letters, digits, '-', '_' and '.', with a
// letter or digit at both ends.
func isLabelValue(s string) bool {
	if len(s) > 63 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && (c != '-' && c != '_' && c != '.' || i == 0 || i == len(s)-1) {
			return false
		}
	}
	return true
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
