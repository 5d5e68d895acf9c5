package refs

import (
	"fmt"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// unknownHosts reports hosts below our own zones that no service has: no client can ask for them.
func (c *checker) unknownHosts(vs *mesh.VirtualService) {
	if !meshOnly(vs.Spec.GetGateways()) {
		return // what comes in at a gateway may have any host
	}
	for i, host := range vs.Spec.GetHosts() {
		own := strings.HasSuffix(host, mesh.GlobalSuffix) || strings.HasSuffix(host, ".svc.cluster.local")
		if own && !strings.HasPrefix(host, "*") && c.service(host) == nil {
			c.add(vs.Object, fmt.Sprintf("spec.hosts[%d]", i), written.ReasonUnknownHost, "no service has the host "+host, c.hostRemedy(host))
		}
	}
}

// meshOnly reports whether rules with these gateways apply at sidecars only.
func meshOnly(gateways []string) bool {
	return !slices.ContainsFunc(gateways, func(g string) bool { return g != meshGateway })
}

// httpRules reports http rules that no HTTP port of the hosts can be meant by.
func (c *checker) httpRules(vs *mesh.VirtualService) {
	var hosts []*mesh.Service
	for _, h := range vs.Spec.GetHosts() {
		s := c.service(h)
		switch {
		case s != nil:
			hosts = append(hosts, s)
		case strings.HasPrefix(h, "*"):
			return // it covers hosts that are yet to come
		}
	}
	for i, r := range vs.Spec.GetHttp() {
		for j, m := range r.GetMatch() {
			gateways := m.GetGateways()
			if len(gateways) == 0 {
				gateways = vs.Spec.GetGateways()
			}
			if m.GetPort() != 0 && meshOnly(gateways) {
				object, at := vs.Rule(i)
				c.notHTTP(object, fmt.Sprintf("%s.match[%d].port", at, j), hosts, m.GetPort())
			}
		}
	}
	if len(vs.Spec.GetHttp()) > 0 && meshOnly(vs.Spec.GetGateways()) && slices.ContainsFunc(vs.Spec.GetHttp(), anyPort) {
		c.notHTTP(vs.Object, "spec.http", hosts, 0)
	}
}

// anyPort reports whether the rule applies to all ports of a host.
func anyPort(r *networking.HTTPRoute) bool {
	return len(r.GetMatch()) == 0 || slices.ContainsFunc(r.GetMatch(), func(m *networking.HTTPMatchRequest) bool { return m.GetPort() == 0 })
}

// notHTTP reports the ports with that number (0: all) of the hosts, unless one of them may be HTTP.
func (c *checker) notHTTP(object mesh.ObjectRef, field string, hosts []*mesh.Service, number uint32) {
	before := len(c.problems)
	for _, s := range hosts {
		for _, p := range s.Ports {
			if number != 0 && p.Number != number {
				continue
			}
			if p.Sniffed {
				c.problems = c.problems[:before]
				return
			}
			switch p.Protocol {
			case mesh.TCP, mesh.TLS, mesh.HTTPS:
				c.add(object, field, written.ReasonNotHTTP, fmt.Sprintf("http rules do not apply to port %d of %s, which is %s", p.Number, s.Host, p.Protocol), httpRemedy(s, p))
			case mesh.UDP: // a second transport under the number
			default:
				c.problems = c.problems[:before]
				return
			}
		}
	}
}

// httpRemedy says how the port becomes one that http rules apply to.
func httpRemedy(s *mesh.Service, p mesh.Port) string {
	switch {
	case p.Protocol != mesh.TCP:
		return "route it by tls rules, or name the port http-... if it is plain HTTP"
	case s.Object.Kind == "ServiceEntry":
		return "set protocol: HTTP on the port"
	case s.Object.Kind == "ServiceImport":
		return "in the clusters that export it, name the port http-..., or set appProtocol: http on it"
	}
	return "name the port http-..., or set appProtocol: http on it"
}

// mutualTLS reports settings that turn mesh TLS off for endpoints that only gateways lead to.
func (c *checker) mutualTLS(d *mesh.DestinationRule) {
	services := c.ruled(d.Spec.GetHost())
	check := func(at string, t *networking.ClientTLSSettings, labels map[string]string) {
		if t == nil || t.GetMode() == networking.ClientTLSSettings_ISTIO_MUTUAL {
			return
		}
		if where := c.behindGateways(services, labels); where != "" {
			c.add(d.Object, at+".tls.mode", written.ReasonNeedsMutualTLS,
				fmt.Sprintf("endpoints in %s are reached through gateways, which carry mutual TLS only; with tls mode %s they are not used", where, t.GetMode()),
				"leave tls out, or use ISTIO_MUTUAL")
		}
	}
	policy := func(at string, p *networking.TrafficPolicy, labels map[string]string) {
		if !replaced(p, services) {
			check(at, p.GetTls(), labels)
		}
		for i, l := range p.GetPortLevelSettings() {
			check(fmt.Sprintf("%s.portLevelSettings[%d]", at, i), l.GetTls(), labels)
		}
	}
	policy("spec.trafficPolicy", d.Spec.GetTrafficPolicy(), nil)
	for i, s := range d.Spec.GetSubsets() {
		policy(fmt.Sprintf("spec.subsets[%d].trafficPolicy", i), s.GetTrafficPolicy(), s.GetLabels())
	}
}

// ruled returns the services that a DestinationRule of the host applies to: those below a wildcard that have no rule
// of their own.
func (c *checker) ruled(host string) []*mesh.Service {
	if !strings.HasPrefix(host, "*") {
		if s := c.service(host); s != nil {
			return []*mesh.Service{s}
		}
		return nil
	}
	var out []*mesh.Service
	for _, s := range c.snap.Services {
		if written.Covers(host, s.Host) && len(c.subsets[s.Host]) == 0 {
			out = append(out, s)
		}
	}
	return out
}

// replaced reports whether settings for single ports stand in for the policy at each port of the services.
func replaced(p *networking.TrafficPolicy, services []*mesh.Service) bool {
	has := func(port mesh.Port) bool {
		return slices.ContainsFunc(p.GetPortLevelSettings(), func(l *networking.TrafficPolicy_PortTrafficPolicy) bool {
			return l.GetPort().GetNumber() == port.Number
		})
	}
	for _, s := range services {
		if slices.ContainsFunc(s.Ports, func(port mesh.Port) bool { return !has(port) }) {
			return false
		}
	}
	return len(p.GetPortLevelSettings()) > 0
}

// behindGateways names the clusters on other networks in which the services have endpoints with the labels.
func (c *checker) behindGateways(services []*mesh.Service, labels map[string]string) string {
	local := c.snap.Local
	if local == nil {
		return ""
	}
	var names []string
	for _, s := range services {
		for _, e := range s.Endpoints {
			if e.Cluster == "" || e.Cluster == local.ID || e.Network == "" || e.Network == local.Network || s.External {
				continue
			}
			if written.Selects(labels, e.Labels) {
				names = append(names, string(e.Cluster))
			}
		}
	}
	slices.Sort(names)
	switch names = slices.Compact(names); len(names) {
	case 0:
		return ""
	case 1:
		return "cluster " + names[0]
	}
	return "clusters " + strings.Join(names, ", ")
}

// aliases reports Services that are names for hosts of the mesh. Envoy would resolve such a name to the virtual
// address, which only captured connections may go to. Hosts outside and headless ones resolve to what can be dialled.
func (c *checker) aliases() {
	for _, s := range c.snap.Services {
		if s.Object.Kind != "Service" || s.Resolution != mesh.DNS || s.Global {
			continue
		}
		for _, e := range s.Endpoints {
			if target := c.snap.Service(e.Address); target != nil && !target.External && !target.Headless {
				c.add(s.Object, "spec.externalName", written.ReasonAliasOfMesh, fmt.Sprintf("externalName %s is a host of the mesh; Envoy would dial its virtual address", e.Address),
					"point a VirtualService at it instead, or use the host itself")
			}
		}
	}
}
