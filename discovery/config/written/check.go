package written

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

// CheckHost refuses what is no host. A wildcard may stand for the first labels, "*" for all.
func (o *Object) CheckHost(field, host string) {
	if host == "" {
		o.Reject(field, ReasonMissing, "the host is missing", "name a host")
		return
	}
	if host == "*" {
		return
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return
	}
	if e := validation.IsDNS1123Subdomain(strings.TrimPrefix(host, "*.")); len(e) > 0 {
		o.Invalid(field, Show(host)+" is not a host", `write a DNS name in lower case, with at most a leading "*."`)
	}
}

// CheckPort refuses numbers outside 1..65535.
func (o *Object) CheckPort(field string, n int64) bool {
	if n <= 0 || n > 65535 {
		o.Invalid(field, fmt.Sprintf("%d is not a port", n), "write a number from 1 to 65535")
		return false
	}
	return true
}

// CheckPercent refuses what is outside 0..100.
func (o *Object) CheckPercent(field string, v float64) {
	if !(v >= 0 && v <= 100) {
		o.Invalid(field, fmt.Sprintf("%v is not a percentage", v), "write a number from 0 to 100")
	}
}

// CheckRegex refuses what RE2 does not compile.
func (o *Object) CheckRegex(field, expr string) {
	if expr == "" {
		o.Invalid(field, "the regular expression is empty", `write ".*" to match anything`)
	} else if _, err := regexp.Compile(expr); err != nil {
		o.Invalid(field, Show(expr)+" is not a regular expression: "+Clip(err.Error(), 100), "write it in RE2 syntax, without look-around and back references")
	}
}

// CheckMatch validates a StringMatch; absent says whether one without a condition (presence) makes sense.
func (o *Object) CheckMatch(field string, m *networking.StringMatch, absent bool) {
	switch t := m.GetMatchType().(type) {
	case *networking.StringMatch_Regex:
		o.CheckRegex(field+".regex", t.Regex)
	case *networking.StringMatch_Prefix:
		if t.Prefix == "" {
			o.Invalid(field+".prefix", "the prefix is empty", "leave the match out to match anything")
		}
	case nil:
		if m != nil && !absent {
			o.Reject(field, ReasonMissing, "says neither exact, prefix nor regex", "add one of them")
		}
	}
}

// CheckMatches validates a map of StringMatches.
func (o *Object) CheckMatches(field string, ms map[string]*networking.StringMatch, header bool) {
	for _, name := range slices.Sorted(maps.Keys(ms)) {
		at := field + "[" + name + "]"
		if header {
			o.CheckHeader(at, name)
		} else if name == "" {
			o.Reject(at, ReasonMissing, "the name is empty", "name a query parameter")
		}
		o.CheckMatch(at, ms[name], true)
	}
}

// CheckHeader refuses what is no header name.
func (o *Object) CheckHeader(field, name string) {
	if e := validation.IsHTTPHeaderName(name); len(e) > 0 {
		o.Invalid(field, Show(name)+" is not a header name", "write letters, digits and '-'")
	}
}

// CheckHeaders validates what is done to headers.
func (o *Object) CheckHeaders(field string, h *networking.Headers) {
	operations := func(at string, ops *networking.Headers_HeaderOperations) {
		for _, list := range []struct {
			name string
			m    map[string]string
		}{{"set", ops.GetSet()}, {"add", ops.GetAdd()}} {
			for _, k := range slices.Sorted(maps.Keys(list.m)) {
				to := at + "." + list.name + "[" + k + "]"
				if k != ":authority" || list.name != "set" {
					o.CheckHeader(to, k)
				}
				if strings.ContainsAny(list.m[k], "\r\n\x00") {
					o.Invalid(to, "the value has a line break", "write one line")
				} else {
					o.CheckFormat(to, list.m[k])
				}
			}
		}
		for i, k := range ops.GetRemove() {
			o.CheckHeader(fmt.Sprintf("%s.remove[%d]", at, i), k)
		}
	}
	operations(field+".request", h.GetRequest())
	operations(field+".response", h.GetResponse())
}

// Visibility reads Istio's exportTo: names of namespaces, "." for the object's own, "*" for all, "~" for none.
func (o *Object) Visibility(field string, exportTo []string) []string {
	var out []string
	for i, ns := range exportTo {
		ns = strings.TrimSpace(ns)
		if e := validation.IsDNS1123Label(ns); len(e) > 0 && ns != "." && ns != "*" && ns != "~" {
			o.Invalid(fmt.Sprintf("%s[%d]", field, i), Show(ns)+" is not the name of a namespace", `write a name, "." for the own namespace, "*" for all or "~" for none`)
		}
		out = append(out, ns)
	}
	if slices.Contains(out, "~") && len(out) > 1 {
		o.Reject(field, ReasonConflict, `"~" stands beside namespaces`, "keep one of the two")
	}
	return out
}

// Addresses parses and sorts IPs, IPv4 first, refusing what is none; at names the field of each.
func (o *Object) Addresses(in []string, at func(i int) string) []netip.Addr {
	var out []netip.Addr
	for i, s := range in {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			o.Invalid(at(i), Show(s)+" is not an IP address", "correct it")
			continue
		}
		if a = a.Unmap(); !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	slices.SortStableFunc(out, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return out
}

// Rule shortens what Kubernetes' validation says about a name.
func Rule(said []string) string {
	short, _, _ := strings.Cut(said[0], " (e.g.")
	return short
}

// Protocol reads Istio's conventions: appProtocol, or else what stands before the first '-' of the port's name.
func Protocol(appProtocol, name string) mesh.Protocol {
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
		known, _ := ProtocolNamed(p)
		if known == "" {
			prefix, _, _ := strings.Cut(p, "-")
			known, _ = ProtocolNamed(prefix)
		}
		if known == "" {
			return mesh.TCP
		}
		return known
	}
}

// serverFirst are the ports whose servers speak first, by convention: waiting for the client's bytes would only delay them.
var serverFirst = []uint32{25, 53, 3306, 27017}

// Sniffed reports whether neither appProtocol nor the name say what the port speaks.
func Sniffed(appProtocol, name string, number uint32) bool {
	if Protocol(appProtocol, name) != mesh.TCP || slices.Contains(serverFirst, number) {
		return false
	}
	said := strings.ToLower(cmp.Or(appProtocol, name))
	prefix, _, _ := strings.Cut(said, "-")
	_, whole := ProtocolNamed(said)
	_, begin := ProtocolNamed(prefix)
	return !whole && !begin
}

// ProtocolNamed returns the protocol of that name, as ServiceEntry and Gateway write it in any case.
func ProtocolNamed(name string) (mesh.Protocol, bool) {
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

// CheckBlock refuses what is neither an address nor a range of addresses.
func (o *Object) CheckBlock(field, block string) {
	if _, err := netip.ParsePrefix(block); err == nil {
		return
	}
	if _, err := netip.ParseAddr(block); err != nil {
		o.Invalid(field, Show(block)+" is not an address or a range of addresses", "write for example 10.0.0.0/8")
	}
}

// CheckPorts refuses numbers outside 1..65535 in a map by name.
func (o *Object) CheckPorts(field string, ports map[string]uint32) {
	for _, name := range slices.Sorted(maps.Keys(ports)) {
		o.CheckPort(field+"["+name+"]", int64(ports[name]))
	}
}

// CheckAccount refuses what is no name of a service account; empty is none.
func (o *Object) CheckAccount(field, account string) {
	if e := validation.IsDNS1123Subdomain(account); account != "" && len(e) > 0 {
		o.Invalid(field, Show(account)+" is not the name of a service account", Rule(e))
	}
}

// Covers reports whether host is pattern or lies below the wildcard pattern.
func Covers(pattern, host string) bool {
	suffix, wild := strings.CutPrefix(pattern, "*")
	return pattern == host || wild && strings.HasSuffix(strings.TrimPrefix(host, "*"), suffix)
}

// Selects reports whether the labels have all that the selector asks for.
func Selects(selector, labels map[string]string) bool {
	for k, want := range selector {
		if labels[k] != want {
			return false
		}
	}
	return true
}
