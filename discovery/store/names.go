package store

import (
	"strings"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// namesAnnotation, among a ServiceExport's exportedAnnotations, asks for names below the ".global" host: "cluster" for
// one of each cluster, "pod" for one of each pod besides, "none" for neither.
const namesAnnotation = "isthmus.io/names"

// maxHost is the longest host in octets (RFC 1035, section 2.3.4).
const maxHost = 253

// asks reports which names a ".global" host has besides its own: what its export says, else what is configured; a
// headless service always has all, for its pods are not alike.
func (b *builder) asks(s *mesh.Service) (clusters, pods bool) {
	if s.Facts != nil {
		switch s.Facts.Annotations[namesAnnotation] {
		case "none":
			return false, false
		case "cluster":
			return true, false
		case "pod":
			return true, true
		}
		if s.Facts.Headless {
			return true, true
		}
	}
	return b.cfg.ClusterNames || b.cfg.PodNames, b.cfg.PodNames
}

// parts makes the hosts CLUSTER.NAME.NAMESPACE.global and POD.CLUSTER.NAME.NAMESPACE.global of a ".global" host, in no
// order. Pods that only the gateways of a network of this control plane lead to have none: such gateways choose the pod.
func (b *builder) parts(d *draft, s *mesh.Service) []*mesh.Service {
	clusters, pods := b.asks(s)
	if !clusters {
		return nil
	}
	by := map[string]*mesh.Service{}
	add := func(host string, e *mesh.Endpoint) {
		if len(host) > maxHost || d.decl[host] != nil {
			return
		}
		p := by[host]
		if p == nil {
			p = &mesh.Service{Host: host, Name: s.Name, Namespace: s.Namespace, Object: s.Object, Ports: s.Ports, Global: true, Facts: &mesh.Facts{}}
			by[host] = p
		}
		p.Endpoints = append(p.Endpoints, e)
	}
	for _, e := range s.Endpoints {
		if c := d.Cluster(e.Cluster); !mesh.IsLabel(string(e.Cluster)) || c != nil && c.Managed && e.Network != "" && e.Network != d.Local.Network {
			continue
		}
		host := string(e.Cluster) + "." + s.Host
		add(host, e)
		if pods && isSubdomain(e.Workload) {
			add(e.Workload+"."+host, e)
		}
	}
	out := make([]*mesh.Service, 0, len(by))
	for _, p := range by {
		out = append(out, p)
	}
	return out
}

func isSubdomain(name string) bool {
	for label := range strings.SplitSeq(name, ".") {
		if !mesh.IsLabel(label) {
			return false
		}
	}
	return true
}
