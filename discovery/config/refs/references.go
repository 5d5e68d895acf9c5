// Package refs checks objects that are right by themselves against each other.
package refs

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Check finds what is wrong between objects that are right by themselves: hosts, subsets, ports and gateways
// that are named and not there, things that two objects claim, and rules that have no effect where they apply. It is pure; equal snapshots give equal Problems.
func Check(snap *mesh.Snapshot) []mesh.Problem {
	c := &checker{snap: snap, subsets: map[string][]*mesh.DestinationRule{}, gateways: map[string]bool{}}
	for _, s := range snap.Services {
		if strings.HasPrefix(s.Host, "*") {
			c.wild = append(c.wild, s)
		}
	}
	for _, d := range snap.DestinationRules {
		if strings.HasPrefix(d.Spec.GetHost(), "*") {
			c.wildRules = append(c.wildRules, d)
		} else {
			c.subsets[d.Spec.GetHost()] = append(c.subsets[d.Spec.GetHost()], d)
		}
	}
	for _, g := range snap.Gateways {
		c.gateways[g.Object.Namespace+"/"+g.Object.Name] = true
	}
	c.addresses()
	c.aliases()
	routed := map[claim]mesh.ObjectRef{}
	for _, vs := range snap.VirtualServices {
		if vs.GatewayAPI {
			continue // what is wrong with these was found when they were made
		}
		c.virtualService(vs)
		c.hosts(vs, routed)
		c.unknownHosts(vs)
		c.httpRules(vs)
	}
	for _, d := range snap.DestinationRules {
		c.destinationRule(d)
		c.mutualTLS(d)
	}
	return c.problems
}

// meshGateway stands for all sidecars in a list of gateways.
const meshGateway = "mesh"

// checker is one run of Check.
type checker struct {
	snap      *mesh.Snapshot
	wild      []*mesh.Service // wildcard hosts
	wildRules []*mesh.DestinationRule
	subsets   map[string][]*mesh.DestinationRule // by exact host
	gateways  map[string]bool                    // NAMESPACE/NAME
	problems  []mesh.Problem
}

func (c *checker) add(object mesh.ObjectRef, field, reason, message, remedy string) {
	c.problems = append(c.problems, mesh.Problem{Object: object, Field: field, Reason: reason, Message: message, Remedy: remedy})
}

// service returns the service that answers for host, or nil.
func (c *checker) service(host string) *mesh.Service {
	if s := c.snap.Service(host); s != nil {
		return s
	}
	for _, s := range c.wild {
		if written.Covers(s.Host, host) {
			return s
		}
	}
	return nil
}

func (c *checker) virtualService(vs *mesh.VirtualService) {
	for i, r := range vs.Spec.GetHttp() {
		object, at := vs.Rule(i)
		for j, d := range r.GetRoute() {
			c.destination(object, fmt.Sprintf("%s.route[%d].destination", at, j), d.GetDestination())
		}
		if r.GetMirror() != nil {
			c.destination(object, at+".mirror", r.GetMirror())
		}
		for j, m := range r.GetMirrors() {
			c.destination(object, fmt.Sprintf("%s.mirrors[%d].destination", at, j), m.GetDestination())
		}
		for j, m := range r.GetMatch() {
			c.gatewayNames(object, fmt.Sprintf("%s.match[%d].gateways", at, j), m.GetGateways())
		}
	}
	for i, r := range vs.Spec.GetTcp() {
		for j, d := range r.GetRoute() {
			c.destination(vs.Object, fmt.Sprintf("spec.tcp[%d].route[%d].destination", i, j), d.GetDestination())
		}
	}
	for i, r := range vs.Spec.GetTls() {
		for j, d := range r.GetRoute() {
			c.destination(vs.Object, fmt.Sprintf("spec.tls[%d].route[%d].destination", i, j), d.GetDestination())
		}
	}
	c.gatewayNames(vs.Object, "spec.gateways", vs.Spec.GetGateways())
}

func (c *checker) gatewayNames(object mesh.ObjectRef, field string, names []string) {
	for i, g := range names {
		if g != meshGateway && !c.gateways[g] {
			c.add(object, fmt.Sprintf("%s[%d]", field, i), written.ReasonUnknownGateway, "there is no Gateway "+g, "create it or correct the name")
		}
	}
}

// destination checks one place a route leads to.
func (c *checker) destination(object mesh.ObjectRef, at string, d *networking.Destination) {
	host := d.GetHost()
	s := c.service(host)
	if s == nil {
		c.add(object, at+".host", written.ReasonUnknownHost, "no service has the host "+host, c.hostRemedy(host))
		return
	}
	if subset := d.GetSubset(); subset != "" && !c.defined(host, subset) {
		c.add(object, at+".subset", written.ReasonUnknownSubset, "no DestinationRule of "+host+" defines the subset "+subset, "define it in a DestinationRule of that host")
	}
	if n := d.GetPort().GetNumber(); n != 0 {
		c.port(object, at+".port.number", s, n)
	}
}

// hostRemedy says how the host comes to be, or which one was probably meant.
func (c *checker) hostRemedy(host string) string {
	if strings.HasSuffix(host, mesh.GlobalSuffix) {
		return "export it in a cluster of the mesh"
	}
	if name, namespace, ok := strings.Cut(host, "."); ok && c.snap.Service(mesh.LocalHost(name, namespace)) != nil {
		return "did you mean " + mesh.LocalHost(name, namespace) + "?"
	}
	return "create the Service or ServiceEntry, or correct the host"
}

func (c *checker) port(object mesh.ObjectRef, field string, s *mesh.Service, n uint32) {
	if _, ok := s.Port(n); ok {
		return
	}
	have := make([]string, 0, len(s.Ports))
	for _, p := range s.Ports {
		have = append(have, fmt.Sprint(p.Number))
	}
	remedy := "the host has no port"
	if len(have) > 0 {
		remedy = "it has " + strings.Join(have, ", ")
	}
	c.add(object, field, written.ReasonUnknownPort, fmt.Sprintf("%s has no port %d", s.Host, n), remedy)
}

// defined reports whether any DestinationRule of the host defines the subset.
func (c *checker) defined(host, subset string) bool {
	has := func(d *mesh.DestinationRule) bool {
		return slices.ContainsFunc(d.Spec.GetSubsets(), func(s *networking.Subset) bool { return s.GetName() == subset })
	}
	return slices.ContainsFunc(c.subsets[host], has) ||
		slices.ContainsFunc(c.wildRules, func(d *mesh.DestinationRule) bool { return written.Covers(d.Spec.GetHost(), host) && has(d) })
}

func (c *checker) destinationRule(d *mesh.DestinationRule) {
	host := d.Spec.GetHost()
	if strings.HasPrefix(host, "*") {
		return
	}
	s := c.service(host)
	if s == nil {
		c.add(d.Object, "spec.host", written.ReasonUnknownHost, "no service has the host "+host, c.hostRemedy(host))
		return
	}
	check := func(at string, p *networking.TrafficPolicy) {
		for i, l := range p.GetPortLevelSettings() {
			c.port(d.Object, fmt.Sprintf("%s.portLevelSettings[%d].port.number", at, i), s, l.GetPort().GetNumber())
		}
	}
	check("spec.trafficPolicy", d.Spec.GetTrafficPolicy())
	for i, sub := range d.Spec.GetSubsets() {
		check(fmt.Sprintf("spec.subsets[%d].trafficPolicy", i), sub.GetTrafficPolicy())
	}
}

// claim is what one VirtualService takes for itself.
type claim struct{ host, gateway, layer string }

// hosts reports hosts that an earlier VirtualService, by namespace and name, routes at the same gateway.
func (c *checker) hosts(vs *mesh.VirtualService, routed map[claim]mesh.ObjectRef) {
	var layers []string
	for _, l := range []struct {
		name string
		n    int
	}{{"http", len(vs.Spec.GetHttp())}, {"tls", len(vs.Spec.GetTls())}, {"tcp", len(vs.Spec.GetTcp())}} {
		if l.n > 0 {
			layers = append(layers, l.name)
		}
	}
	gateways := vs.Spec.GetGateways()
	if len(gateways) == 0 {
		gateways = []string{meshGateway}
	}
	for i, host := range vs.Spec.GetHosts() {
		for _, g := range gateways {
			for _, l := range layers {
				first, taken := routed[claim{host, g, l}]
				if !taken {
					routed[claim{host, g, l}] = vs.Object
				} else if first != vs.Object {
					c.add(vs.Object, fmt.Sprintf("spec.hosts[%d]", i), written.ReasonConflictHosts,
						fmt.Sprintf("%s already has %s routes for %s at gateway %s, which are used", first, l, host, g), "merge the two VirtualServices")
				}
			}
		}
	}
}

// addresses reports addresses that two services have. A virtual address is never given twice, so one was written down.
func (c *checker) addresses() {
	owner := map[netip.Addr]*mesh.Service{}
	for _, s := range c.snap.Services {
		for _, a := range s.VIPs {
			first, taken := owner[a]
			if !taken {
				owner[a] = s
				continue
			}
			if first.Object == s.Object && first.Global == s.Global {
				continue // one ServiceEntry with several hosts
			}
			field := "spec.addresses"
			if s.Object.Kind == "Service" {
				field = "spec.clusterIPs"
			}
			c.add(s.Object, field, written.ReasonAddressInUse, fmt.Sprintf("the address %s of %s is that of %s (%s) too", a, s.Host, first.Host, first.Object), "give one of the two another address, or none")
		}
	}
}
