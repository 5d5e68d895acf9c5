package config

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Labels and annotations that mean something to the mesh.
const (
	labelNetwork   = "topology.istio.io/network"
	labelRegion    = "topology.kubernetes.io/region"
	labelZone      = "topology.kubernetes.io/zone"
	labelSubzone   = "topology.istio.io/subzone"
	labelLocality  = "istio-locality"
	labelTLSMode   = "security.istio.io/tlsMode"
	labelInject    = "sidecar.istio.io/inject"
	labelExport    = "isthmus.io/export"
	annExportTo    = "isthmus.io/export-to"
	annTemplates   = "inject.istio.io/templates" // "gateway": the proxy stands alone
	annVisibility  = "networking.istio.io/exportTo"
	labelSliceName = "kubernetes.io/service-name"
)

// gatewayLabels are the values of label istio on gateways.
var gatewayLabels = []string{"ingressgateway", "egressgateway", "eastwestgateway"}

// checkHost refuses what is no host. A wildcard may stand for the first labels, "*" for all.
func (o *object) checkHost(field, host string) {
	if host == "" {
		o.reject(field, ReasonMissing, "the host is missing", "name a host")
		return
	}
	if host == "*" {
		return
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return
	}
	if e := validation.IsDNS1123Subdomain(strings.TrimPrefix(host, "*.")); len(e) > 0 {
		o.invalid(field, show(host)+" is not a host", `write a DNS name in lower case, with at most a leading "*."`)
	}
}

// checkPort refuses numbers outside 1..65535.
func (o *object) checkPort(field string, n int64) bool {
	if n <= 0 || n > 65535 {
		o.invalid(field, fmt.Sprintf("%d is not a port", n), "write a number from 1 to 65535")
		return false
	}
	return true
}

// checkPercent refuses what is outside 0..100.
func (o *object) checkPercent(field string, v float64) {
	if !(v >= 0 && v <= 100) {
		o.invalid(field, fmt.Sprintf("%v is not a percentage", v), "write a number from 0 to 100")
	}
}

// checkRegex refuses what RE2 does not compile.
func (o *object) checkRegex(field, expr string) {
	if expr == "" {
		o.invalid(field, "the regular expression is empty", `write ".*" to match anything`)
	} else if _, err := regexp.Compile(expr); err != nil {
		o.invalid(field, show(expr)+" is not a regular expression: "+clip(err.Error(), 100), "write it in RE2 syntax, without look-around and back references")
	}
}

// checkMatch validates a StringMatch; absent says whether one without a condition (presence) makes sense.
func (o *object) checkMatch(field string, m *networking.StringMatch, absent bool) {
	switch t := m.GetMatchType().(type) {
	case *networking.StringMatch_Regex:
		o.checkRegex(field+".regex", t.Regex)
	case *networking.StringMatch_Prefix:
		if t.Prefix == "" {
			o.invalid(field+".prefix", "the prefix is empty", "leave the match out to match anything")
		}
	case nil:
		if m != nil && !absent {
			o.reject(field, ReasonMissing, "says neither exact, prefix nor regex", "add one of them")
		}
	}
}

// checkMatches validates a map of StringMatches.
func (o *object) checkMatches(field string, ms map[string]*networking.StringMatch, header bool) {
	for _, name := range slices.Sorted(maps.Keys(ms)) {
		at := field + "[" + name + "]"
		if header {
			o.checkHeader(at, name)
		} else if name == "" {
			o.reject(at, ReasonMissing, "the name is empty", "name a query parameter")
		}
		o.checkMatch(at, ms[name], true)
	}
}

// checkHeader refuses what is no header name.
func (o *object) checkHeader(field, name string) {
	if e := validation.IsHTTPHeaderName(name); len(e) > 0 {
		o.invalid(field, show(name)+" is not a header name", "write letters, digits and '-'")
	}
}

// checkHeaders validates what is done to headers.
func (o *object) checkHeaders(field string, h *networking.Headers) {
	operations := func(at string, ops *networking.Headers_HeaderOperations) {
		for _, list := range []struct {
			name string
			m    map[string]string
		}{{"set", ops.GetSet()}, {"add", ops.GetAdd()}} {
			for _, k := range slices.Sorted(maps.Keys(list.m)) {
				to := at + "." + list.name + "[" + k + "]"
				if k != ":authority" || list.name != "set" {
					o.checkHeader(to, k)
				}
				if strings.ContainsAny(list.m[k], "\r\n\x00") {
					o.invalid(to, "the value has a line break", "write one line")
				}
			}
		}
		for i, k := range ops.GetRemove() {
			o.checkHeader(fmt.Sprintf("%s.remove[%d]", at, i), k)
		}
	}
	operations(field+".request", h.GetRequest())
	operations(field+".response", h.GetResponse())
}

// exported reports whether labels or the namespace export the object, and to whom. A bad list of clusters exports to
// none rather than to all.
func (o *object) exported() (bool, []mesh.ClusterID) {
	value, own := o.meta.Labels[labelExport]
	if !own {
		value = o.d.opts.Namespaces[o.ref.Namespace][labelExport]
	}
	switch value {
	case "true":
	case "", "false":
		return false, nil
	default:
		if own {
			o.note("metadata.labels["+labelExport+"]", ReasonInvalidValue, show(value)+" is neither true nor false; it is not exported", `write "true" or "false"`)
		}
		return false, nil
	}
	return o.exportTo()
}

// exportTo reads the annotation that narrows an export.
func (o *object) exportTo() (bool, []mesh.ClusterID) {
	value, ok := o.meta.Annotations[annExportTo]
	if !ok {
		return true, nil
	}
	var out []mesh.ClusterID
	for name := range strings.SplitSeq(value, ",") {
		name = strings.TrimSpace(name)
		if e := validation.IsDNS1123Label(name); len(e) > 0 {
			o.note("metadata.annotations["+annExportTo+"]", ReasonInvalidValue, show(name)+" is not a cluster name; it is exported to none", "write cluster names with commas between them, or remove the annotation to export to all")
			return false, nil
		}
		out = append(out, mesh.ClusterID(name))
	}
	slices.Sort(out)
	return true, slices.Compact(out)
}

// visibility reads Istio's exportTo: names of namespaces, "." for the object's own, "*" for all, "~" for none.
func (o *object) visibility(field string, exportTo []string) []string {
	var out []string
	for i, ns := range exportTo {
		ns = strings.TrimSpace(ns)
		if e := validation.IsDNS1123Label(ns); len(e) > 0 && ns != "." && ns != "*" && ns != "~" {
			o.invalid(fmt.Sprintf("%s[%d]", field, i), show(ns)+" is not the name of a namespace", `write a name, "." for the own namespace, "*" for all or "~" for none`)
		}
		out = append(out, ns)
	}
	if slices.Contains(out, "~") && len(out) > 1 {
		o.reject(field, ReasonConflict, `"~" stands beside namespaces`, "keep one of the two")
	}
	return out
}

// addresses parses and sorts IPs, IPv4 first, refusing what is none; at names the field of each.
func (o *object) addresses(in []string, at func(i int) string) []netip.Addr {
	var out []netip.Addr
	for i, s := range in {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			o.invalid(at(i), show(s)+" is not an IP address", "correct it")
			continue
		}
		if a = a.Unmap(); !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	slices.SortStableFunc(out, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return out
}

// rule shortens what Kubernetes' validation says about a name.
func rule(said []string) string {
	short, _, _ := strings.Cut(said[0], " (e.g.")
	return short
}

// protocol reads Istio's conventions: appProtocol, or else what stands before the first '-' of the port's name.
func protocol(appProtocol, name string) mesh.Protocol {
	if appProtocol == "" {
		appProtocol = name
	}
	switch p := strings.ToLower(appProtocol); p {
	case "kubernetes.io/h2c":
		return mesh.HTTP2
	case "kubernetes.io/ws":
		return mesh.HTTP
	case "kubernetes.io/wss":
		return mesh.HTTPS
	case "grpc-web":
		return mesh.HTTP
	default:
		if strings.HasPrefix(p, "grpc-web-") {
			return mesh.HTTP
		}
		known, _ := protocolNamed(p)
		if known == "" {
			prefix, _, _ := strings.Cut(p, "-")
			known, _ = protocolNamed(prefix)
		}
		if known == "" {
			return mesh.TCP
		}
		return known
	}
}

// serverFirst are the ports whose servers speak first, by convention: waiting for the client's bytes would only delay them.
var serverFirst = []uint32{25, 53, 3306, 27017}

// sniffed reports whether neither appProtocol nor the name say what the port speaks.
func sniffed(appProtocol, name string, number uint32) bool {
	if protocol(appProtocol, name) != mesh.TCP || slices.Contains(serverFirst, number) {
		return false
	}
	said := strings.ToLower(cmp.Or(appProtocol, name))
	prefix, _, _ := strings.Cut(said, "-")
	_, whole := protocolNamed(said)
	_, begin := protocolNamed(prefix)
	return !whole && !begin
}

// protocolNamed returns the protocol of that name, as ServiceEntry and Gateway write it in any case.
func protocolNamed(name string) (mesh.Protocol, bool) {
	switch p := mesh.Protocol(strings.ToUpper(name)); p {
	case mesh.HTTP, mesh.HTTP2, mesh.GRPC, mesh.HTTPS, mesh.TLS, mesh.TCP, mesh.UDP:
		return p, true
	case "GRPC-WEB":
		return mesh.HTTP, true
	case "MONGO", "REDIS", "MYSQL":
		return mesh.TCP, true
	}
	return "", false
}

// Locality writes the region, zone and subzone labels as region/zone/subzone.
func Locality(labels map[string]string) string {
	if l := labels[labelLocality]; l != "" {
		if !strings.Contains(l, "/") {
			l = strings.ReplaceAll(l, ".", "/") // a label's value has no slash
		}
		return l
	}
	if labels[labelRegion] == "" {
		return ""
	}
	return strings.TrimRight(labels[labelRegion]+"/"+labels[labelZone]+"/"+labels[labelSubzone], "/")
}
