package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

const hostType = "type.googleapis.com/isthmus.dns.v1.Host"

var types = []string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType, xds.SecretType, hostType}

const namespaceYAML = `
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio-injection: enabled}}
`

const reviewsYAML = `
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: default}
spec:
  clusterIP: 10.96.0.7
  selector: {app: reviews}
  ports: [{name: http, port: 9080}]
---` + podYAML

const podYAML = `
apiVersion: v1
kind: Pod
metadata: {name: reviews-v1, namespace: default, labels: {app: reviews, version: v1}}
spec: {serviceAccountName: reviews, containers: [{name: app, image: reviews}]}
status: {phase: Running, podIP: 10.1.0.11, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: reviews-v2, namespace: default, labels: {app: reviews, version: v2}}
spec: {serviceAccountName: reviews, containers: [{name: app, image: reviews}]}
status: {phase: Running, podIP: 10.1.0.12, conditions: [{type: Ready, status: "True"}]}
`

const detailsYAML = `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: details, namespace: default}
spec:
  hosts: [details.example.com]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 8080, name: http, protocol: HTTP}]
  endpoints: [{address: 192.0.2.10}]
`

const rulesYAML = `
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: default}
spec:
  host: reviews
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews]
  http:
  - route:
    - {destination: {host: reviews, subset: v1}, weight: 90}
    - {destination: {host: reviews, subset: v2}, weight: 10}
`

// bookstore fills the folder.
func bookstore(t *testing.T, cfg Config) {
	t.Helper()
	for name, content := range map[string]string{"namespace.yaml": namespaceYAML, "reviews.yaml": reviewsYAML, "details.yaml": detailsYAML, "rules.yaml": rulesYAML} {
		writeObjects(t, cfg, name, content)
	}
}

const (
	reviewsHost   = "reviews.default.svc.cluster.local"
	reviewsAll    = "outbound|9080||" + reviewsHost
	reviewsV2     = "outbound|9080|v2|" + reviewsHost
	detailsAll    = "outbound|8080||details.example.com"
	sentMetric    = "isthmus_xds_resources_sent_total"
	virtualListen = "virtualOutbound"
)

// addresses reads the endpoints out of an assignment.
func addresses(t *testing.T, body []byte) []string {
	t.Helper()
	cla := new(endpointv3.ClusterLoadAssignment)
	if err := proto.Unmarshal(body, cla); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range cla.GetEndpoints() {
		for _, e := range l.GetLbEndpoints() {
			a := e.GetEndpoint().GetAddress().GetSocketAddress()
			out = append(out, fmt.Sprintf("%s:%d", a.GetAddress(), a.GetPortValue()))
		}
	}
	slices.Sort(out)
	return out
}

func hasAddresses(t *testing.T, want ...string) func([]byte) error {
	return func(body []byte) error {
		if got := addresses(t, body); !slices.Equal(got, want) {
			return fmt.Errorf("endpoints %v, want %v", got, want)
		}
		return nil
	}
}

// TestPipe goes from YAML in a folder to resources at a proxy, over a change, a mistake and a restart.
func TestPipe(t *testing.T) {
	cfg := testConfig(t, "amber")
	cfg.Metrics = freeAddr(t)
	bookstore(t, cfg)
	d := start(t, cfg)
	token := d.workloadToken(t, "default", "productpage", "productpage")
	p := connect(t, d, sidecar(t, cfg, "productpage", "default"), d.dialOptions(t, token), nil)
	p.waitFor(t, xds.ClusterType, reviewsAll, nil)
	p.waitFor(t, xds.ClusterType, reviewsV2, nil)
	p.waitFor(t, xds.ClusterType, detailsAll, nil)
	p.waitFor(t, xds.EndpointType, reviewsAll, hasAddresses(t, "10.1.0.11:9080", "10.1.0.12:9080"))
	p.waitFor(t, xds.EndpointType, reviewsV2, hasAddresses(t, "10.1.0.12:9080"))
	p.waitFor(t, xds.ListenerType, virtualListen, nil)
	p.waitFor(t, xds.RouteType, "9080", func(body []byte) error {
		if !bytes.Contains(body, []byte(reviewsV2)) {
			return errors.New("no route to v2")
		}
		return nil
	})
	p.waitFor(t, xds.SecretType, "ROOTCA", nil)
	p.waitFor(t, hostType, reviewsHost, nil)
	eventually(t, "the proxy is in sync", func() error {
		proxies := d.status(t).Proxies
		if len(proxies) == 0 {
			return errors.New("no proxy")
		}
		x := proxies[0]
		for typ, s := range x.Types {
			if s.State != "SYNCED" {
				return fmt.Errorf("%s %s is %s", x.Node, typ, s.State)
			}
		}
		if want := "spiffe://amber.mesh/ns/default/sa/productpage"; x.Identity != want || len(x.Types) != len(types) {
			return fmt.Errorf("proxy %+v", x)
		}
		return nil
	})

	t.Run("debug", func(t *testing.T) {
		for path, want := range map[string]string{
			"/debug/adsz": "productpage.default", "/debug/configz": "VirtualService", "/debug/endpointz": "10.1.0.12", "/debug/registryz": reviewsHost,
			"/debug/config_dump?proxyID=productpage.default": reviewsV2,
		} {
			var got json.RawMessage
			if err := d.call(http.MethodGet, path, nil, &got); err != nil || !strings.Contains(string(got), want) {
				t.Errorf("%s: %v, or no %s in it", path, err, want)
			}
		}
	})
	t.Run("change", func(t *testing.T) {
		p.forget()
		before := d.sent(t)
		d.write(t, "rules.yaml", strings.NewReplacer("weight: 90", "weight: 80", "weight: 10", "weight: 20").Replace(rulesYAML))
		eventually(t, "new weights", func() error {
			if got := p.forget(); !slices.Equal(got, []string{"+RouteConfiguration 9080"}) {
				if len(got) > 0 {
					t.Fatalf("changed weights changed %v", got)
				}
				return errors.New("nothing changed")
			}
			return nil
		})
		d.write(t, "reviews.yaml", strings.ReplaceAll(reviewsYAML, "10.1.0.12", "10.1.0.13"))
		p.waitFor(t, xds.EndpointType, reviewsV2, hasAddresses(t, "10.1.0.13:9080"))
		p.waitFor(t, xds.EndpointType, reviewsAll, hasAddresses(t, "10.1.0.11:9080", "10.1.0.13:9080"))
		for _, c := range p.forget() {
			if !strings.HasPrefix(c, "+ClusterLoadAssignment outbound|9080|") {
				t.Errorf("a moved pod changed %q", c)
			}
		}
		if n := d.sent(t) - before; n != 3 {
			t.Errorf("%v resources were sent, want 3: one route, two assignments", n)
		}
	})

	t.Run("mistake", func(t *testing.T) {
		p.forget()
		d.write(t, "details.yaml", "apiVersion: v1\nkind: Service\nmetadata:\n  name: [unclosed\n---"+detailsYAML+
			"---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: lost}\nspec:\n  hosts: [nowhere]\n  http: [{route: [{destination: {host: nowhere}}]}]\n")
		eventually(t, "problems", func() error {
			var text []string
			for _, x := range d.status(t).Problems {
				text = append(text, fmt.Sprintf("%+v", x))
			}
			all := strings.Join(text, "\n")
			if !strings.Contains(all, "details.yaml:") || !strings.Contains(all, "VirtualService/default/lost") && !strings.Contains(all, "lost") {
				return fmt.Errorf("problems: %s", all)
			}
			return nil
		})
		// A change elsewhere comes after all that the mistake led to.
		d.write(t, "reviews.yaml", strings.ReplaceAll(reviewsYAML, "10.1.0.12", "10.1.0.14"))
		p.waitFor(t, xds.EndpointType, reviewsV2, hasAddresses(t, "10.1.0.14:9080"))
		if p.resource(xds.ClusterType, detailsAll) == nil || p.resource(xds.ClusterType, reviewsAll) == nil {
			t.Error("the mistake took other objects away")
		}
		for _, c := range p.forget() {
			if strings.HasPrefix(c, "-") {
				t.Errorf("the mistake led to %q", c)
			}
		}
		d.write(t, "details.yaml", detailsYAML)
		eventually(t, "no problems", func() error {
			if got := d.status(t).Problems; len(got) > 0 {
				return fmt.Errorf("%+v", got)
			}
			return nil
		})
	})

	t.Run("metrics", func(t *testing.T) {
		for path, want := range map[string]string{"/ready": "ready", "/metrics": sentMetric} {
			resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + cfg.Metrics + path)
			if err != nil {
				t.Fatal(err)
			}
			var b bytes.Buffer
			_, err = b.ReadFrom(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(b.String(), want) {
				t.Errorf("%s: %s, %v, without %q", path, resp.Status, err, want)
			}
		}
	})

	t.Run("restart", func(t *testing.T) {
		p.stop()
		d.stop(t)
		again := start(t, cfg)
		p := connect(t, again, sidecar(t, cfg, "productpage", "default"), again.dialOptions(t, token), p.client.Versions())
		eventually(t, "subscribed to every type", func() error {
			for _, x := range again.status(t).Proxies {
				if len(x.Types) == len(types) {
					return nil
				}
			}
			return fmt.Errorf("proxies %+v; %v", again.status(t).Proxies, p.failure())
		})
		// The one resource of a change comes after all that would have been sent anew.
		again.write(t, "rules.yaml", strings.NewReplacer("weight: 90", "weight: 50", "weight: 10", "weight: 50").Replace(rulesYAML))
		p.waitFor(t, xds.RouteType, "9080", nil)
		if got := p.forget(); !slices.Equal(got, []string{"+RouteConfiguration 9080"}) {
			t.Errorf("after a restart came %v", got)
		}
		if n := again.sent(t); n != 1 {
			t.Errorf("%v resources were sent after a restart, want the changed one", n)
		}
	})
}
