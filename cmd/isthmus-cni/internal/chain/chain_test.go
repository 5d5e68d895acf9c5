package chain

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

var ours = Plugin{LogLevel: "info", Kubernetes: Kubernetes{Kubeconfig: "/etc/cni/net.d/kc", ExcludeNamespaces: []string{"kube-system"}}}

const list = `{"cniVersion":"0.3.1","name":"k8s-pod-network","disableCheck":true,
  "plugins":[{"type":"calico","mtu":1500,"ipam":{"type":"calico-ipam"}},{"type":"portmap","capabilities":{"portMappings":true}}]}`

func types(t *testing.T, data []byte) string {
	t.Helper()
	var l struct {
		Name       string
		CNIVersion string `json:"cniVersion"`
		Plugins    []struct{ Type string }
	}
	if err := json.Unmarshal(data, &l); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
	s := l.Name + " " + l.CNIVersion + ":"
	for _, p := range l.Plugins {
		s += " " + p.Type
	}
	return s
}

func TestInsert(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"a list", list, "k8s-pod-network 0.3.1: calico portmap isthmus-cni"},
		{"a single plugin", `{"cniVersion":"1.0.0","name":"net","type":"bridge","bridge":"br0"}`, "net 1.0.0: bridge isthmus-cni"},
		{"an older entry, not at the end", `{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"bridge"},{"type":"isthmus-cni"},{"type":"portmap"}]}`, "n 1.0.0: bridge portmap isthmus-cni"},
		{"two entries", `{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"bridge"},{"type":"isthmus-cni"},{"type":"isthmus-cni"}]}`, "n 1.0.0: bridge isthmus-cni"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, changed, err := Insert([]byte(c.in), ours)
			if err != nil || !changed {
				t.Fatalf("changed %v, %v", changed, err)
			}
			if got := types(t, out); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			again, changed, err := Insert(out, ours)
			if err != nil || changed || string(again) != string(out) {
				t.Errorf("a second time: changed %v, %v", changed, err)
			}
			without, had, err := Remove(out)
			if err != nil || !had || strings.Contains(string(without), PluginType) {
				t.Errorf("removed %v, %v: %s", had, err, without)
			}
		})
	}
	out, _, err := Insert([]byte(list), ours)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"mtu": 1500`, `"disableCheck": true`, `"type": "calico-ipam"`, `"kubeconfig": "/etc/cni/net.d/kc"`} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	other := ours
	other.LogLevel = "debug"
	if _, changed, err := Insert(out, other); err != nil || !changed {
		t.Errorf("another log level: changed %v, %v", changed, err)
	}
}

func TestRefused(t *testing.T) {
	for _, in := range []string{"", "{", "[]", "{}", `{"plugins":[]}`, `{"plugins":{}}`, `{"plugins":[{"name":"x"}]}`, `{"type":7}`, strings.Repeat(" ", MaxSize) + list} {
		if _, _, err := Insert([]byte(in), ours); !errors.Is(err, ErrNotNetwork) {
			t.Errorf("%.30q: %v", in, err)
		}
		if _, _, err := Remove([]byte(in)); !errors.Is(err, ErrNotNetwork) {
			t.Errorf("remove from %.30q: %v", in, err)
		}
	}
}

func TestFirstNetwork(t *testing.T) {
	files := map[string]string{"00-readme.txt": list, "05-broken.conflist": "{", "10-calico.conflist": list, "20-other.conf": `{"type":"bridge"}`, "01-empty.json": ""}
	var names []string
	for n := range files {
		names = append(names, n)
	}
	read := func(n string) ([]byte, error) { return []byte(files[n]), nil }
	if got, err := Main(names, read); err != nil || got != "10-calico.conflist" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := Main([]string{"00-readme.txt", "05-broken.conflist"}, read); err == nil || !strings.Contains(err.Error(), "05-broken.conflist") {
		t.Errorf("without a network: %v", err)
	}
	for in, want := range map[string]string{"10-a.conf": "10-a.conflist", "10-a.conflist": "10-a.conflist", "a.json": "a.conflist"} {
		if got := ListName(in); got != want {
			t.Errorf("%s becomes %s, want %s", in, got, want)
		}
	}
}

func FuzzInsert(f *testing.F) {
	f.Add([]byte(list))
	f.Add([]byte(`{"type":"bridge","name":"x","cniVersion":"1.0.0"}`))
	f.Add([]byte(`{"plugins":[{"type":"isthmus-cni"}]}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		out, _, err := Insert(in, ours)
		if err != nil {
			return
		}
		again, changed, err := Insert(out, ours)
		if err != nil || changed || string(again) != string(out) {
			t.Fatalf("not stable: %v %v\n%s", changed, err, out)
		}
		if without, had, err := Remove(out); err == nil && had {
			if _, had, _ := Remove(without); had {
				t.Fatalf("left behind in %s", without)
			}
		}
	})
}
