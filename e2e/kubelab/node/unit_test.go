package node

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"
)

func TestExpand(t *testing.T) {
	values := map[string]string{"A": "one", "B": "$(A)"}
	for in, want := range map[string]string{
		"":            "",
		"$(A)":        "one",
		"x$(A)y$(A)":  "xoneyone",
		"$(B)":        "$(A)", // values are not expanded again
		"$(C)":        "$(C)",
		"$$(A)":       "$(A)",
		"$$$(A)":      "$one",
		"$":           "$",
		"$A":          "$A",
		"$(A":         "$(A",
		"$()":         "$()",
		"$$$$":        "$$",
		"cost: 5$ ok": "cost: 5$ ok",
	} {
		if got := expand(in, values); got != want {
			t.Errorf("expand(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzExpand(f *testing.F) {
	f.Add("$(A)$$(B)$")
	f.Fuzz(func(t *testing.T, s string) {
		if got := expand(strings.ReplaceAll(s, "$", "$$"), map[string]string{"A": "x"}); got != s {
			t.Errorf("%q escaped is %q", s, got)
		}
		expand(s, nil)
	})
}

func TestProgram(t *testing.T) {
	n := &Node{cfg: Config{Images: map[string]Program{}}}
	for _, key := range []string{"app", "examples-bookinfo", "examples-bookinfo-reviews", "docker.io/istio/proxyv2", "isthmus-agent"} {
		n.cfg.Images[key] = Program{Args: []string{key}}
	}
	for image, want := range map[string]string{
		"app": "app", "app:v1": "app", "example.org:5000/x/app:v1": "app", "x/app@sha256:0123": "app",
		"docker.io/istio/examples-bookinfo-reviews-v3:1.20.2": "examples-bookinfo-reviews",
		"docker.io/istio/examples-bookinfo-ratings-v1:1.20.2": "examples-bookinfo",
		"docker.io/istio/proxyv2:1.31.1":                      "docker.io/istio/proxyv2",
		"example.org/proxyv2":                                 "",
		"localhost:5000/isthmus-agent":                        "isthmus-agent",
	} {
		got, err := n.program(image)
		if want == "" {
			if err == nil || !strings.Contains(err.Error(), image) {
				t.Errorf("%s: %v, %v", image, got, err)
			}
			continue
		}
		if err != nil || got.Args[0] != want {
			t.Errorf("%s: %v, %v, want %s", image, got, err, want)
		}
	}
}

func TestResourceField(t *testing.T) {
	spec := &corev1.Container{Resources: corev1.ResourceRequirements{
		Limits:   corev1.ResourceList{"cpu": resource.MustParse("1500m"), "memory": resource.MustParse("100Mi")},
		Requests: corev1.ResourceList{"cpu": resource.MustParse("10m")},
	}}
	for _, c := range []struct{ resource, divisor, want string }{
		{"limits.cpu", "", "2"}, {"limits.cpu", "1m", "1500"}, {"limits.memory", "", "104857600"}, {"limits.memory", "1Mi", "100"},
		{"limits.memory", "1Gi", "1"}, {"requests.cpu", "", "1"}, {"requests.memory", "", "0"}, {"limits.ephemeral-storage", "", "0"},
	} {
		r := &corev1.ResourceFieldSelector{Resource: c.resource}
		if c.divisor != "" {
			r.Divisor = resource.MustParse(c.divisor)
		}
		if got, err := resourceField(spec, r); err != nil || got != c.want {
			t.Errorf("%s in %q: %q, %v, want %s", c.resource, c.divisor, got, err, c.want)
		}
	}
	if got, err := resourceField(&corev1.Container{}, &corev1.ResourceFieldSelector{Resource: "limits.memory", Divisor: resource.MustParse("1Gi")}); err != nil || got != "64" {
		t.Errorf("a container without limits: %q, %v", got, err)
	}
}

func TestFits(t *testing.T) {
	node := &corev1.Node{}
	node.Name, node.Labels = "n1", map[string]string{"zone": "a", "size": "7"}
	for _, c := range []struct {
		spec, taints string
		want         bool
	}{
		{`{}`, `[]`, true},
		{`{nodeSelector: {zone: a}}`, `[]`, true},
		{`{nodeSelector: {zone: b}}`, `[]`, false},
		{`{affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchFields: [{key: metadata.name, operator: In, values: [n1]}]}]}}}}`, `[]`, true},
		{`{affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchFields: [{key: metadata.name, operator: In, values: [n2]}]}]}}}}`, `[]`, false},
		{`{affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: zone, operator: NotIn, values: [a]}]}, {matchExpressions: [{key: size, operator: Gt, values: ["6"]}]}]}}}}`, `[]`, true},
		{`{affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: size, operator: Lt, values: ["7"]}]}]}}}}`, `[]`, false},
		{`{affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{}]}}}}`, `[]`, false},
		{`{}`, `[{key: x, effect: NoSchedule}]`, false},
		{`{}`, `[{key: x, effect: PreferNoSchedule}]`, true},
		{`{}`, `[{key: node.kubernetes.io/not-ready, effect: NoSchedule}]`, true},
		{`{tolerations: [{operator: Exists}]}`, `[{key: x, value: y, effect: NoSchedule}]`, true},
		{`{tolerations: [{key: x, value: z}]}`, `[{key: x, value: y, effect: NoSchedule}]`, false},
		{`{tolerations: [{key: x, value: y, effect: NoExecute}]}`, `[{key: x, value: y, effect: NoSchedule}]`, false},
	} {
		pod := &corev1.Pod{}
		node.Spec.Taints = nil
		if err := yaml.UnmarshalStrict([]byte(c.spec), &pod.Spec); err != nil {
			t.Fatal(err)
		}
		if err := yaml.UnmarshalStrict([]byte(c.taints), &node.Spec.Taints); err != nil {
			t.Fatal(err)
		}
		if got := fits(pod, node); got != c.want {
			t.Errorf("%s on a node with %s: %v", c.spec, c.taints, got)
		}
	}
}

func TestWriteAtomically(t *testing.T) {
	dir := t.TempDir()
	write := func(files map[string]file) {
		t.Helper()
		if err := writeAtomically(dir, files, -1); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return "-"
		}
		return string(b)
	}
	write(map[string]file{"a": {"1", 0o644}, "deep/b": {"2", 0o400}})
	if read("a")+read("deep/b") != "12" {
		t.Error("files are not what was written")
	}
	if st, _ := os.Stat(filepath.Join(dir, "deep/b")); st == nil || st.Mode().Perm() != 0o400 {
		t.Errorf("mode of deep/b: %v", st)
	}
	write(map[string]file{"a": {"3", 0o644}, "c": {"4", 0o644}})
	if read("a")+read("c")+read("deep/b") != "34-" {
		t.Errorf("got %q %q %q", read("a"), read("c"), read("deep/b"))
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 4 { // ..data, its folder, a, c
		t.Errorf("left: %v", entries)
	}
	if err := writeAtomically(dir, map[string]file{"../out": {"", 0o644}}, -1); err == nil {
		t.Error("a file outside the volume")
	}
}

func TestResolvConf(t *testing.T) {
	for _, c := range []struct{ spec, want string }{
		{`{dnsPolicy: None, dnsConfig: {nameservers: [9.9.9.9], searches: [a.example], options: [{name: ndots, value: "1"}, {name: edns0}]}}`,
			"search a.example\nnameserver 9.9.9.9\noptions ndots:1 edns0\n"},
		{`{dnsPolicy: Default}`, "nameserver 10.0.0.1\n"},
		{`{dnsPolicy: ClusterFirst, hostNetwork: true}`, "nameserver 10.0.0.1\n"},
	} {
		pod := &corev1.Pod{}
		if err := yaml.UnmarshalStrict([]byte(c.spec), &pod.Spec); err != nil {
			t.Fatal(err)
		}
		w := &worker{node: &Spec{Addresses: addrs("10.0.0.1")}, n: &Node{cfg: Config{ClusterDomain: "cluster.local"}}}
		if got := w.resolvConf(context.Background(), pod); got != c.want {
			t.Errorf("%s: %q, want %q", c.spec, got, c.want)
		}
	}
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}
