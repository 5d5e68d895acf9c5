// Package peerauth merges the PeerAuthentications that apply to one workload. It is pure, and knows nothing of proxies.
package peerauth

import (
	"slices"

	security "istio.io/api/security/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// rootNamespace holds the objects that apply to the whole mesh.
const rootNamespace = "istio-system"

// Mode says what a port takes.
type Mode = security.PeerAuthentication_MutualTLS_Mode

// The modes.
const (
	Unset      = security.PeerAuthentication_MutualTLS_UNSET
	Disable    = security.PeerAuthentication_MutualTLS_DISABLE
	Permissive = security.PeerAuthentication_MutualTLS_PERMISSIVE
	Strict     = security.PeerAuthentication_MutualTLS_STRICT
)

// Policy is what one workload takes.
type Policy struct {
	Mode  Mode
	Ports map[uint32]Mode // at the workload
}

// At returns what a port takes.
func (p Policy) At(port uint32) Mode {
	if mode, ok := p.Ports[port]; ok && mode != Unset {
		return mode
	}
	return p.Mode
}

// For merges the objects that apply to a workload: of the mesh, of its namespace, of the workload. At each level the
// first object by namespace and name counts; what it leaves unset comes from the level above.
func For(list []*mesh.PeerAuthentication, namespace string, labels map[string]string) Policy {
	var levels [3]*security.PeerAuthentication
	for _, pa := range list {
		selector := pa.Spec.GetSelector().GetMatchLabels()
		level := -1
		switch {
		case len(selector) > 0 && pa.Object.Namespace == namespace && selects(selector, labels):
			level = 2
		case len(selector) == 0 && pa.Object.Namespace == namespace && namespace != rootNamespace:
			level = 1
		case len(selector) == 0 && pa.Object.Namespace == rootNamespace:
			level = 0
		}
		if level >= 0 && levels[level] == nil {
			levels[level] = pa.Spec
		}
	}
	out := Policy{Mode: Permissive, Ports: map[uint32]Mode{}}
	for _, spec := range levels {
		if mode := spec.GetMtls().GetMode(); mode != Unset {
			out.Mode = mode
		}
	}
	for port, m := range levels[2].GetPortLevelMtls() {
		out.Ports[port] = m.GetMode()
	}
	return out
}

func selects(selector, labels map[string]string) bool {
	for k, want := range selector {
		if labels[k] != want {
			return false
		}
	}
	return true
}

// TurnsOff reports whether some object turns mutual TLS off for some port.
func TurnsOff(list []*mesh.PeerAuthentication) bool {
	return slices.ContainsFunc(list, func(pa *mesh.PeerAuthentication) bool {
		for _, m := range pa.Spec.GetPortLevelMtls() {
			if m.GetMode() == Disable {
				return true
			}
		}
		return pa.Spec.GetMtls().GetMode() == Disable
	})
}

// Off reports whether the endpoint takes no mutual TLS at a port of its Service.
func Off(list []*mesh.PeerAuthentication, e *mesh.Endpoint, p mesh.Port) bool {
	return TurnsOff(list) && For(list, e.Namespace, e.Labels).At(e.PortOf(p)) == Disable
}

// OffEverywhere reports whether the endpoint takes mutual TLS at none of the ports.
func OffEverywhere(list []*mesh.PeerAuthentication, e *mesh.Endpoint, ports []mesh.Port) bool {
	return len(ports) > 0 && !slices.ContainsFunc(ports, func(p mesh.Port) bool { return p.Protocol != mesh.UDP && !Off(list, e, p) })
}
