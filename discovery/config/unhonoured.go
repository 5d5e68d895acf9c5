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

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
)

// unhonoured checks an object of a kind that has no effect yet as strictly as the others: a mistake in it would bite on
// the day it has one. It reports that it has none.
func (o *object) unhonoured() {
	var spec proto.Message
	switch o.Ref.Kind {
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
	if spec != nil && !o.EmptySpec() {
		if _, ok := o.Spec(spec); !ok {
			return
		}
		switch s := spec.(type) {
		case *networking.WorkloadGroup:
			o.checkGroup(s)
		}
	}
	if !o.Failed {
		o.Note("kind", written.ReasonUnsupported, o.Ref.Kind+" is not honoured: the object has no effect", "remove it so that nobody relies on it")
	}
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
