package config_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/written"
)

// refusals are objects that use a refused field, and where it stands in them.
var refusals = map[string]struct{ field, yaml string }{
	"HTTPFaultInjection.Delay.exponentialDelay": {"spec.http[0].fault.delay.exponentialDelay", "kind: VirtualService\nspec: {hosts: [a], http: [{fault: {delay: {exponentialDelay: 1s}}, route: [{destination: {host: a}}]}]}"},
	"HTTPFaultInjection.Abort.http2Error":       {"spec.http[0].fault.abort.http2Error", "kind: VirtualService\nspec: {hosts: [a], http: [{fault: {abort: {http2Error: x}}, route: [{destination: {host: a}}]}]}"},
	"LoadBalancerSettings.zoneAwareLbSetting":   {"spec.trafficPolicy.loadBalancer.zoneAwareLbSetting", "kind: DestinationRule\nspec: {host: a, trafficPolicy: {loadBalancer: {simple: RANDOM, zoneAwareLbSetting: {enabled: true}}}}"},
	"IstioIngressListener.tls":                  {"spec.ingress[0].tls", "kind: Sidecar\nspec: {ingress: [{port: {number: 80, protocol: HTTP}, tls: {mode: SIMPLE}}]}"},
	"OutboundTrafficPolicy.egressProxy":         {"spec.outboundTrafficPolicy.egressProxy", "kind: Sidecar\nspec: {outboundTrafficPolicy: {egressProxy: {host: a}}}"},
	"SidecarPort.targetPort":                    {"spec.ingress[0].port.targetPort", "kind: Sidecar\nspec: {ingress: [{port: {number: 80, protocol: HTTP, targetPort: 81}}]}"},
}

// TestTrafficAPI: the guide has a row for every field of Istio's types and for no other, and what it calls refused is
// reported by name.
func TestTrafficAPI(t *testing.T) {
	page, err := os.ReadFile("../../docs/guide/traffic-api.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (yes|older|refused) \\|").FindAllStringSubmatch(string(page), -1) {
		if _, twice := rows[m[1]]; twice {
			t.Errorf("%s has two rows", m[1])
		}
		rows[m[1]] = m[2]
	}
	seen := map[string]bool{}
	var walk func(md protoreflect.MessageDescriptor)
	walk = func(md protoreflect.MessageDescriptor) {
		if md.FullName().Parent() == "google.protobuf" {
			return
		}
		name := strings.TrimPrefix(strings.TrimPrefix(string(md.FullName()), "istio.networking.v1alpha3."), "istio.networking.v1.")
		name = strings.ReplaceAll(name, "istio.type.v1beta1.WorkloadSelector", "(selector)")
		for i := range md.Fields().Len() {
			fd := md.Fields().Get(i)
			field := name + "." + fd.JSONName()
			if seen[field] {
				continue
			}
			seen[field] = true
			if rows[field] == "" {
				t.Errorf("docs/guide/traffic-api.md has no row for %s", field)
			}
			if fd.IsMap() {
				fd = fd.MapValue()
			}
			if fd.Message() != nil && rows[field] != "refused" {
				walk(fd.Message())
			}
		}
	}
	for _, m := range []proto.Message{&networking.VirtualService{}, &networking.DestinationRule{}, &networking.ServiceEntry{}, &networking.WorkloadEntry{}, &networking.Sidecar{}} {
		walk(m.ProtoReflect().Descriptor())
	}
	for field, state := range rows {
		x, refused := refusals[field]
		switch {
		case !seen[field]:
			t.Errorf("docs/guide/traffic-api.md: no type has %s, or only a refused field leads to it", field)
		case refused != (state == "refused"):
			t.Errorf("docs/guide/traffic-api.md calls %s %s; the test has an object that shows it refused: %v", field, state, refused)
		case refused:
			_, problems := config.Decode("f.yaml", []byte("apiVersion: networking.istio.io/v1\nmetadata: {name: x}\n"+x.yaml), config.Options{})
			if len(problems) != 1 || problems[0].Reason != written.ReasonUnsupported || problems[0].Field != x.field {
				t.Errorf("%s: got %v, want %s Unsupported", field, problems, x.field)
			}
		}
	}
}
