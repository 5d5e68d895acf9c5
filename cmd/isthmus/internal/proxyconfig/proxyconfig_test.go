package proxyconfig_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/proxyconfig"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

// cert is a certificate that golden files may hold: it never changes, and its key is not kept.
const cert = `-----BEGIN CERTIFICATE-----
MIIBgjCCASmgAwIBAgIUIM6NVecyCZuVvWj8lBTZLqHdOS4wCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEcm9vdDAeFw0yNjExMjMwNTEwNDlaFw0zNjExMjAwNTEwNDla
MA8xDTALBgNVBAMMBHJvb3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQe5lzE
qwBQm56T8FwEHAUcN/b0rUEG9XEOhOLIakBZdOP3rsejTMOQErFgvO9540gDOvWM
8kR57CLaG4rTl4pYo2MwYTAdBgNVHQ4EFgQUe5Ggc0k2Uin1tPteHaMyt4GgTtAw
HwYDVR0jBBgwFoAUe5Ggc0k2Uin1tPteHaMyt4GgTtAwDwYDVR0TAQH/BAUwAwEB
/zAOBgNVHQ8BAf8EBAMCAQYwCgYIKoZIzj0EAwIDRwAwRAIgKmwR6Yht57W8RCd7
FoQrYqczLqJVNk3vBHlSeKrkr7sCIFG68ycqv+GVdhLUtmF3K0gijdwOxATum1r+
zq3/hPN9
-----END CERTIFICATE-----
`

func dumps(t *testing.T, c *golden.Case) (envoy, held *proxyconfig.Dump) {
	t.Helper()
	data := bytes.ReplaceAll(c.File("envoy.json"), []byte("CERT"), []byte(base64.StdEncoding.EncodeToString([]byte(cert))))
	envoy, err := proxyconfig.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	if held, err = proxyconfig.Parse(c.File("held.json")); err != nil {
		t.Fatal(err)
	}
	return envoy, held
}

func table(rows [][]string) string {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	w.Flush()
	return b.String()
}

func TestDump(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			envoy, held := dumps(t, c)
			for _, kind := range proxyconfig.Kinds[:5] {
				c.Want(t, kind+".txt", table(envoy.Rows(kind, proxyconfig.Filter{})))
			}
			c.Want(t, "refused.txt", strings.Join(envoy.Refused(), "\n")+"\n")
			diff, err := json.MarshalIndent(proxyconfig.Diff(envoy, held, proxyconfig.Kinds[:5], proxyconfig.Filter{}), "", " ")
			if err != nil {
				t.Fatal(err)
			}
			c.Want(t, "diff.json", string(diff)+"\n")
			if same := proxyconfig.Diff(envoy, envoy, proxyconfig.Kinds[:5], proxyconfig.Filter{}); len(same) > 0 {
				t.Errorf("a dump differs from itself: %v", same)
			}
			for _, r := range envoy.Secrets {
				if text := fmt.Sprint(r.Body); strings.Contains(text, "the-key") || strings.Contains(text, "dGhlLWtleQ") {
					t.Errorf("secret %s shows its key: %s", r.Name, text)
				}
			}
		})
	}
}

func TestFilter(t *testing.T) {
	envoy, _ := dumps(t, golden.Cases(t, "testdata/*.txtar")[0])
	for _, c := range []struct {
		kind   string
		filter proxyconfig.Filter
		want   string // names, those that are let through
	}{
		{"clusters", proxyconfig.Filter{Port: 80}, "outbound|80||new.example.com outbound|80||old.example.com"},
		{"clusters", proxyconfig.Filter{FQDN: "old.example.com"}, "outbound|80||old.example.com"},
		{"clusters", proxyconfig.Filter{Subset: "v1"}, "outbound|9080|v1|reviews.default.svc.cluster.local"},
		{"clusters", proxyconfig.Filter{Direction: "inbound"}, "inbound|9080||"},
		{"clusters", proxyconfig.Filter{Name: "xds-grpc"}, "xds-grpc"},
		{"endpoints", proxyconfig.Filter{FQDN: "old.example.com"}, ""},
		{"listeners", proxyconfig.Filter{Port: 9080}, "0.0.0.0_9080"},
		{"listeners", proxyconfig.Filter{Direction: "inbound"}, "virtualInbound"},
		{"routes", proxyconfig.Filter{FQDN: "reviews.default"}, "9080"},
		{"routes", proxyconfig.Filter{Port: 9080}, "9080"},
		{"routes", proxyconfig.Filter{Port: 80}, ""},
		{"routes", proxyconfig.Filter{Direction: "inbound"}, ""},
	} {
		var got []string
		for _, r := range envoy.Of(c.kind) {
			if c.filter.Lets(c.kind, r) {
				got = append(got, r.Name)
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s %+v: %q, want %q", c.kind, c.filter, got, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"configs":[{"@type":"x.ClustersConfigDump","static_clusters":[{"cluster":{"name":"a"}}]}]}`))
	f.Add([]byte(`{"configs":[{"@type":"x.ListenersConfigDump","dynamic_listeners":[{"name":1,"active_state":{"listener":{"filter_chains":[{}]}}}]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := proxyconfig.Parse(data)
		if err != nil {
			return
		}
		for _, kind := range proxyconfig.Kinds {
			d.Rows(kind, proxyconfig.Filter{})
		}
		if found := proxyconfig.Diff(d, d, proxyconfig.Kinds[:5], proxyconfig.Filter{}); len(found) > 0 {
			t.Errorf("it differs from itself: %v", found)
		}
	})
}
