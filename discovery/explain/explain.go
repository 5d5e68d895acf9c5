// Package explain follows one request through a Snapshot the way the translations would route it, and says each step.
// It is pure: what it says is what the model means, not what a proxy happens to hold.
package explain

import (
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// Request is what to follow.
type Request struct {
	From    string // WORKLOAD.NAMESPACE or SERVICE.NAMESPACE
	URL     string
	Method  string            // empty: GET
	Headers map[string]string // by lower-case name
}

// Way is the answer.
type Way struct {
	From    *mesh.Workload
	Service *mesh.Service
	Port    mesh.Port
	Route   string // the rule that matched, or "default"
	Targets []Target
}

// Target is one weighted branch.
type Target struct {
	Service *mesh.Service
	Port    mesh.Port
	Subset  string
	Labels  map[string]string
	Weight  uint32 // percent
	Hops    []Hop
}

// Hop is one endpoint and how it is reached.
type Hop struct {
	Endpoint *mesh.Endpoint
	Address  netip.AddrPort // Direct only; zero for host names
	Path     topologies.Path
	SNI      string
	Chain    string // at the far gateway
}

// Explain follows the request. Errors name what is unknown.
func Explain(snap *mesh.Snapshot, r Request) (*Way, error) {
	from, err := workload(snap, r.From)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(r.URL)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("%q is not a URL such as http://reviews.default.global:9080/", r.URL)
	}
	number := uint64(80)
	if u.Scheme == "https" {
		number = 443
	}
	if p := u.Port(); p != "" {
		if number, err = strconv.ParseUint(p, 10, 16); err != nil {
			return nil, fmt.Errorf("port %q of %s is not a number from 1 to 65535", p, r.URL)
		}
	}
	sees := scope.For(snap, topologies.Place(snap, &mesh.Proxy{Type: mesh.Sidecar, Name: from.Name, Namespace: from.Namespace, Cluster: from.Cluster, Labels: from.Labels}), nil)
	svc := lookup(snap, u.Hostname(), from.Namespace)
	if svc != nil && !sees.Sees(svc) {
		return nil, hidden(sees, svc, from)
	}
	if svc == nil {
		return nil, fmt.Errorf("no service has the host %s: no cluster exports it and no object here declares it", u.Hostname())
	}
	port, ok := svc.Port(uint32(number))
	if !ok {
		return nil, fmt.Errorf("%s has no port %d; it has %s", svc.Host, number, ports(svc))
	}
	w := &Way{From: from, Service: svc, Port: port, Route: "default (no VirtualService)"}
	for _, t := range route(snap, sees, w, r, u) {
		t.Labels = subset(sees, t.Service, t.Subset)
		for _, e := range t.Service.Endpoints {
			if topologies.Selects(t.Labels, e) && (e.Ports == nil || e.Ports[t.Port.Number] != 0) {
				t.Hops = append(t.Hops, hop(snap, from, t, e))
			}
		}
		w.Targets = append(w.Targets, t)
	}
	return w, nil
}

// workload finds the pod of that name, or the first pod of the service of that name.
func workload(snap *mesh.Snapshot, from string) (*mesh.Workload, error) {
	name, namespace, ok := strings.Cut(from, ".")
	if !ok {
		name, namespace = from, "default"
	}
	for _, w := range snap.Workloads {
		if w.Name == name && w.Namespace == namespace {
			return w, nil
		}
	}
	if svc := snap.Service(mesh.LocalHost(name, namespace)); svc != nil {
		for _, e := range svc.EndpointsIn(snap.Local.ID) {
			for _, w := range snap.Workloads {
				if w.Name == e.Workload && w.Namespace == e.Namespace {
					return w, nil
				}
			}
		}
	}
	return nil, fmt.Errorf("no workload and no service with a workload is called %s in namespace %s of cluster %s", name, namespace, snap.Local.ID)
}

// lookup finds a service by host, short name or virtual address, as a sidecar in the namespace would.
func lookup(snap *mesh.Snapshot, host, namespace string) *mesh.Service {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	for _, h := range []string{host, host + "." + namespace + ".svc.cluster.local", host + ".svc.cluster.local", host + ".cluster.local", mesh.FromClusterSet(host)} {
		if s := snap.Service(h); s != nil {
			return s
		}
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		for _, s := range snap.Services {
			for _, v := range s.VIPs {
				if v == addr {
					return s
				}
			}
		}
	}
	for rest := host; ; {
		_, after, ok := strings.Cut(rest, ".")
		if !ok {
			return nil
		}
		if s := snap.Service("*." + after); s != nil {
			return s
		}
		rest = after
	}
}

func ports(s *mesh.Service) string {
	var out []string
	for _, p := range s.Ports {
		out = append(out, strconv.FormatUint(uint64(p.Number), 10))
	}
	return strings.Join(out, ", ")
}

// route applies the VirtualService of the host, if there is one for the mesh.
func route(snap *mesh.Snapshot, sees *scope.Scope, w *Way, r Request, u *url.URL) []Target {
	plain := []Target{{Service: w.Service, Port: w.Port, Weight: 100}}
	if !w.Port.Protocol.IsHTTP() && !w.Port.Sniffed {
		return plain
	}
	if vs := sees.VirtualService(w.Service.Host); vs != nil {
		for i, h := range vs.Spec.Http {
			if !anyMatch(h.Match, r, u, w) {
				continue
			}
			object, field := vs.Rule(i)
			w.Route = fmt.Sprintf("%s %s", object, strings.TrimPrefix(field, "spec."))
			if h.Name != "" {
				w.Route += " " + strconv.Quote(h.Name)
			}
			return destinations(snap, w, h)
		}
		w.Route = vs.Object.String() + ": no rule matches, answered with 404"
		return nil
	}
	return plain
}

// hidden says why the workload does not see the service.
func hidden(sees *scope.Scope, svc *mesh.Service, from *mesh.Workload) error {
	if !sees.Exports(svc) {
		return fmt.Errorf("%s is not exported to namespace %s: see exportTo of %s", svc.Host, from.Namespace, svc.Object)
	}
	return fmt.Errorf("%s is not in the scope of %s/%s: see the egress hosts of %s", svc.Host, from.Namespace, from.Name, sees.Sidecar.Object)
}

func destinations(snap *mesh.Snapshot, w *Way, h *networking.HTTPRoute) []Target {
	total := int32(0)
	for _, d := range h.Route {
		total += d.Weight
	}
	var out []Target
	for _, d := range h.Route {
		svc := snap.Service(d.Destination.GetHost())
		if svc == nil {
			continue
		}
		port := w.Port
		if n := d.Destination.GetPort().GetNumber(); n != 0 {
			port, _ = svc.Port(n)
		}
		weight := uint32(100)
		if total > 0 {
			weight = uint32(d.Weight * 100 / total)
		}
		out = append(out, Target{Service: svc, Port: port, Subset: d.Destination.GetSubset(), Weight: weight})
	}
	return out
}

// anyMatch reports whether one of the conditions holds; no conditions hold always.
func anyMatch(ms []*networking.HTTPMatchRequest, r Request, u *url.URL, w *Way) bool {
	for _, m := range ms {
		if match(m, r, u, w) {
			return true
		}
	}
	return len(ms) == 0
}

func match(m *networking.HTTPMatchRequest, r Request, u *url.URL, w *Way) bool {
	method := r.Method
	if method == "" {
		method = "GET"
	}
	path := u.Path
	if path == "" {
		path = "/"
	}
	uri := path
	if m.IgnoreUriCase {
		uri = strings.ToLower(path)
	}
	if !text(m.Uri, uri, m.IgnoreUriCase) || !text(m.Method, method, false) || !text(m.Scheme, u.Scheme, false) || !text(m.Authority, u.Host, false) ||
		len(m.Gateways) > 0 && !slices.Contains(m.Gateways, "mesh") || m.Port != 0 && m.Port != w.Port.Number || !matches(m.SourceLabels, w.From.Labels) || m.SourceNamespace != "" && m.SourceNamespace != w.From.Namespace {
		return false
	}
	for name, want := range m.Headers {
		got, ok := r.Headers[strings.ToLower(name)]
		if !ok || !text(want, got, false) {
			return false
		}
	}
	for name, want := range m.WithoutHeaders {
		if got, ok := r.Headers[strings.ToLower(name)]; ok && text(want, got, false) {
			return false
		}
	}
	for name, want := range m.QueryParams {
		if !u.Query().Has(name) || !text(want, u.Query().Get(name), false) {
			return false
		}
	}
	return true
}

// text applies a StringMatch; nil and an empty one (present at all) hold.
func text(m *networking.StringMatch, s string, fold bool) bool {
	if m == nil || m.MatchType == nil {
		return true
	}
	norm := func(x string) string {
		if fold {
			return strings.ToLower(x)
		}
		return x
	}
	switch t := m.MatchType.(type) {
	case *networking.StringMatch_Exact:
		return s == norm(t.Exact)
	case *networking.StringMatch_Prefix:
		return strings.HasPrefix(s, norm(t.Prefix))
	case *networking.StringMatch_Regex:
		re, err := regexp.Compile("^(?:" + t.Regex + ")$")
		return err == nil && re.MatchString(s)
	}
	return false
}

func subset(sees *scope.Scope, svc *mesh.Service, name string) map[string]string {
	if name == "" {
		return nil
	}
	if s := sees.RuleFor(svc).Subset(name); s != nil {
		return s.GetLabels()
	}
	return map[string]string{"isthmus.io/no-such-subset": name}
}

func matches(want, have map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

func hop(snap *mesh.Snapshot, from *mesh.Workload, t Target, e *mesh.Endpoint) Hop {
	at := topologies.Place(snap, &mesh.Proxy{Name: from.Name, Namespace: from.Namespace, Cluster: from.Cluster})
	network := at.Network
	h := Hop{Endpoint: e, Path: topologies.Reach(snap, network, e)}
	if h.Path.Direct {
		if addr, err := netip.ParseAddr(e.Address); err == nil {
			h.Address = netip.AddrPortFrom(addr, uint16(e.Ports[t.Port.Number]))
		}
		if e.TLS {
			h.SNI = sni.Istio(t.Port.Number, t.Subset, t.Service.Host)
		}
		return h
	}
	if h.Path.Network != nil {
		h.SNI = sni.Istio(t.Port.Number, t.Subset, t.Service.Host)
		h.Chain = h.SNI
		return h
	}
	pod := sni.Pod{Workload: e.Workload, Port: t.Port.Number, Cluster: e.Cluster, Service: t.Service.Name, Namespace: t.Service.Namespace}
	if name, err := pod.Name(); err == nil {
		h.SNI = name
		h.Chain = fmt.Sprintf("%s/%s:%d (%s)", pod.Namespace, pod.Service, pod.Port, pod.Wildcard())
	}
	return h
}
