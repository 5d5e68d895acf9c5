package config

import (
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
	extensions "istio.io/api/extensions/v1alpha1"
	networking "istio.io/api/networking/v1"
	proxyconfig "istio.io/api/networking/v1beta1"
	telemetry "istio.io/api/telemetry/v1"
)

// unhonoured checks an object of a kind that has no effect yet as strictly as the others: a mistake in it would bite on
// the day it has one. It reports that it has none.
func (o *object) unhonoured() {
	var spec proto.Message
	switch o.ref.Kind {
	case "ProxyConfig":
		spec = &proxyconfig.ProxyConfig{}
	case "WorkloadGroup":
		spec = &networking.WorkloadGroup{}
	case "Telemetry":
		spec = &telemetry.Telemetry{}
	case "WasmPlugin":
		spec = &extensions.WasmPlugin{}
	}
	if !o.named() {
		return
	}
	if spec != nil && !o.emptySpec() {
		if _, ok := o.spec(spec); !ok {
			return
		}
		switch s := spec.(type) {
		case *networking.WorkloadGroup:
			o.checkGroup(s)
		}
	}
	if !o.failed {
		o.note("kind", ReasonUnsupported, o.ref.Kind+" is not honoured: the object has no effect", "remove it so that nobody relies on it")
	}
}

// emptySpec reports whether an object says nothing where that means something: a policy without a spec denies all.
func (o *object) emptySpec() bool {
	var e envelope
	return (o.ref.Kind == "AuthorizationPolicy" || o.ref.Kind == "Telemetry") && o.into(&e) && (len(e.Spec) == 0 || string(e.Spec) == "null")
}

func (o *object) checkGroup(g *networking.WorkloadGroup) {
	if g.GetTemplate() == nil {
		o.reject("spec.template", ReasonMissing, "the template is missing", "write what its WorkloadEntries have in common: serviceAccount, network, ports")
	}
	if g.GetTemplate().GetAddress() != "" {
		o.invalid("spec.template.address", "a template has no address", "remove it: each machine has its own")
	}
	for _, name := range slices.Sorted(maps.Keys(g.GetTemplate().GetPorts())) {
		o.checkPort(fmt.Sprintf("spec.template.ports[%s]", name), int64(g.GetTemplate().GetPorts()[name]))
	}
	p := g.GetProbe()
	if p == nil {
		return
	}
	if p.GetHealthCheckMethod() == nil {
		o.reject("spec.probe", ReasonMissing, "says neither httpGet, tcpSocket, exec nor grpc", "add one of them")
	}
	if h := p.GetHttpGet(); h != nil {
		o.checkPort("spec.probe.httpGet.port", int64(h.GetPort()))
	}
	if s := p.GetTcpSocket(); s != nil {
		o.checkPort("spec.probe.tcpSocket.port", int64(s.GetPort()))
	}
	if e := p.GetExec(); e != nil && len(e.GetCommand()) == 0 {
		o.reject("spec.probe.exec.command", ReasonMissing, "the command is missing", "write the program and its arguments")
	}
}
