package traffic

import (
	"fmt"
	"maps"
	"slices"

	networking "istio.io/api/networking/v1"
	proxyconfig "istio.io/api/networking/v1beta1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// ProxyConfig decodes the object; nil when something is wrong with it.
func ProxyConfig(w *written.Object) *mesh.ProxyConfig {
	o := &object{w}
	spec := &proxyconfig.ProxyConfig{}
	if _, ok := o.Spec(spec); !ok {
		return nil
	}
	if n := spec.GetConcurrency(); n.GetValue() < 0 {
		o.Invalid("spec.concurrency", fmt.Sprintf("%d is negative", n.GetValue()), "write a number of threads, or 0 for one each core")
	}
	for _, name := range slices.Sorted(maps.Keys(spec.GetEnvironmentVariables())) {
		if e := validation.IsEnvVarName(name); len(e) > 0 {
			o.Invalid("spec.environmentVariables["+name+"]", written.Show(name)+" is not the name of a variable", written.Rule(e))
		}
	}
	if spec.GetImage() != nil {
		o.Unsupported("spec.image", "there is one image of the proxy, which the installation names")
	}
	if o.Failed {
		return nil
	}
	return &mesh.ProxyConfig{Object: o.Ref, Created: o.Meta.CreationTimestamp.Time, Spec: spec}
}

// WorkloadGroup decodes the object; nil when something is wrong with it.
func WorkloadGroup(w *written.Object) *mesh.WorkloadGroup {
	o := &object{w}
	spec := &networking.WorkloadGroup{}
	if _, ok := o.Spec(spec); !ok {
		return nil
	}
	o.checkGroup(spec)
	if o.Failed {
		return nil
	}
	o.Note("kind", written.ReasonUnsupported, "no machine is registered by it", "write a WorkloadEntry for each machine")
	return &mesh.WorkloadGroup{Object: o.Ref, Spec: spec}
}

func (o *object) checkGroup(g *networking.WorkloadGroup) {
	if g.GetTemplate() == nil {
		o.Reject("spec.template", written.ReasonMissing, "the template is missing", "write what its WorkloadEntries have in common: serviceAccount, network, ports")
	}
	if g.GetTemplate().GetAddress() != "" {
		o.Invalid("spec.template.address", "a template has no address", "remove it: each machine has its own")
	}
	for _, name := range slices.Sorted(maps.Keys(g.GetTemplate().GetPorts())) {
		o.CheckPort(fmt.Sprintf("spec.template.ports[%s]", name), int64(g.GetTemplate().GetPorts()[name]))
	}
	o.CheckAccount("spec.template.serviceAccount", g.GetTemplate().GetServiceAccount())
	p := g.GetProbe()
	if p == nil {
		return
	}
	if p.GetHealthCheckMethod() == nil {
		o.Reject("spec.probe", written.ReasonMissing, "says neither httpGet, tcpSocket, exec nor grpc", "add one of them")
	}
	if h := p.GetHttpGet(); h != nil {
		o.CheckPort("spec.probe.httpGet.port", int64(h.GetPort()))
	}
	if s := p.GetTcpSocket(); s != nil {
		o.CheckPort("spec.probe.tcpSocket.port", int64(s.GetPort()))
	}
	if e := p.GetExec(); e != nil && len(e.GetCommand()) == 0 {
		o.Reject("spec.probe.exec.command", written.ReasonMissing, "the command is missing", "write the program and its arguments")
	}
}
