package nodeid_test

import (
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/nodeid"
)

func TestParse(t *testing.T) {
	meta, err := structpb.NewStruct(map[string]any{
		"NETWORK": "net-a", "CLUSTER_ID": "fern", "REQUESTED_NETWORK_VIEW": "external, other", "NAMESPACE": "default", "INTERCEPTION_MODE": "TPROXY", "INSTANCE_IPS": "10.0.0.2, fd00::2", "LABELS": map[string]any{"app": "web"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ id, identity, wantErr string }{
		{"sidecar~10.0.0.2~web.1.default~default.svc.cluster.local", "spiffe://amber.mesh/ns/default/sa/web", ""},
		{"sidecar~10.0.0.2~web.default~default.svc.cluster.local", "spiffe://amber.mesh/ns/other/sa/web", "of another namespace"},
		{"sidecar~10.0.0.2~web.other~other.svc.cluster.local", "", "metadata NAMESPACE"},
		{"sidecar~10.0.0.2~web~default.svc.cluster.local", "", "is not NAME.NAMESPACE"},
		{"sidecar~10.0.0~web.default~x", "", "not an IP"},
		{"ztunnel~10.0.0.2~web.default~x", "", "is none of"},
		{"sidecar", "", "want TYPE~IP"},
	} {
		p, err := nodeid.Parse(&corev3.Node{Id: c.id, Metadata: meta, Locality: &corev3.Locality{Region: "r", Zone: "z"}}, c.identity)
		if c.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), c.wantErr) {
				t.Errorf("%s: error %v, want %q", c.id, err, c.wantErr)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.id, err)
			continue
		}
		if p.Name != "web.1" || p.Namespace != "default" || len(p.Addresses) != 2 || p.Labels["app"] != "web" || p.Network != "net-a" ||
			p.Cluster != "fern" || !p.Transparent || p.Locality != "r/z" || !slices.Equal(p.NetworkView, []mesh.NetworkID{"external", "other"}) {
			t.Errorf("%s: got %+v", c.id, p)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("sidecar~10.0.0.2~web.default~default.svc.cluster.local", "fd00::2,10.0.0.3", "spiffe://a/ns/default/sa/b")
	f.Add("router~::1~.~", "", "")
	f.Fuzz(func(t *testing.T, id, ips, identity string) {
		meta := &structpb.Struct{Fields: map[string]*structpb.Value{"INSTANCE_IPS": structpb.NewStringValue(ips)}}
		p, err := nodeid.Parse(&corev3.Node{Id: id, Metadata: meta}, identity)
		if err == nil && (p.Name == "" || p.Namespace == "" || len(p.Addresses) == 0) {
			t.Errorf("%q gives %+v", id, p)
		}
	})
}
