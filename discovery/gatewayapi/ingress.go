package gatewayapi

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

const (
	// IngressController is the controller of the IngressClasses that are ours.
	IngressController = "isthmus.io/ingress-controller"

	groupIngress    = "networking.k8s.io"
	annClass        = "kubernetes.io/ingress.class"
	annDefaultClass = "ingressclass.kubernetes.io/is-default-class"
)

// ingresses are those of ours, which share the ports 80 and 443 of the mesh's ingress gateway.
type ingresses struct {
	c       *converter
	list    []*ingress
	classes map[string]bool // ours
	byFault bool            // Ingresses that name no class are ours
	hosts   map[string][]entry
	certs   map[string]certificate // by host
}

type ingress struct {
	ref mesh.ObjectRef
	obj *networkingv1.Ingress
}

// certificate is what a host is served with.
type certificate struct {
	secret string
	by     mesh.ObjectRef
}

// ingress converts all Ingresses.
func (c *converter) ingress() {
	x := &ingresses{c: c, classes: map[string]bool{ClassName: true}, hosts: map[string][]entry{}, certs: map[string]certificate{}}
	for _, o := range c.snap.KubeObjects {
		if v, ok := o.Value.(*networkingv1.IngressClass); ok {
			ours := v.Spec.Controller == IngressController
			x.classes[v.Name] = ours
			x.byFault = x.byFault || ours && v.Annotations[annDefaultClass] == "true"
		}
	}
	for _, o := range c.snap.KubeObjects {
		if v, ok := o.Value.(*networkingv1.Ingress); ok && x.ours(v) {
			x.list = append(x.list, &ingress{o.Object, v})
		}
	}
	slices.SortStableFunc(x.list, func(a, b *ingress) int { // the older counts first
		return cmp.Or(a.obj.CreationTimestamp.Time.Compare(b.obj.CreationTimestamp.Time), strings.Compare(a.ref.Namespace, b.ref.Namespace), strings.Compare(a.ref.Name, b.ref.Name))
	})
	for _, i := range x.list {
		x.rules(i)
		x.tls(i)
		x.status(i)
	}
	x.emit()
}

func (x *ingresses) ours(v *networkingv1.Ingress) bool {
	if v.Spec.IngressClassName != nil {
		return x.classes[*v.Spec.IngressClassName]
	}
	if class, said := v.Annotations[annClass]; said {
		return x.classes[class]
	}
	return x.byFault
}

// rules adds the paths of an Ingress.
func (x *ingresses) rules(i *ingress) {
	hosts := map[string]bool{}
	for r, rule := range i.obj.Spec.Rules {
		host := strings.ToLower(cmp.Or(rule.Host, "*"))
		hosts[host] = true
		if rule.HTTP == nil {
			continue
		}
		for p := range rule.HTTP.Paths {
			path := &rule.HTTP.Paths[p]
			at := fmt.Sprintf("spec.rules[%d].http.paths[%d]", r, p)
			m, k := &networking.HTTPMatchRequest{}, rank{length: len(cmp.Or(path.Path, "/")), path: byPrefix}
			if path.PathType != nil && *path.PathType == networkingv1.PathTypeExact {
				m.Uri, k.path = exact(path.Path), byExact
			} else {
				m.Uri = &networking.StringMatch{MatchType: &networking.StringMatch_Prefix{Prefix: cmp.Or(path.Path, "/")}}
			}
			h := x.backend(i, at+".backend", &path.Backend)
			h.Match = []*networking.HTTPMatchRequest{m}
			x.hosts[host] = append(x.hosts[host], entry{h, mesh.Origin{Object: i.ref, Index: r, Field: "spec.rules"}, p, k, i.obj.CreationTimestamp.Time})
		}
	}
	if i.obj.Spec.DefaultBackend == nil {
		return
	}
	hosts["*"] = true
	h := x.backend(i, "spec.defaultBackend", i.obj.Spec.DefaultBackend)
	h.Match = []*networking.HTTPMatchRequest{{Uri: &networking.StringMatch{MatchType: &networking.StringMatch_Prefix{Prefix: "/"}}}}
	for host := range hosts {
		x.hosts[host] = append(x.hosts[host], entry{h, mesh.Origin{Object: i.ref, Index: len(i.obj.Spec.Rules), Field: "spec.rules"}, 0, rank{}, i.obj.CreationTimestamp.Time})
	}
}

// backend is a route to a destination, or 503 when there is none.
func (x *ingresses) backend(i *ingress, at string, b *networkingv1.IngressBackend) *networking.HTTPRoute {
	none := func(field, reason, message string) *networking.HTTPRoute {
		x.c.problem(i.ref, at+field, reason, message, "until then such requests get 503")
		return &networking.HTTPRoute{DirectResponse: &networking.HTTPDirectResponse{Status: 503}}
	}
	if b.Service == nil {
		return none(".resource", "Unsupported", "only Services are destinations")
	}
	host := mesh.LocalHost(b.Service.Name, i.ref.Namespace)
	svc := x.c.snap.Service(host)
	if svc == nil {
		return none(".service.name", "UnknownHost", "there is no Service "+i.ref.Namespace+"/"+b.Service.Name)
	}
	for _, p := range svc.Ports {
		if p.Protocol != mesh.UDP && (b.Service.Port.Name != "" && p.Name == b.Service.Port.Name || b.Service.Port.Name == "" && p.Number == uint32(b.Service.Port.Number)) {
			return &networking.HTTPRoute{Route: []*networking.HTTPRouteDestination{{Destination: &networking.Destination{Host: host, Port: &networking.PortSelector{Number: p.Number}}}}}
		}
	}
	return none(".service.port", "UnknownPort", fmt.Sprintf("Service %s/%s has no port %s", i.ref.Namespace, b.Service.Name, cmp.Or(b.Service.Port.Name, itoa(int(b.Service.Port.Number)))))
}

// tls finds the certificates of an Ingress. Of two for one host the older Ingress has it.
func (x *ingresses) tls(i *ingress) {
	for n, t := range i.obj.Spec.TLS {
		at := fmt.Sprintf("spec.tls[%d]", n)
		s := x.c.snap.Credential(i.ref.Namespace, t.SecretName)
		if s == nil || len(s.Certificate) == 0 || len(s.Key) == 0 {
			x.c.problem(i.ref, at+".secretName", "NoCredential", fmt.Sprintf("there is no Secret %s/%s with a certificate and its key that isthmusd may read; its hosts are not served with TLS", i.ref.Namespace, t.SecretName), "")
			continue
		}
		hosts := t.Hosts
		if len(hosts) == 0 {
			hosts = []string{"*"}
		}
		for _, h := range hosts {
			h = strings.ToLower(h)
			secret := "kubernetes-gateway://" + i.ref.Namespace + "/" + t.SecretName
			if other, taken := x.certs[h]; taken {
				if other.secret != secret {
					x.c.problem(i.ref, at+".hosts", "ConflictingHosts", h+" has the certificate of "+other.by.String(), "")
				}
				continue
			}
			x.certs[h] = certificate{secret, i.ref}
		}
	}
}

// status says where the ingress gateway is reached.
func (x *ingresses) status(i *ingress) {
	out := networkingv1.IngressStatus{}
	name := cmp.Or(x.c.snap.MeshConfig.GetSpec().GetIngressService(), "istio-ingressgateway")
	if decl := x.c.declaredAs(serviceHost(name, x.c.root())); decl != nil {
		for _, a := range addressesOf(decl) {
			l := networkingv1.IngressLoadBalancerIngress{IP: a.Value}
			if _, err := netip.ParseAddr(a.Value); err != nil {
				l = networkingv1.IngressLoadBalancerIngress{Hostname: a.Value}
			}
			out.LoadBalancer.Ingress = append(out.LoadBalancer.Ingress, l)
		}
	}
	x.c.statusOf(groupIngress, i.ref, "ingresses", i.obj.Generation, out)
}

// root is the namespace of the mesh's own parts.
func (c *converter) root() string {
	return cmp.Or(c.snap.MeshConfig.GetSpec().GetRootNamespace(), "istio-system")
}

// emit writes a server for plain requests, one for each host with a certificate, and a VirtualService for each host.
func (x *ingresses) emit() {
	if len(x.list) == 0 {
		return
	}
	const open, sealed = "ingress~http", "ingress~https"
	root := x.c.root()
	object := func(kind, name string) mesh.ObjectRef {
		return mesh.ObjectRef{Kind: kind, Namespace: root, Name: name, Source: x.list[0].ref.Source}
	}
	selector := map[string]string{"istio": cmp.Or(x.c.snap.MeshConfig.GetSpec().GetIngressSelector(), "ingressgateway")}
	plain := &networking.Server{Port: &networking.Port{Number: 80, Name: "http", Protocol: "HTTP"}, Hosts: []string{"*"}}
	x.c.out.Input.Gateways = append(x.c.out.Input.Gateways, &mesh.Gateway{Object: object("Gateway", open), Spec: &networking.Gateway{Selector: selector, Servers: []*networking.Server{plain}}})
	if len(x.certs) > 0 {
		g := &mesh.Gateway{Object: object("Gateway", sealed), Spec: &networking.Gateway{Selector: selector}}
		for n, h := range slices.Sorted(maps.Keys(x.certs)) {
			s := x.certs[h].secret
			if !slices.Contains(g.Secrets, s) {
				g.Secrets = append(g.Secrets, s)
			}
			g.Spec.Servers = append(g.Spec.Servers, &networking.Server{
				Port: &networking.Port{Number: 443, Name: "https-" + itoa(n), Protocol: "HTTPS"}, Hosts: []string{h},
				Tls: &networking.ServerTLSSettings{Mode: networking.ServerTLSSettings_SIMPLE, CredentialNames: []string{s}},
			})
		}
		x.c.out.Input.Gateways = append(x.c.out.Input.Gateways, g)
	}
	for n, host := range slices.Sorted(maps.Keys(x.hosts)) {
		entries := x.hosts[host]
		slices.SortStableFunc(entries, entry.compare)
		vs := &mesh.VirtualService{Object: object("VirtualService", "ingress~"+itoa(n)), GatewayAPI: true, Spec: &networking.VirtualService{
			Hosts: []string{host}, Gateways: []string{root + "/" + open, root + "/" + sealed}, ExportTo: []string{"*"},
		}}
		for _, e := range entries {
			vs.Spec.Http, vs.Origins = append(vs.Spec.Http, e.http), append(vs.Origins, e.origin)
		}
		x.c.out.Input.VirtualServices = append(x.c.out.Input.VirtualServices, vs)
	}
}
