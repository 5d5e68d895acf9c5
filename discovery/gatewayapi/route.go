package gatewayapi

import (
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// route is a route of any kind.
type route struct {
	ref       mesh.ObjectRef
	meta      *metav1.ObjectMeta
	resource  string
	parents   []gatewayv1.ParentReference
	hostnames []string // lower case; none: those of the listeners

	entries  []entry   // of kinds that are HTTP
	l4       *l4       // of the others
	resolved condition // ResolvedRefs
	where    string    // the field that is not resolved
	partly   string    // rules that cannot be honoured
	invalid  string    // no rule can be
	results  []result
	services []string // hosts that it leads to
}

// result is what one parent makes of a route.
type result struct {
	ref      gatewayv1.ParentReference
	index    int
	accepted condition
}

// addRoute keeps a route with what its rules come to.
func (c *converter) addRoute(ref mesh.ObjectRef, meta *metav1.ObjectMeta, resource string, common gatewayv1.CommonRouteSpec, hostnames []gatewayv1.Hostname, rules func(*route)) {
	r := &route{ref: ref, meta: meta, resource: resource, parents: common.ParentRefs, resolved: is("ResolvedRefs", true, "ResolvedRefs", "")}
	for _, h := range hostnames {
		r.hostnames = append(r.hostnames, strings.ToLower(string(h)))
	}
	rules(r)
	c.routes = append(c.routes, r)
}

// attach binds a route to the listeners of its parents that take it.
func (c *converter) attach(r *route) {
	bound := map[*listener]bool{}
	for i, p := range r.parents {
		if or(p.Group, group) != group || or(p.Kind, "Gateway") != "Gateway" {
			c.attachService(r, i, p)
			continue
		}
		g := c.gateways[key{or(p.Namespace, r.ref.Namespace), string(p.Name)}]
		if g == nil {
			continue // another's, or none yet
		}
		accepted, taken := c.parent(r, g, p)
		r.results = append(r.results, result{p, i, accepted})
		if len(taken) > 0 {
			c.uses(g, r)
		}
		for _, t := range taken {
			if !bound[t.listener] {
				bound[t.listener] = true
				t.listener.attached++
			}
			t.listener.take(r, t.hosts)
		}
	}
	c.routeStatus(r)
}

// taker is a listener that takes a route, for some hosts.
type taker struct {
	listener *listener
	hosts    []string
}

// parent says whether a Gateway takes the route, and by which listeners.
func (c *converter) parent(r *route, g *gateway, p gatewayv1.ParentReference) (condition, []taker) {
	no := func(reason gatewayv1.RouteConditionReason, format string, args ...any) (condition, []taker) {
		return is("Accepted", false, string(reason), fmt.Sprintf(format, args...)), nil
	}
	var named, allowed []*listener
	for _, l := range g.listeners {
		if (p.SectionName == nil || *p.SectionName == "" || *p.SectionName == l.spec.Name) && (p.Port == nil || *p.Port == l.spec.Port) {
			named = append(named, l)
		}
	}
	if len(named) == 0 {
		return no(gatewayv1.RouteReasonNoMatchingParent, "Gateway %s/%s has no listener of that name and port", g.ref.Namespace, g.ref.Name)
	}
	why := ""
	for _, l := range named {
		switch {
		case !l.takes(r.ref.Kind):
			why = fmt.Sprintf("listener %s takes no %s", l.spec.Name, r.ref.Kind)
		case !c.admits(l, r.ref.Namespace):
			why = fmt.Sprintf("listener %s takes no routes of namespace %s", l.spec.Name, r.ref.Namespace)
		default:
			allowed = append(allowed, l)
		}
	}
	if len(allowed) == 0 {
		return no(gatewayv1.RouteReasonNotAllowedByListeners, "%s", why)
	}
	var out []taker
	for _, l := range allowed {
		if hosts := l.hosts(r); len(hosts) > 0 {
			out = append(out, taker{l, hosts})
		}
	}
	if len(out) == 0 {
		return no(gatewayv1.RouteReasonNoMatchingListenerHostname, "none of its hostnames is one that the listeners are for")
	}
	if r.invalid != "" {
		return is("Accepted", false, "UnsupportedValue", r.invalid), out
	}
	return is("Accepted", true, "Accepted", ""), out
}

func (l *listener) takes(kind string) bool {
	for _, k := range l.kinds {
		if string(k.Kind) == kind {
			return true
		}
	}
	return false
}

// hosts returns those of the route for which the listener is, written as narrow as both have them. What a narrower
// listener of the same port is for, this one is not for.
func (l *listener) hosts(r *route) (out []string) {
	own := r.hostnames
	if len(own) == 0 {
		own = []string{"*"}
	}
	for _, h := range own {
		host, ok := intersect(h, l.host)
		if !ok {
			continue
		}
		theirs := false
		for _, o := range l.gateway.listeners {
			theirs = theirs || o != l && o.spec.Port == l.spec.Port && o.spec.Protocol == l.spec.Protocol && !o.conflicted.status && o.host != l.host && covers(l.host, o.host) && covers(o.host, host)
		}
		if !theirs {
			out = append(out, host)
		}
	}
	return out
}

// covers reports whether host is pattern, or lies below the wildcard pattern. "*" covers all.
func covers(pattern, host string) bool {
	if pattern == "*" || pattern == host {
		return true
	}
	suffix, wild := strings.CutPrefix(pattern, "*")
	return wild && host != "*" && strings.HasSuffix(strings.TrimPrefix(host, "*"), suffix) && len(host) > len(suffix)
}

// intersect returns the narrower of two hosts when one covers the other.
func intersect(a, b string) (string, bool) {
	switch {
	case covers(b, a):
		return a, true
	case covers(a, b):
		return b, true
	}
	return "", false
}

// take gives the listener the rules of a route.
func (l *listener) take(r *route, hosts []string) {
	for _, h := range hosts {
		for _, e := range r.entries {
			if !hasEntry(l.http[h], e) {
				l.http[h] = append(l.http[h], e)
			}
		}
	}
	if r.l4 != nil {
		l.l4 = append(l.l4, l4{r.l4.ref, r.l4.created, hosts, r.l4.to})
	}
}

// hasEntry reports whether a route that names the listener twice has been taken already.
func hasEntry(list []entry, e entry) bool {
	for _, x := range list {
		if x.origin == e.origin && x.match == e.match {
			return true
		}
	}
	return false
}

// unresolved notes what a route refers to and cannot; the first is told.
func (r *route) unresolved(where string, c condition) {
	if r.resolved.status {
		r.resolved, r.where = c, where
	}
}

// unsupported notes a rule that cannot be honoured; requests that it matches get 500.
func (r *route) unsupported(rule int, what string) {
	if r.partly == "" {
		r.partly = "Dropped Rule: requests that they match get 500: "
	} else {
		r.partly += "; "
	}
	r.partly += fmt.Sprintf("spec.rules[%d]: %s", rule, what)
}
