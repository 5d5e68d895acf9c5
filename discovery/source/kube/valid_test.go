package kube

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestKeepValid edits the ConfigMap of the mesh: each key keeps what was valid by itself, and what is removed is gone.
func TestKeepValid(t *testing.T) {
	decode := func(keys string) (mesh.Input, []mesh.Problem) {
		yaml := "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {" + keys + "}\n"
		return config.Decode("x", []byte(yaml), config.Options{})
	}
	const goodMesh, badMesh, goodNets, badNets = `mesh: "enableTracing: false", `, `mesh: "connectTimeout: soon", `, `meshNetworks: "networks: {one: {gateways: [{address: 192.0.2.1}]}}"`, `meshNetworks: "networks: [1"`
	before, problems := decode(goodMesh + goodNets)
	if len(problems) > 0 || len(before.MeshConfigs) != 1 || len(before.Networks) != 1 {
		t.Fatalf("%+v, %v", before, problems)
	}
	for _, c := range []struct {
		mesh, networks     string
		configs, nets, say int
	}{
		{goodMesh, goodNets, 1, 1, 0},
		{badMesh, goodNets, 1, 1, 1},
		{goodMesh, badNets, 1, 1, 1},
		{badMesh, badNets, 1, 1, 2},
		{goodMesh, "", 1, 0, 0},
		{"", goodNets, 0, 1, 0},
		{"", "", 0, 0, 0},
	} {
		now, problems := decode(c.mesh + c.networks)
		now, problems = keepValid(now, before, problems)
		said := 0
		for _, p := range problems {
			if strings.Contains(p.Message, "stays in use") {
				said++
			}
		}
		if len(now.MeshConfigs) != c.configs || len(now.Networks) != c.nets || said != c.say {
			t.Errorf("%s%s: %d configurations, %d networks, %d say so", c.mesh, c.networks, len(now.MeshConfigs), len(now.Networks), said)
		}
	}
}

// TestKeepValidPolicy: a policy that an edit broke stays as it was; one that was never valid is closed.
func TestKeepValidPolicy(t *testing.T) {
	decode := func(spec string) (mesh.Input, []mesh.Problem) {
		return config.DecodeObject("cluster amber", json.RawMessage(`{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "a", "namespace": "shop"}, "spec": `+spec+`}`), config.Options{})
	}
	const good, bad = `{"rules": [{}]}`, `{"action": "DENY", "rule": []}`
	valid, _ := decode(good)
	broken, problems := decode(bad)
	in, said := keepValid(broken, valid, slices.Clone(problems))
	if len(in.AuthorizationPolicies) != 1 || in.AuthorizationPolicies[0].Closed || len(said) != 1 || !strings.Contains(said[0].Message, "stays in use") {
		t.Errorf("after a broken edit: %+v, %v", in.AuthorizationPolicies, said)
	}
	for _, before := range []mesh.Input{{}, broken} {
		if in, said := keepValid(broken, before, slices.Clone(problems)); len(in.AuthorizationPolicies) != 1 || !in.AuthorizationPolicies[0].Closed || len(said) != len(problems) {
			t.Errorf("never valid: %+v, %v", in.AuthorizationPolicies, said)
		}
	}
}

// TestEveryKind: what any list of an input holds is reported.
func TestEveryKind(t *testing.T) {
	in := mesh.Input{Sidecars: []*mesh.SidecarConfig{{}}}
	if in.Empty() || !(mesh.Input{}).Empty() {
		t.Error("an input with a Sidecar counts as empty")
	}
	out := in.Clone()
	if out.Sidecars[0] = nil; in.Sidecars[0] == nil {
		t.Error("the copy shares a list")
	}
}
