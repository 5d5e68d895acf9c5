package podenv_test

import (
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/podenv"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

func base() map[string]string {
	return map[string]string{
		"POD_NAME": "web-1", "POD_NAMESPACE": "shop", "SERVICE_ACCOUNT": "web", "INSTANCE_IP": "192.0.2.7", "TRUST_DOMAIN": "east.mesh",
		"ISTIO_META_CLUSTER_ID": "east", "PROXY_CONFIG": `{"discoveryAddress":"istiod.istio-system.svc:15012"}`,
	}
}

func source(kind string, over map[string]string) podenv.Source {
	env := base()
	maps.Copy(env, over)
	var list []string
	for k, v := range env {
		list = append(list, k+"="+v)
	}
	return podenv.Source{Kind: kind, Getenv: func(k string) string { return env[k] }, Environ: list, Root: "/nonexistent", Flags: podenv.Flags{ProxyLogLevel: "warning"}}
}

func TestLoad(t *testing.T) {
	for _, x := range []struct {
		name  string
		kind  string
		env   map[string]string
		flags podenv.Flags
		check func(c *config.Config) any
		want  any
	}{
		{name: "names", check: func(c *config.Config) any {
			return []string{string(c.Role), c.Name, c.Namespace, c.ServiceAccount, c.Cluster, c.TrustDomain, c.Pod.Domain, c.SPIFFE()}
		},
			want: []string{"sidecar", "web-1", "shop", "web", "east", "east.mesh", "shop.svc.cluster.local", "spiffe://east.mesh/ns/shop/sa/web"}},
		{name: "control plane", check: func(c *config.Config) any { return c.ControlPlane },
			want: config.ControlPlane{Addresses: []string{"istiod.istio-system.svc:15012"}, ServerName: "istiod.istio-system.svc"}},
		{name: "another CA", env: map[string]string{"CA_ADDR": "ca.mesh.svc:15013"}, check: func(c *config.Config) any { return []any{c.ControlPlane.CA, c.ControlPlane.CAName} },
			want: []any{[]string{"ca.mesh.svc:15013"}, "ca.mesh.svc"}},
		{name: "an address for a name", env: map[string]string{"PROXY_CONFIG": `{"discoveryAddress":"192.0.2.1:15012"}`}, check: func(c *config.Config) any { return c.ControlPlane.ServerName }, want: "xds.east.mesh"},
		{name: "gateway", kind: "router", check: func(c *config.Config) any { return c.Role }, want: config.Gateway},
		{name: "relay", kind: "router", env: map[string]string{"ISTHMUS_GATEWAY_KIND": "relay"}, check: func(c *config.Config) any { return c.Role }, want: config.Relay},
		{name: "cluster of an installation that did not name it", env: map[string]string{"ISTIO_META_CLUSTER_ID": "Kubernetes"}, check: func(c *config.Config) any { return c.Cluster }, want: "Kubernetes"},
		{name: "address", check: func(c *config.Config) any { return c.Addresses }, want: []string{"192.0.2.7"}},
		{name: "IPv6", env: map[string]string{"INSTANCE_IP": "2001:db8::7"}, check: func(c *config.Config) any { return c.Addresses }, want: []string{"2001:db8::7"}},
		{name: "workers by default", check: func(c *config.Config) any { return c.Envoy.Concurrency }, want: 2},
		{name: "workers by limit", env: map[string]string{"ISTIO_CPU_LIMIT": "5"}, check: func(c *config.Config) any { return c.Envoy.Concurrency }, want: 5},
		{name: "workers by proxy configuration", env: map[string]string{"ISTIO_CPU_LIMIT": "5", "PROXY_CONFIG": `{"discoveryAddress":"a:1","concurrency":3}`}, check: func(c *config.Config) any { return c.Envoy.Concurrency }, want: 3},
		{name: "workers by flag", env: map[string]string{"ISTIO_CPU_LIMIT": "5"}, flags: podenv.Flags{Concurrency: 7}, check: func(c *config.Config) any { return c.Envoy.Concurrency }, want: 7},
		{name: "drain", env: map[string]string{"PROXY_CONFIG": `{"discoveryAddress":"a:1","terminationDrainDuration":"20s"}`}, check: func(c *config.Config) any { return time.Duration(c.Envoy.DrainTime) }, want: 20 * time.Second},
		{name: "drain until no connection is left", env: map[string]string{"EXIT_ON_ZERO_ACTIVE_CONNECTIONS": "true", "MINIMUM_DRAIN_DURATION": "3s"},
			check: func(c *config.Config) any {
				return []time.Duration{time.Duration(c.Envoy.MinDrain), time.Duration(c.Envoy.DrainTime)}
			}, want: []time.Duration{3 * time.Second, 10 * time.Minute}},
		{name: "DNS", env: map[string]string{"ISTIO_META_DNS_CAPTURE": "true"}, check: func(c *config.Config) any { return c.Capture.DNS }, want: true},
		{name: "proxyMetadata stands in", env: map[string]string{"PROXY_CONFIG": `{"discoveryAddress":"a:1","proxyMetadata":{"ISTIO_META_DNS_CAPTURE":"true"}}`},
			check: func(c *config.Config) any { return []any{c.Capture.DNS, c.Pod.Metadata["DNS_CAPTURE"]} }, want: []any{true, "true"}},
		{name: "metadata", env: map[string]string{"ISTIO_META_OWNER": "o", "ISTIO_METAJSON_X": `{"A":{"b":1}}`}, check: func(c *config.Config) any { return []any{c.Pod.Metadata["OWNER"], c.Pod.Metadata["A"]} },
			want: []any{"o", map[string]any{"b": 1.0}}},
		{name: "status port", env: map[string]string{"ISTIO_STATUS_PORT": "0"}, check: func(c *config.Config) any { return c.Pod.StatusPort }, want: 0},
		{name: "ports of the application", env: map[string]string{"ISTHMUS_READINESS_APPLICATION_PORTS": "80, 443"}, check: func(c *config.Config) any { return c.Pod.ApplicationPorts }, want: []uint16{80, 443}},
		{name: "nothing is captured by the agent", check: func(c *config.Config) any { return c.Capture.Enabled }, want: false},
		{name: "bootstrap", env: map[string]string{"ISTIO_BOOTSTRAP_OVERRIDE": "/b.json"}, check: func(c *config.Config) any { return c.Envoy.CustomBootstrap }, want: "/nonexistent/b.json"},
	} {
		t.Run(x.name, func(t *testing.T) {
			kind := x.kind
			if kind == "" {
				kind = "sidecar"
			}
			src := source(kind, x.env)
			src.Flags.Concurrency = x.flags.Concurrency
			c, err := podenv.Load(src)
			if err != nil {
				t.Fatal(err)
			}
			if got := x.check(c); !reflect.DeepEqual(got, x.want) {
				t.Errorf("%v, want %v", got, x.want)
			}
		})
	}
}

func TestBad(t *testing.T) {
	for name, x := range map[string]struct {
		kind string
		env  map[string]string
		want []string
	}{
		"kind":          {kind: "gateway", want: []string{`"gateway"`}},
		"no pod":        {env: map[string]string{"POD_NAME": "", "POD_NAMESPACE": ""}, want: []string{"POD_NAME: not set", "POD_NAMESPACE: not set"}},
		"proxy config":  {env: map[string]string{"PROXY_CONFIG": "{"}, want: []string{"PROXY_CONFIG"}},
		"no discovery":  {env: map[string]string{"PROXY_CONFIG": "{}"}, want: []string{"PROXY_CONFIG", "discoveryAddress"}},
		"address":       {env: map[string]string{"INSTANCE_IP": "here"}, want: []string{"INSTANCE_IP", `"here"`}},
		"probes":        {env: map[string]string{"ISTIO_KUBE_APP_PROBERS": `{"/app-health/a/livez":{}}`}, want: []string{"ISTIO_KUBE_APP_PROBERS", "/app-health/a/livez"}},
		"probe path":    {env: map[string]string{"ISTIO_KUBE_APP_PROBERS": `{"/quitquitquit":{"tcpSocket":{"port":1}}}`}, want: []string{"/quitquitquit"}},
		"port":          {env: map[string]string{"ISTIO_STATUS_PORT": "http"}, want: []string{"ISTIO_STATUS_PORT", `"http"`}},
		"limit":         {env: map[string]string{"ISTIO_CPU_LIMIT": "much"}, want: []string{"ISTIO_CPU_LIMIT"}},
		"bool":          {env: map[string]string{"ISTIO_META_DNS_CAPTURE": "perhaps"}, want: []string{"ISTIO_META_DNS_CAPTURE", "perhaps"}},
		"drain":         {env: map[string]string{"PROXY_CONFIG": `{"discoveryAddress":"a:1","terminationDrainDuration":"long"}`}, want: []string{"PROXY_CONFIG", "long"}},
		"ports":         {env: map[string]string{"ISTHMUS_READINESS_APPLICATION_PORTS": "80,x"}, want: []string{"ISTHMUS_READINESS_APPLICATION_PORTS"}},
		"metadata":      {env: map[string]string{"ISTIO_METAJSON_X": "[]"}, want: []string{"ISTIO_METAJSON_X"}},
		"trust domain":  {env: map[string]string{"TRUST_DOMAIN": "not a domain"}, want: []string{"trustDomain", "not a domain"}},
		"control plane": {env: map[string]string{"PROXY_CONFIG": `{"discoveryAddress":"istiod"}`}, want: []string{"controlPlane.addresses", "istiod"}},
	} {
		t.Run(name, func(t *testing.T) {
			kind := x.kind
			if kind == "" {
				kind = "sidecar"
			}
			_, err := podenv.Load(source(kind, x.env))
			if err == nil {
				t.Fatal("it was taken")
			}
			for _, w := range x.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("no %q in: %v", w, err)
				}
			}
			if diag.HintOf(err) == "" {
				t.Error("no hint")
			}
		})
	}
}

func TestParseDownward(t *testing.T) {
	got := podenv.ParseDownward("app=\"web\"\nnote=\"two\\nlines \\\"x\\\"\"\nkey.example/a=\"\"\nno line\nraw=plain\n")
	want := map[string]string{"app": "web", "note": "two\nlines \"x\"", "key.example/a": "", "raw": "plain"}
	if !maps.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func FuzzParseDownward(f *testing.F) {
	f.Add("app=\"web\"\n=\n\"=\n")
	f.Fuzz(func(t *testing.T, text string) {
		for k := range podenv.ParseDownward(text) {
			if strings.ContainsAny(k, "=\n") {
				t.Errorf("key %q", k)
			}
		}
	})
}
