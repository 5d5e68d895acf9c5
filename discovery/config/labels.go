package config

import (
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Labels and annotations that mean something to the mesh.
const (
	labelNetwork   = "topology.istio.io/network"
	labelRegion    = "topology.kubernetes.io/region"
	labelZone      = "topology.kubernetes.io/zone"
	labelSubzone   = "topology.istio.io/subzone"
	labelLocality  = "istio-locality"
	labelTLSMode   = "security.istio.io/tlsMode"
	labelInject    = "sidecar.istio.io/inject"
	labelExport    = "isthmus.io/export"
	annExportTo    = "isthmus.io/export-to"
	annTemplates   = "inject.istio.io/templates" // "gateway": the proxy stands alone
	annVisibility  = "networking.istio.io/exportTo"
	labelSliceName = "kubernetes.io/service-name"
)

// gatewayLabels are the values of label istio on gateways.
var gatewayLabels = []string{"ingressgateway", "egressgateway", "eastwestgateway"}

// exported reports whether labels or the namespace export the object, and to whom. A bad list of clusters exports to
// none rather than to all.
func (o *object) exported() (bool, []mesh.ClusterID) {
	value, own := o.Meta.Labels[labelExport]
	if !own {
		value = o.d.opts.Namespaces[o.Ref.Namespace][labelExport]
	}
	switch value {
	case "true":
	case "", "false":
		return false, nil
	default:
		if own {
			o.Note("metadata.labels["+labelExport+"]", written.ReasonInvalidValue, written.Show(value)+" is neither true nor false; it is not exported", `write "true" or "false"`)
		}
		return false, nil
	}
	return o.exportTo()
}

// exportTo reads the annotation that narrows an export.
func (o *object) exportTo() (bool, []mesh.ClusterID) {
	value, ok := o.Meta.Annotations[annExportTo]
	if !ok {
		return true, nil
	}
	var out []mesh.ClusterID
	for name := range strings.SplitSeq(value, ",") {
		name = strings.TrimSpace(name)
		if e := validation.IsDNS1123Label(name); len(e) > 0 {
			o.Note("metadata.annotations["+annExportTo+"]", written.ReasonInvalidValue, written.Show(name)+" is not a cluster name; it is exported to none", "write cluster names with commas between them, or remove the annotation to export to all")
			return false, nil
		}
		out = append(out, mesh.ClusterID(name))
	}
	slices.Sort(out)
	return true, slices.Compact(out)
}

// Locality writes the region, zone and subzone labels as region/zone/subzone.
func Locality(labels map[string]string) string {
	if l := labels[labelLocality]; l != "" {
		if !strings.Contains(l, "/") {
			l = strings.ReplaceAll(l, ".", "/") // a label's value has no slash
		}
		return l
	}
	if labels[labelRegion] == "" {
		return ""
	}
	return strings.TrimRight(labels[labelRegion]+"/"+labels[labelZone]+"/"+labels[labelSubzone], "/")
}
