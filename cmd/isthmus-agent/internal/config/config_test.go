package config

import (
	"strings"
	"testing"
	"time"
)

func TestExampleParses(t *testing.T) {
	c, err := Parse("agent.yaml", []byte(Example))
	if err != nil {
		t.Fatal(err)
	}
	if c.Role != Sidecar || c.CertTTL != Duration(24*time.Hour) || c.SPIFFE() != "spiffe://amber.mesh/ns/default/sa/productpage" {
		t.Errorf("got %+v", c)
	}
}

const minimal = `role: sidecar
name: a
cluster: amber
trustDomain: amber.mesh
controlPlane: {addresses: ["127.0.0.1:15012"]}
rootCert: /r
tokenFile: /t
dataDir: /d
`

func TestParse(t *testing.T) {
	for _, c := range []struct{ name, yaml, want string }{
		{"minimal", minimal, ""},
		{"unknown", minimal + "rootcert: /x\n", `agent.yaml:9: unknown field "rootcert"`},
		{"unknown inside", minimal + "envoy:\n  paht: x\n", `agent.yaml:10: unknown field "paht"`},
		{"role", strings.Replace(minimal, "sidecar", "sidekick", 1), `agent.yaml:1: role: "sidekick" is not`},
		{"duration", minimal + "certTTL: soon\n", `agent.yaml:9: "soon" is not a duration`},
		{"short ttl", minimal + "certTTL: 1s\n", `agent.yaml:9: certTTL: 1s is not between`},
		{"cidr", minimal + "capture:\n  excludeOutboundCIDRs: [ten]\n", `agent.yaml:10: capture.excludeOutboundCIDRs: "ten"`},
		{"no token", strings.Replace(minimal, "tokenFile: /t\n", "", 1), `tokenFile: must name`},
		{"yaml", "role: [", "agent.yaml:1:"},
		{"empty", "", "agent.yaml:1: the file is empty"},
		{"two", minimal + "---\nrole: relay\n", "more than one"},
		{"relative", strings.Replace(minimal, "/d", "d", 1), `agent.yaml:8: dataDir: "d" is not an absolute path`},
		{"address", strings.Replace(minimal, "127.0.0.1:15012", "nowhere", 1), `agent.yaml:5: controlPlane.addresses: "nowhere"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("agent.yaml", []byte(c.yaml))
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.HasPrefix(err.Error(), c.want) && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %s", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
		})
	}
}

func TestGatewayLabel(t *testing.T) {
	c, err := Parse("f", []byte(strings.Replace(minimal, "sidecar", "gateway", 1)))
	if err != nil || c.Labels["istio"] != "eastwestgateway" || !c.EastWest() {
		t.Errorf("got %+v, %v", c, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(Example))
	f.Add([]byte(minimal))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("f", data)
		if (c == nil) == (err == nil) {
			t.Errorf("config %v with error %v", c, err)
		}
	})
}
