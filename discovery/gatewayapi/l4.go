package gatewayapi

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	networking "istio.io/api/networking/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// l4 is where a route leads connections.
type l4 struct {
	ref     mesh.ObjectRef
	created time.Time
	hosts   []string
	to      []*networking.RouteDestination
}

// connections converts the rules of a TCPRoute or a TLSRoute. They match everything, so the first is used.
func (c *converter) connections(r *route, rules int, refs func(rule int) []gatewayv1.BackendRef) {
	if rules == 0 {
		r.invalid = "it has no rule"
		return
	}
	for i := 1; i < rules; i++ {
		r.unsupported(i, "rules of this kind match everything: the first is used")
	}
	r.partly = strings.Replace(r.partly, "requests that they match get 500: ", "", 1)
	out := &l4{ref: r.ref, created: r.meta.CreationTimestamp.Time}
	for j, b := range refs(0) {
		to, bad := c.backend(r, b.BackendObjectReference)
		if to == nil {
			r.unresolved(fmt.Sprintf("spec.rules[0].backendRefs[%d]", j), bad)
			to = &networking.Destination{}
		}
		if w := weight(b.Weight); w > 0 {
			out.to = append(out.to, &networking.RouteDestination{Destination: to, Weight: w})
		}
	}
	r.l4 = out
}

// byAge puts the older routes first.
func (l *listener) byAge() {
	slices.SortStableFunc(l.l4, func(a, b l4) int {
		return cmp.Or(a.created.Compare(b.created), strings.Compare(a.ref.Namespace, b.ref.Namespace), strings.Compare(a.ref.Name, b.ref.Name), strings.Compare(a.ref.Kind, b.ref.Kind))
	})
}

// untaken returns the hosts that no older route has, and takes them.
func untaken(hosts []string, taken map[string]bool) (out []string) {
	for _, h := range hosts {
		if !taken[h] {
			taken[h] = true
			out = append(out, h)
		}
	}
	return out
}

func (c *converter) emitService(l *listener, gateway string, spec *networking.VirtualService) {
	spec.Gateways, spec.ExportTo = []string{l.gateway.ref.Namespace + "/" + gateway}, []string{"*"}
	c.out.Input.VirtualServices = append(c.out.Input.VirtualServices, &mesh.VirtualService{Object: l.object("VirtualService", gateway+"~0"), GatewayAPI: true, Spec: spec})
}

// emitL4 writes a VirtualService for the connections that the listener passes on: each host of TLS to the oldest route
// that names it, others to the oldest route.
func (c *converter) emitL4(l *listener) {
	if len(l.l4) == 0 {
		return
	}
	l.byAge()
	vs := &networking.VirtualService{Hosts: []string{l.host}}
	if l.spec.Protocol == gatewayv1.TCPProtocolType {
		vs.Tcp = []*networking.TCPRoute{{Route: l.l4[0].to}}
	} else {
		taken := map[string]bool{}
		for _, r := range l.l4 {
			if hosts := untaken(r.hosts, taken); len(hosts) > 0 {
				vs.Tls = append(vs.Tls, &networking.TLSRoute{Match: []*networking.TLSMatchAttributes{{SniHosts: hosts}}, Route: r.to})
			}
		}
	}
	c.emitService(l, l.name(), vs)
}

// emitEnded writes a server and a VirtualService for each route of a listener that ends TLS: what follows is told apart
// by the server name alone.
func (c *converter) emitEnded(l *listener) {
	l.byAge()
	taken := map[string]bool{}
	for i, r := range l.l4 {
		if hosts := untaken(r.hosts, taken); len(hosts) > 0 {
			name := l.name() + "~" + itoa(i)
			c.emitServer(l, name, hosts)
			c.emitService(l, name, &networking.VirtualService{Hosts: hosts, Tcp: []*networking.TCPRoute{{Route: r.to}}})
		}
	}
}

// attachService would bind a route to a Service, for requests inside the mesh.
func (c *converter) attachService(r *route, index int, p gatewayv1.ParentReference) {
	if or(p.Group, "") == "" && or(p.Kind, "") == "Service" {
		r.results = append(r.results, result{p, index, is("Accepted", false, "UnsupportedValue", "routes cannot be attached to Services; write a VirtualService for the host")})
	}
}
