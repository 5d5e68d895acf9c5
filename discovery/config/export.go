package config

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func (o *object) serviceExport() {
	var e mcsv1beta1.ServiceExport // v1alpha1 has the same fields
	if !o.Into(&e) {
		return
	}
	o.Meta = e.ObjectMeta
	ok, to := o.exportTo()
	if !ok {
		return
	}
	o.d.in.Exports = append(o.d.in.Exports, &mesh.Export{
		Object: o.Ref, ExportTo: to, Created: e.CreationTimestamp.UTC(), Generation: e.Generation,
		Labels: o.exportedLabels(e.Spec.ExportedLabels), Annotations: o.exportedAnnotations(e.Spec.ExportedAnnotations),
	})
}

// exportedLabels leaves out what no object can carry.
func (o *object) exportedLabels(in map[string]string) map[string]string {
	out := o.exportedKeys("spec.exportedLabels", in)
	for _, k := range slices.Sorted(maps.Keys(out)) {
		if e := validation.IsValidLabelValue(out[k]); len(e) > 0 {
			o.Note("spec.exportedLabels["+k+"]", written.ReasonInvalidValue, written.Show(out[k])+" is not the value of a label; it is not exported", written.Rule(e))
			delete(out, k)
		}
	}
	return out
}

func (o *object) exportedAnnotations(in map[string]string) map[string]string {
	return o.exportedKeys("spec.exportedAnnotations", in)
}

func (o *object) exportedKeys(field string, in map[string]string) map[string]string {
	if len(in) == 0 {
		return nil
	}
	out := maps.Clone(in)
	for _, k := range slices.Sorted(maps.Keys(in)) {
		if e := validation.IsQualifiedName(k); len(e) > 0 {
			o.Note(field, written.ReasonInvalidValue, written.Show(k)+" is not the name of a label or annotation; it is not exported", written.Rule(e))
			delete(out, k)
		}
	}
	return out
}

// facts are what multi-cluster services compare, as the Service says it.
func facts(s *corev1.Service) *mesh.Facts {
	f := &mesh.Facts{
		Created:  s.CreationTimestamp.UTC(),
		Headless: s.Spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(s.Spec.ClusterIPs, corev1.ClusterIPNone),
	}
	for _, p := range s.Spec.Ports {
		port := mesh.ExportedPort{Name: p.Name, Number: uint32(p.Port), Protocol: string(p.Protocol)}
		if port.Protocol == "" {
			port.Protocol = string(corev1.ProtocolTCP)
		}
		if p.AppProtocol != nil {
			port.AppProtocol = *p.AppProtocol
		}
		f.Ports = append(f.Ports, port)
	}
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		f.SessionAffinity = string(s.Spec.SessionAffinity)
		if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil && *c.ClientIP.TimeoutSeconds > 0 {
			f.AffinitySeconds = uint32(*c.ClientIP.TimeoutSeconds)
		}
	}
	if p := s.Spec.InternalTrafficPolicy; p != nil {
		f.InternalTrafficPolicy = string(*p)
	}
	if d := s.Spec.TrafficDistribution; d != nil {
		f.TrafficDistribution = *d
	}
	return f
}
