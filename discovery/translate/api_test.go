package translate_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/gatewayapi"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

// fromYAML reads the input.yaml of a case of testdata/api as a control plane would.
// Each file PROXY.show says what to show of a proxy's resources: TYPE PATTERN a line; PROXY is TYPE-NAMESPACE-NAME, and
// a first line "labels k=v,..." gives it labels.
func fromYAML(t *testing.T, yaml string, rng *rand.Rand) (*mesh.Snapshot, []mesh.Problem) {
	t.Helper()
	docs := regexp.MustCompile(`(?m)^---\n`).Split(yaml, -1)
	if rng != nil {
		rng.Shuffle(len(docs), func(i, j int) { docs[i], docs[j] = docs[j], docs[i] })
	}
	inputs := map[string]mesh.Input{}
	var problems []mesh.Problem
	for i, d := range docs {
		in, ps := config.Decode("", []byte(d), config.Options{})
		inputs[fmt.Sprint(i)], problems = in, append(problems, ps...)
	}
	cfg := store.DefaultConfig(&mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "net-a", Roots: []byte(fixedRoot)})
	cfg.Derive = gatewayapi.Derive
	snap := store.Once(cfg, inputs)
	return snap, append(problems, snap.Problems...)
}

func proxyNamed(t *testing.T, name string, labels string) *mesh.Proxy {
	t.Helper()
	parts := strings.SplitN(name, "-", 3)
	if len(parts) != 3 {
		t.Fatalf("proxy %s: want TYPE-NAMESPACE-NAME", name)
	}
	p := &mesh.Proxy{
		Type: mesh.ProxyType(parts[0]), Namespace: parts[1], Name: parts[2], Domain: parts[1] + ".svc.cluster.local",
		Addresses: addrs("10.10.0.2"), Labels: map[string]string{"app": parts[2]},
	}
	if p.Type == mesh.Router {
		p.Identity = mesh.SPIFFE("amber.mesh", p.Namespace, "gateway")
	}
	for kv := range strings.SplitSeq(labels, ",") {
		if k, v, ok := strings.Cut(kv, "="); ok {
			p.Labels[k] = v
		}
	}
	return p
}

func shown[T proto.Message](t *testing.T, list []T, name func(T) string, pattern string) string {
	list = slices.DeleteFunc(slices.Clone(list), func(m T) bool {
		ok, err := path.Match(pattern, name(m))
		if err != nil {
			t.Fatal(err)
		}
		return !ok
	})
	return golden.ProtoJSON(t, list)
}

// show answers one line of a .show file.
func show(t *testing.T, r translate.Resources, line string) string {
	kind, pattern, _ := strings.Cut(line, " ")
	switch kind {
	case "clusters":
		return shown(t, r.Clusters, (*clusterv3.Cluster).GetName, pattern)
	case "endpoints":
		return shown(t, r.Endpoints, (*endpointv3.ClusterLoadAssignment).GetClusterName, pattern)
	case "listeners":
		return shown(t, r.Listeners, (*listenerv3.Listener).GetName, pattern)
	case "routes":
		return shown(t, r.Routes, (*routev3.RouteConfiguration).GetName, pattern)
	case "names":
		var names []string
		for _, c := range r.Clusters {
			names = append(names, "cluster "+c.Name)
		}
		for _, l := range r.Listeners {
			names = append(names, "listener "+l.Name)
		}
		for _, s := range r.Secrets {
			if s.Name != "ROOTCA" {
				names = append(names, "secret "+s.Name)
			}
		}
		for _, x := range r.Routes {
			for _, h := range x.VirtualHosts {
				names = append(names, "host "+x.Name+" "+strings.Join(h.Domains, " "))
			}
		}
		return strings.Join(names, "\n") + "\n"
	}
	t.Fatalf("unknown line %q", line)
	return ""
}

func apiOutput(t *testing.T, c *golden.Case, snap *mesh.Snapshot, problems []mesh.Problem, each func(translate.Resources)) map[string]string {
	out := map[string]string{}
	for _, name := range c.Names() {
		proxy, ok := strings.CutSuffix(name, ".show")
		if !ok {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(c.File(name))), "\n")
		labels, labelled := strings.CutPrefix(lines[0], "labels ")
		if labelled {
			lines = lines[1:]
		}
		r, ps := translate.Translate(snap, proxyNamed(t, proxy, labels))
		problems = append(problems, ps...)
		text := ""
		for _, line := range lines {
			text += "# " + line + "\n" + strings.TrimRight(show(t, r, line), "\n") + "\n"
		}
		out[proxy+".out"] = text
		if each != nil {
			each(r)
		}
	}
	if len(snap.Statuses) > 0 {
		out["status.txt"] = statuses(t, snap.Statuses)
	}
	lines := strings.Split(strings.TrimSpace(golden.Lines(problems)), "\n")
	slices.Sort(lines)
	out["problems.txt"] = strings.TrimLeft(strings.Join(slices.Compact(lines), "\n")+"\n", "\n")
	return out
}

// TestAPI translates objects as users write them: the whole way from YAML to Envoy. Every output is the same for every
// order of the objects, and Envoy takes it.
func TestAPI(t *testing.T) { checkAPI(t, "testdata/api/*.txtar") }

// TestGatewayAPI does so for the Kubernetes Gateway API and Ingress, and shows what their status says.
func TestGatewayAPI(t *testing.T) { checkAPI(t, "testdata/gatewayapi/*.txtar") }

func checkAPI(t *testing.T, pattern string) {
	for _, c := range golden.Cases(t, pattern) {
		t.Run(c.Name, func(t *testing.T) {
			yaml := string(c.File("input.yaml"))
			snap, problems := fromYAML(t, yaml, nil)
			var all []translate.Resources
			want := apiOutput(t, c, snap, problems, func(r translate.Resources) { all = append(all, r) })
			for _, name := range slices.Sorted(keys(want)) {
				c.Want(t, name, want[name])
			}
			for seed := range uint64(4) {
				snap, problems := fromYAML(t, yaml, rand.New(rand.NewPCG(seed, 7)))
				for name, text := range apiOutput(t, c, snap, problems, nil) {
					if text != want[name] {
						t.Errorf("seed %d: %s depends on the order of the objects", seed, name)
					}
				}
			}
			if strings.Contains(c.Comment, "no-validate") {
				return
			}
			envoy := envoytest.Path(t)
			for _, r := range all {
				file := writeJSON(t, "envoy.json", staticBootstrap(t, r))
				if out, err := exec.Command(envoy, "--mode", "validate", "-c", file).CombinedOutput(); err != nil {
					t.Fatalf("envoy refuses the resources: %v\n%s", err, tail(out))
				}
			}
		})
	}
}

// statuses shows conditions a line each, and the rest of each status as JSON.
func statuses(t *testing.T, list []*mesh.ObjectStatus) string {
	var b strings.Builder
	for _, s := range list {
		var v any
		if err := json.Unmarshal(s.JSON, &v); err != nil {
			t.Fatalf("%s: %v", s.Object, err)
		}
		fmt.Fprintf(&b, "%s %s/%s\n", s.Resource, s.Object.Namespace, s.Object.Name)
		showStatus(&b, "  ", v)
	}
	return b.String()
}

func showStatus(b *strings.Builder, indent string, v any) {
	fields, ok := v.(map[string]any)
	if !ok {
		return
	}
	var rest []string
	for _, k := range slices.Sorted(keys(fields)) {
		list, isList := fields[k].([]any)
		switch {
		case k == "conditions":
			for _, x := range list {
				c := x.(map[string]any)
				fmt.Fprintf(b, "%s%s %s %s: %s\n", indent, c["type"], c["status"], c["reason"], c["message"])
			}
		case isList && (k == "listeners" || k == "parents" || k == "ancestors"):
			for _, x := range list {
				fmt.Fprintf(b, "%s%s\n", indent, strings.TrimSuffix(k, "s"))
				showStatus(b, indent+"  ", x)
			}
		case k == "supportedFeatures" || k == "controllerName":
		default:
			text, _ := json.Marshal(fields[k])
			rest = append(rest, k+" "+string(text))
		}
	}
	if len(rest) > 0 {
		fmt.Fprintf(b, "%s%s\n", indent, strings.Join(rest, ", "))
	}
}

func keys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// TestSidecarKeepsSmall: a proxy whose Sidecar names its own namespace gets no bigger with the services of others.
func TestSidecarKeepsSmall(t *testing.T) {
	size := func(others int) (n int) {
		var yaml strings.Builder
		yaml.WriteString("apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {name: own, namespace: a}\nspec: {egress: [{hosts: ['./*']}]}\n---\n" +
			"apiVersion: v1\nkind: Service\nmetadata: {name: own, namespace: a}\nspec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}\n")
		for i := range others {
			fmt.Fprintf(&yaml, "---\napiVersion: v1\nkind: Service\nmetadata: {name: s%d, namespace: b}\nspec: {clusterIP: 10.97.%d.%d, ports: [{name: http, port: 80}]}\n", i, i/200, i%200+1)
		}
		snap, _ := fromYAML(t, yaml.String(), nil)
		r, _ := translate.Translate(snap, proxyNamed(t, "sidecar-a-x", ""))
		for _, m := range r.Clusters {
			n += proto.Size(m)
		}
		for _, m := range r.Routes {
			n += proto.Size(m)
		}
		return n
	}
	if few, many := size(1), size(300); few != many || few == 0 {
		t.Errorf("%d bytes with one other service, %d with 300", few, many)
	}
}
