package policy_test

import (
	"testing"

	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1"
	typev1beta1 "istio.io/api/type/v1beta1"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/policy"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// TestMutualTLSOff: peers are not told of what takes no mutual TLS.
func TestMutualTLSOff(t *testing.T) {
	local := &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "amber"}
	pod := func(name, version string) *mesh.Endpoint {
		return &mesh.Endpoint{Workload: name, Namespace: "shop", Cluster: "amber", Address: "10.0.0.1", Labels: map[string]string{"v": version}, TLS: true, Ready: true}
	}
	snap := &mesh.Snapshot{Local: local, Clusters: []*mesh.Cluster{local}, Services: []*mesh.Service{{
		Host: mesh.LocalHost("pay", "shop"), Name: "pay", Namespace: "shop", Exported: true, Endpoints: []*mesh.Endpoint{pod("a", "1"), pod("b", "2")},
		Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP, Target: 8080}, {Name: "admin", Number: 90, Protocol: mesh.HTTP}},
	}}}
	off := &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_DISABLE}
	for name, c := range map[string]struct {
		spec            *security.PeerAuthentication
		ports, endpoint int
	}{
		"nothing":       {&security.PeerAuthentication{}, 2, 2},
		"all":           {&security.PeerAuthentication{Mtls: off}, 0, 0},
		"one version":   {&security.PeerAuthentication{Selector: &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"v": "2"}}, Mtls: off}, 2, 1},
		"a port of one": {&security.PeerAuthentication{Selector: &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"v": "2"}}, PortLevelMtls: map[uint32]*security.PeerAuthentication_MutualTLS{8080: off}}, 2, 2},
	} {
		snap.PeerAuthentications = []*mesh.PeerAuthentication{{Object: mesh.ObjectRef{Kind: "PeerAuthentication", Namespace: "shop", Name: "x"}, Spec: c.spec}}
		for _, s := range policy.Exports(snap) {
			if s.Kind == protocol.KindService {
				body := &federationv1.Service{}
				if err := proto.Unmarshal(s.Body, body); err != nil || len(body.Ports) != c.ports {
					t.Errorf("%s: %v, ports %v, want %d", name, err, body.Ports, c.ports)
				}
				continue
			}
			body := &federationv1.Endpoints{}
			if err := proto.Unmarshal(s.Body, body); err != nil || len(body.Endpoints) != c.endpoint {
				t.Errorf("%s: %v, endpoints %v, want %d", name, err, body.Endpoints, c.endpoint)
			}
		}
	}
	// A port of all of them is left out.
	snap.Services[0].Endpoints = snap.Services[0].Endpoints[1:]
	snap.PeerAuthentications[0].Spec = &security.PeerAuthentication{Selector: &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"v": "2"}}, PortLevelMtls: map[uint32]*security.PeerAuthentication_MutualTLS{90: off}}
	body := &federationv1.Service{}
	for _, s := range policy.Exports(snap) {
		if s.Kind == protocol.KindService {
			if err := proto.Unmarshal(s.Body, body); err != nil || len(body.Ports) != 1 || body.Ports[0].Number != 80 {
				t.Errorf("%v, ports %v", err, body.Ports)
			}
		}
	}
}
