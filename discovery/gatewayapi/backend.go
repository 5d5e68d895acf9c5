package gatewayapi

import (
	"fmt"

	networking "istio.io/api/networking/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// groupMCS is the group of ServiceImports, groupIstio that of hosts as Istio knows them.
const (
	groupMCS   = "multicluster.x-k8s.io"
	groupIstio = "networking.istio.io"
)

// backend finds the destination that a reference means; bad says why there is none.
func (c *converter) backend(r *route, ref gatewayv1.BackendObjectReference) (to *networking.Destination, bad condition) {
	no := func(reason gatewayv1.RouteConditionReason, format string, args ...any) (*networking.Destination, condition) {
		return nil, is("ResolvedRefs", false, string(reason), fmt.Sprintf(format, args...))
	}
	g, kind, namespace := or(ref.Group, ""), or(ref.Kind, "Service"), or(ref.Namespace, r.ref.Namespace)
	var host string
	switch {
	case g == "" && kind == "Service":
		host = mesh.LocalHost(string(ref.Name), namespace)
	case g == groupMCS && kind == "ServiceImport":
		host = mesh.GlobalHost(string(ref.Name), namespace)
	case g == groupIstio && kind == "Hostname":
		host, namespace = string(ref.Name), r.ref.Namespace
	default:
		return no(gatewayv1.RouteReasonInvalidKind, "a %s of group %q is no destination; name a Service or a ServiceImport", kind, g)
	}
	if !c.granted(group, r.ref.Kind, r.ref.Namespace, g, kind, namespace, string(ref.Name)) {
		return no(gatewayv1.RouteReasonRefNotPermitted, "no ReferenceGrant in namespace %s lets a %s of namespace %s use %s %s", namespace, r.ref.Kind, r.ref.Namespace, kind, ref.Name)
	}
	if ref.Port == nil {
		return no(gatewayv1.RouteReasonBackendNotFound, "the port of %s %s/%s is missing", kind, namespace, ref.Name)
	}
	svc := c.snap.Service(host)
	if svc == nil {
		return no(gatewayv1.RouteReasonBackendNotFound, "there is no %s %s/%s", kind, namespace, ref.Name)
	}
	port, ok := svc.Port(uint32(*ref.Port))
	switch {
	case !ok:
		return no(gatewayv1.RouteReasonBackendNotFound, "%s %s/%s has no port %d", kind, namespace, ref.Name, *ref.Port)
	case port.Protocol == mesh.UDP:
		return no(gatewayv1.RouteReasonUnsupportedProtocol, "port %d of %s %s/%s is UDP", *ref.Port, kind, namespace, ref.Name)
	}
	r.services = append(r.services, host)
	return &networking.Destination{Host: host, Port: &networking.PortSelector{Number: uint32(*ref.Port)}}, condition{}
}

// weight is that of a reference, 1 by default.
func weight(w *int32) int32 {
	if w == nil {
		return 1
	}
	return *w
}
