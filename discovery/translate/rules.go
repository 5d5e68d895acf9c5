package translate

import (
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// target is a destination that exists.
type target struct {
	service *mesh.Service
	port    mesh.Port
	cluster string
	policy  *networking.TrafficPolicy
}

// resolve finds the cluster of a destination; port is the one the client asked for, used when the destination names none.
func (v *view) resolve(d *networking.Destination, port uint32, object mesh.ObjectRef, field string) (target, bool) {
	s := v.scope.Covering(d.GetHost())
	if s == nil && v.snap.Service(d.GetHost()) != nil {
		v.problems.add(object, field+".host", reasonNotVisible, d.GetHost()+" is not exported to namespace "+v.proxy.Namespace+", or the Sidecar leaves it out")
		return target{}, false
	}
	if s == nil {
		v.problems.add(object, field+".host", reasonUnknownHost, "no service has the host "+d.GetHost())
		return target{}, false
	}
	number := d.GetPort().GetNumber()
	if number == 0 && len(s.Ports) == 1 {
		number = s.Ports[0].Number
	} else if number == 0 {
		number = port
	}
	p, ok := s.Port(number)
	if !ok || p.Protocol == mesh.UDP {
		v.problems.add(object, field+".port", reasonUnknownPort, d.GetHost()+" has no port "+wire.Itoa(number))
		return target{}, false
	}
	if s.Resolution == mesh.None && v.proxy.Type == mesh.Router { // clients dial the gateway, so it would call itself
		v.problems.add(object, field+".host", reasonNotResolved, d.GetHost()+" has resolution NONE, and a gateway cannot tell where its clients meant to go")
		return target{}, false
	}
	r := v.scope.RuleFor(s)
	sub := r.Subset(d.GetSubset())
	if d.GetSubset() != "" && sub == nil {
		v.problems.add(object, field+".subset", reasonUnknownSubset, d.GetHost()+" has no subset "+d.GetSubset())
		return target{}, false
	}
	return target{s, p, clusterName("outbound", number, d.GetSubset(), s.Host), v.policyOf(r, s, number, sub)}, true
}
