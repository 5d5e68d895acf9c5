package gatewayapi

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// rootKey is where a ConfigMap has certificate authorities.
const rootKey = "ca.crt"

// policy is a BackendTLSPolicy.
type policy struct {
	ref mesh.ObjectRef
	obj *gatewayv1.BackendTLSPolicy
}

// policies says how gateways speak to Services in TLS. Of two policies for one port the older counts.
func (c *converter) policies() {
	var list []policy
	authorities := map[key]string{}
	for _, x := range c.snap.KubeObjects {
		switch v := x.Value.(type) {
		case *gatewayv1.BackendTLSPolicy:
			list = append(list, policy{x.Object, v})
		case *corev1.ConfigMap:
			authorities[key{x.Object.Namespace, x.Object.Name}] = v.Data[rootKey]
		}
	}
	slices.SortStableFunc(list, func(a, b policy) int {
		return cmp.Or(a.obj.CreationTimestamp.Time.Compare(b.obj.CreationTimestamp.Time), strings.Compare(a.ref.Namespace, b.ref.Namespace), strings.Compare(a.ref.Name, b.ref.Name))
	})
	taken := map[backendPort]mesh.ObjectRef{}
	for _, p := range list {
		c.policy(p, authorities, taken)
	}
	slices.SortFunc(c.out.Backends, func(a, b *mesh.BackendTLS) int {
		return cmp.Or(strings.Compare(a.Host, b.Host), cmp.Compare(a.Port, b.Port))
	})
}

// backendPort is a port of a Service; 0 stands for all that are not named.
type backendPort struct {
	host string
	port uint32
}

func (c *converter) policy(p policy, authorities map[key]string, taken map[backendPort]mesh.ObjectRef) {
	accepted, resolved := is("Accepted", true, "Accepted", ""), is("ResolvedRefs", true, "ResolvedRefs", "")
	roots, names := c.authorities(p, authorities, &accepted, &resolved), []string{}
	for _, n := range p.obj.Spec.Validation.SubjectAltNames {
		names = append(names, cmp.Or(string(n.Hostname), string(n.URI)))
	}
	if len(p.obj.Spec.Options) > 0 {
		accepted = is("Accepted", false, "Invalid", "spec.options are not known")
	}
	used := map[*gateway]bool{}
	for i, t := range p.obj.Spec.TargetRefs {
		if t.Group != "" || t.Kind != "Service" {
			accepted = is("Accepted", false, "TargetNotFound", fmt.Sprintf("spec.targetRefs[%d]: a %s is no target; name a Service", i, t.Kind))
			continue
		}
		at := backendPort{host: mesh.LocalHost(string(t.Name), p.ref.Namespace)}
		if t.SectionName != nil && *t.SectionName != "" {
			if at.port = c.portNamed(at.host, string(*t.SectionName)); at.port == 0 {
				accepted = is("Accepted", false, "TargetNotFound", fmt.Sprintf("spec.targetRefs[%d]: Service %s has no port named %s", i, t.Name, *t.SectionName))
				continue
			}
		}
		for g := range c.users[at.host] {
			used[g] = true
		}
		if first, conflict := taken[at]; conflict {
			accepted = is("Accepted", false, "Conflicted", fmt.Sprintf("spec.targetRefs[%d]: %s is older and for the same", i, first))
			continue
		}
		taken[at] = p.ref
		c.out.Backends = append(c.out.Backends, &mesh.BackendTLS{
			Host: at.host, Port: at.port, Object: p.ref, Name: string(p.obj.Spec.Validation.Hostname), Names: names, Roots: []byte(roots), Broken: !accepted.status,
		})
	}
	for _, x := range []condition{accepted, resolved} {
		if !x.status {
			c.problem(p.ref, "spec", x.reason, x.message, "")
		}
	}
	status := gatewayv1.PolicyStatus{Ancestors: []gatewayv1.PolicyAncestorStatus{}}
	for _, g := range c.ordered {
		if used[g] && len(status.Ancestors) < maxAncestors {
			group, kind, namespace := gatewayv1.Group(group), gatewayv1.Kind("Gateway"), gatewayv1.Namespace(g.ref.Namespace)
			status.Ancestors = append(status.Ancestors, gatewayv1.PolicyAncestorStatus{
				AncestorRef: gatewayv1.ParentReference{Group: &group, Kind: &kind, Namespace: &namespace, Name: gatewayv1.ObjectName(g.ref.Name)}, ControllerName: ControllerName,
				Conditions: conditions(p.obj.Generation, accepted, resolved),
			})
		}
	}
	c.status(p.ref, "backendtlspolicies", p.obj.Generation, status)
}

// maxAncestors is the API's limit.
const maxAncestors = 16

// authorities are those that the policy names, in PEM; none: the system's.
func (c *converter) authorities(p policy, have map[key]string, accepted, resolved *condition) string {
	v := &p.obj.Spec.Validation
	if v.WellKnownCACertificates != nil && *v.WellKnownCACertificates != "" {
		if *v.WellKnownCACertificates != gatewayv1.WellKnownCACertificatesSystem {
			*accepted = is("Accepted", false, "Invalid", fmt.Sprintf("wellKnownCACertificates %s is not known", *v.WellKnownCACertificates))
		}
		return ""
	}
	var out strings.Builder
	for i, r := range v.CACertificateRefs {
		at := fmt.Sprintf("spec.validation.caCertificateRefs[%d]: ", i)
		if r.Group != "" || r.Kind != "ConfigMap" {
			*resolved = is("ResolvedRefs", false, "InvalidKind", at+"authorities are in ConfigMaps, not in a "+string(r.Kind))
			continue
		}
		text := have[key{p.ref.Namespace, string(r.Name)}]
		if !certificates(text) {
			*resolved = is("ResolvedRefs", false, "InvalidCACertificateRef", fmt.Sprintf("%sthere is no ConfigMap %s/%s with certificates in key %s that isthmusd may read", at, p.ref.Namespace, r.Name, rootKey))
			continue
		}
		out.WriteString(strings.TrimRight(text, "\n") + "\n")
	}
	if out.Len() == 0 {
		*accepted = is("Accepted", false, "NoValidCACertificate", "no reference leads to certificate authorities")
	}
	return out.String()
}

// certificates reports whether the text is one certificate in PEM or more, and nothing else.
func certificates(text string) bool {
	n := 0
	for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
		if _, err := x509.ParseCertificate(block.Bytes); block.Type != "CERTIFICATE" || err != nil {
			return false
		}
		n++
	}
	return n > 0
}

func (c *converter) portNamed(host, name string) uint32 {
	if s := c.snap.Service(host); s != nil {
		for _, p := range s.Ports {
			if p.Name == name {
				return p.Number
			}
		}
	}
	return 0
}

// uses notes that a Gateway leads to the Services of a route.
func (c *converter) uses(g *gateway, r *route) {
	for _, h := range r.services {
		if c.users[h] == nil {
			c.users[h] = map[*gateway]bool{}
		}
		c.users[h][g] = true
	}
}

func sameBackend(a, b *mesh.BackendTLS) bool { return reflect.DeepEqual(a, b) }
