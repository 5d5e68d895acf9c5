package views

import (
	"cmp"
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

type workload struct {
	cluster         mesh.ClusterID
	namespace, name string
}

func workloadOf(p *mesh.Proxy) workload { return workload{p.Cluster, p.Namespace, p.Name} }

// owners lists the services that have a workload as an endpoint, by host.
type owners map[workload][]*mesh.Service

// after returns the owners in the change's newest snapshot: those before, brought in line where it is known what changed.
func (o owners) after(c change) owners {
	if _, known := c.to.Since(c.from); !known && !c.endpointsOnly {
		o = nil
	}
	if o == nil {
		o = owners{}
		for _, s := range c.to.Services {
			for _, e := range s.Endpoints {
				w := workload{e.Cluster, e.Namespace, e.Workload}
				if have := o[w]; len(have) == 0 || have[len(have)-1] != s {
					o[w] = append(have, s)
				}
			}
		}
		return o
	}
	for _, p := range c.pairs {
		for _, e := range p[0].Endpoints {
			o.replace(workload{e.Cluster, e.Namespace, e.Workload}, p[0].Host, nil)
		}
		for _, e := range p[1].Endpoints {
			o.replace(workload{e.Cluster, e.Namespace, e.Workload}, p[1].Host, p[1])
		}
	}
	return o
}

// replace puts a service in the list of a workload, or takes it out when it is nil. Lists that were given away stay.
func (o owners) replace(w workload, host string, s *mesh.Service) {
	have := o[w]
	i, there := slices.BinarySearchFunc(have, host, func(x *mesh.Service, host string) int { return cmp.Compare(x.Host, host) })
	switch {
	case s == nil && !there:
	case s == nil && len(have) == 1:
		delete(o, w)
	case s == nil:
		o[w] = slices.Delete(slices.Clone(have), i, i+1)
	case there:
		o[w] = slices.Clone(have)
		o[w][i] = s
	default:
		o[w] = slices.Insert(slices.Clone(have), i, s)
	}
}
