package kube_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
)

const second = time.Second

// TestSameAsFile gives the same YAML to the folder's decoder and to an API server: both sources say the same.
func TestSameAsFile(t *testing.T) {
	c := newCluster(t)
	c.apply(istioCRDs(t))
	c.apply(moduleFile(t, "sigs.k8s.io/mcs-api", "config", "crd", "multicluster.x-k8s.io_serviceexports.yaml"))
	data, err := os.ReadFile("testdata/objects.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c.apply(string(data))
	sink := newRecorder()
	run(t, "amber", c.REST(), sink)
	sink.wait(t, 30*second, sink.isSynced)
	o := config.Options{Local: "amber", TrustDomain: "amber.mesh", ByLabel: true, Network: "harbour", External: map[string][]string{"outer.istio-system.svc.cluster.local": {"203.0.113.9"}}}
	want, problems := config.Decode("objects.yaml", data, o)
	want.Problems = problems
	got := mesh.Input{}
	for _, k := range sink.keys("amber/") {
		in, _ := sink.get(k)
		got = join(got, in)
	}
	// What an API server adds by itself is not in the folder.
	if g, w := render(t, got), render(t, want); g != w {
		dir := t.TempDir()
		_ = os.WriteFile(filepath.Join(dir, "got"), []byte(g), 0o600)
		_ = os.WriteFile(filepath.Join(dir, "want"), []byte(w), 0o600)
		t.Errorf("the API server's objects say\n%s\nthe folder's say\n%s", diff(g, w), diff(w, g))
	}
}

func join(a, b mesh.Input) mesh.Input {
	a.Services, a.Workloads, a.Slices = append(a.Services, b.Services...), append(a.Workloads, b.Workloads...), append(a.Slices, b.Slices...)
	a.Exports, a.VirtualServices = append(a.Exports, b.Exports...), append(a.VirtualServices, b.VirtualServices...)
	a.DestinationRules, a.Gateways = append(a.DestinationRules, b.DestinationRules...), append(a.Gateways, b.Gateways...)
	a.PeerAuthentications, a.Networks = append(a.PeerAuthentications, b.PeerAuthentications...), append(a.Networks, b.Networks...)
	a.MeshConfigs, a.Problems = append(a.MeshConfigs, b.MeshConfigs...), append(a.Problems, b.Problems...)
	return a
}

// render writes what an Input says, one object a line, without where it stands and what only servers add.
func render(t *testing.T, in mesh.Input) string {
	t.Helper()
	var out []string
	add := func(kind string, v any) {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		if o, ok := m["Object"].(map[string]any); ok && (o["name"] == "kubernetes" || strings.HasPrefix(fmt.Sprint(o["name"]), "kubernetes-")) {
			return
		}
		strip(m)
		b, _ = json.MarshalIndent(m, "", " ")
		out = append(out, kind+" "+string(b))
	}
	for _, x := range in.Services {
		add("service", x)
	}
	for _, x := range in.Workloads {
		add("workload", x)
	}
	for _, x := range in.Slices {
		add("slice", x)
	}
	for _, x := range in.Exports {
		add("export", x)
	}
	for _, x := range in.VirtualServices {
		add("virtualservice", x)
	}
	for _, x := range in.DestinationRules {
		add("destinationrule", x)
	}
	for _, x := range in.Gateways {
		add("gateway", x)
	}
	for _, x := range in.PeerAuthentications {
		add("peerauthentication", x)
	}
	for _, x := range in.Networks {
		add("network", x)
	}
	for _, x := range in.MeshConfigs {
		add("meshconfig", x)
	}
	for _, x := range in.Problems {
		if i := strings.Index(x.Message, ": "); strings.HasPrefix(x.Message, "line ") && i > 0 {
			x.Message = x.Message[i+2:]
		}
		add("problem", x)
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

// strip removes sources of objects and what a server fills in: times, generations, policies, labels of nodes.
func strip(v any) {
	switch x := v.(type) {
	case map[string]any:
		for _, k := range []string{"source", "Created", "created", "Generation", "internalTrafficPolicy", "topology.kubernetes.io/region", "topology.kubernetes.io/zone"} {
			delete(x, k)
		}
		for _, e := range x {
			strip(e)
		}
	case []any:
		for _, e := range x {
			strip(e)
		}
	}
}

// diff returns the lines of a that b lacks.
func diff(a, b string) string {
	have := map[string]bool{}
	for l := range strings.SplitSeq(b, "\n") {
		have[l] = true
	}
	var out []string
	for i, l := range strings.Split(a, "\n") {
		if !have[l] {
			out = append(out, fmt.Sprintf("%d: %s", i, l))
		}
	}
	return strings.Join(out, "\n")
}

var _ = kube.StateSynced
