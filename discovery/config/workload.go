package config

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func (o *object) pod() {
	var p corev1.Pod
	if !o.Into(&p) {
		return
	}
	if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return
	}
	var ips []string
	at := func(i int) string { return fmt.Sprintf("status.podIPs[%d].ip", i) }
	for _, ip := range p.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	if len(ips) == 0 && p.Status.PodIP != "" {
		ips, at = []string{p.Status.PodIP}, func(int) string { return "status.podIP" }
	}
	w := &mesh.Workload{
		Object: o.Ref, Cluster: o.d.opts.cluster(), Name: p.Name, Namespace: o.Ref.Namespace, Network: mesh.NetworkID(p.Labels[labelNetwork]),
		Labels: p.Labels, ServiceAccount: p.Spec.ServiceAccountName, Locality: Locality(p.Labels), Ports: o.namedPorts(p.Spec),
	}
	Place(w, o.d.opts.Nodes[p.Spec.NodeName], o.d.opts.Network)
	for _, a := range o.Addresses(ips, at) {
		w.Addresses = append(w.Addresses, a.String())
	}
	if w.ServiceAccount == "" {
		w.ServiceAccount = p.Spec.DeprecatedServiceAccount
	}
	if w.ServiceAccount == "" {
		w.ServiceAccount = "default"
	}
	w.Ready = len(w.Addresses) > 0 && p.DeletionTimestamp == nil && podReady(p.Status.Conditions)
	w.TLS = !p.Spec.HostNetwork && o.member(p.Labels, p.Annotations)
	if !o.Failed {
		o.d.in.Workloads = append(o.d.in.Workloads, w)
	}
}

// Place fills in where a pod is: the locality of its node, unless its own label says another one, and the network of
// its cluster, unless its label names one. (Labels of a pod for region and zone are copies of its node's.)
func Place(w *mesh.Workload, node Node, network mesh.NetworkID) {
	if node.Locality != "" && w.Labels[labelLocality] == "" {
		w.Locality = node.Locality
	}
	w.Network = cmp.Or(w.Network, network)
}

// member reports whether a pod with these labels takes mesh TLS.
func (o *object) member(labels, annotations map[string]string) bool {
	if o.d.opts.ByLabel {
		return labels[labelTLSMode] == "istio"
	}
	return injected(o.d.opts.Namespaces[o.Ref.Namespace], labels, annotations)
}

// podReady is true for a pod that nobody says anything about.
func podReady(conditions []corev1.PodCondition) bool {
	for _, c := range conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return true
}

// namedPorts gathers the containers' named ports; sidecars are init containers that restart.
func (o *object) namedPorts(spec corev1.PodSpec) map[string]uint32 {
	out := map[string]uint32{}
	add := func(list string, i int, c corev1.Container) {
		for j, p := range c.Ports {
			field := fmt.Sprintf("spec.%s[%d].ports[%d].containerPort", list, i, j)
			if !o.CheckPort(field, int64(p.ContainerPort)) || p.Name == "" {
				continue
			}
			if _, have := out[p.Name]; !have {
				out[p.Name] = uint32(p.ContainerPort)
			}
		}
	}
	for i, c := range spec.Containers {
		add("containers", i, c)
	}
	for i, c := range spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add("initContainers", i, c)
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// injected reports whether a pod has a proxy of the mesh that ends mutual TLS for it: what the pod says wins over its
// namespace. A gateway is a proxy itself, whose ports take what its Gateways say.
func injected(namespace, labels, annotations map[string]string) bool {
	if mode, ok := labels[labelTLSMode]; ok {
		return mode == "istio"
	}
	if slices.Contains(gatewayLabels, labels["istio"]) || slices.Contains(strings.Split(annotations[annTemplates], ","), "gateway") {
		return false
	}
	inject, ok := labels[labelInject]
	if !ok {
		inject = annotations[labelInject]
	}
	switch inject {
	case "true":
		return true
	case "false":
		return false
	}
	return namespace["istio-injection"] == "enabled" || namespace["isthmus.io/injection"] == "enabled"
}

func (o *object) workloadEntry() {
	spec := &networking.WorkloadEntry{}
	status, ok := o.Spec(spec)
	if !ok {
		return
	}
	labels := maps.Clone(spec.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, o.Meta.Labels)
	w := &mesh.Workload{
		Object: o.Ref, Name: o.Ref.Name, Namespace: o.Ref.Namespace, Network: mesh.NetworkID(spec.Network), Labels: labels,
		ServiceAccount: spec.ServiceAccount, Ports: spec.Ports, Locality: spec.Locality, Weight: spec.Weight,
		TLS: labels[labelTLSMode] == "istio", Ready: healthy(status), VM: true,
	}
	if w.Network == "" {
		w.Network = mesh.NetworkID(labels[labelNetwork])
	}
	if w.Locality == "" {
		w.Locality = Locality(labels)
	}
	if w.ServiceAccount == "" {
		w.ServiceAccount = "default"
	}
	o.CheckPorts("spec.ports", spec.Ports)
	o.CheckAccount("spec.serviceAccount", spec.ServiceAccount)
	if a, err := netip.ParseAddr(spec.Address); err == nil && a.Zone() == "" {
		w.Addresses = []string{a.Unmap().String()}
	} else if spec.Address == "" {
		o.Reject("spec.address", written.ReasonMissing, "the address is missing", "write the machine's IP address")
	} else {
		o.Invalid("spec.address", written.Show(spec.Address)+" is not an IP address", "write the machine's IP address; host names are for a ServiceEntry's endpoints")
	}
	if !o.Failed {
		o.d.in.Workloads = append(o.d.in.Workloads, w)
	}
}

// healthy reads the condition that Istio's health checks keep.
func healthy(status []byte) bool {
	var s struct {
		Conditions []struct{ Type, Status string } `json:"conditions"`
	}
	if len(status) == 0 || json.Unmarshal(status, &s) != nil {
		return true
	}
	return !slices.ContainsFunc(s.Conditions, func(c struct{ Type, Status string }) bool {
		return c.Type == "Healthy" && c.Status == "False"
	})
}

// workloadName makes a name, a DNS label, for an endpoint that has only an address.
func workloadName(address string) string {
	if a, err := netip.ParseAddr(address); err == nil {
		address = a.StringExpanded()
	}
	name := strings.NewReplacer(".", "-", ":", "-", "*", "x").Replace(address)
	if len(name) > 63 {
		name = strings.TrimRight(name[:63], "-")
	}
	return name
}
