package debug_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/debug"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

const node = "sidecar~10.0.0.1~reviews-v1.default~default.svc.cluster.local"

type fixed struct{ snap *mesh.Snapshot }

func (f fixed) Latest() (*mesh.Snapshot, <-chan struct{}) { return f.snap, nil }

func config(t *testing.T) debug.Config {
	t.Helper()
	pod := &mesh.Endpoint{Workload: "reviews-v1", Namespace: "default", Cluster: "amber", Address: "10.0.0.1", Ready: true, Ports: map[uint32]uint32{80: 8080}}
	snap := &mesh.Snapshot{
		Revision: 7, Local: &mesh.Cluster{ID: "amber"},
		Services:        []*mesh.Service{{Host: "reviews.default.svc.cluster.local", Namespace: "default", Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP}}, Endpoints: []*mesh.Endpoint{pod}}},
		VirtualServices: []*mesh.VirtualService{{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "default", Name: "reviews", Source: "a.yaml:3"}, Spec: &networking.VirtualService{Hosts: []string{"reviews"}}}},
	}
	set, err := xds.Encode(&clusterv3.Cluster{Name: "outbound|80||reviews"},
		&tlsv3.Secret{Name: "shop", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: "the certificate"}},
			PrivateKey:       &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: "the-key"}},
			Password:         &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: "the-key"}},
		}}},
		&tlsv3.Secret{Name: "tickets", Type: &tlsv3.Secret_SessionTicketKeys{SessionTicketKeys: &tlsv3.TlsSessionTicketKeys{Keys: []*corev3.DataSource{{Specifier: &corev3.DataSource_InlineString{InlineString: "the-key"}}}}}},
		&tlsv3.Secret{Name: "any", Type: &tlsv3.Secret_GenericSecret{GenericSecret: &tlsv3.GenericSecret{Secret: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: "the-key"}}}}},
	)
	if err != nil {
		t.Fatal(err)
	}
	return debug.Config{
		Snapshots: fixed{snap},
		Clients: func() []xds.ClientStatus {
			return []xds.ClientStatus{{Client: xds.Client{Node: &corev3.Node{Id: node}, Addr: "10.0.0.1:4000"}, Delta: true, Since: time.Unix(1, 0), Types: []xds.TypeStatus{
				{TypeURL: xds.ClusterType, Sent: "2", Acked: "1", Nack: "no such thing"}, {TypeURL: xds.ListenerType, Sent: "3", Acked: "3", Held: 4}, {TypeURL: xds.RouteType, Pending: 1}, {TypeURL: xds.EndpointType, Sent: "5", Acked: "4"},
			}}}
		},
		Held: func(id string) (xds.Set, bool) { return set, id == node },
	}
}

func get(t *testing.T, c debug.Config, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	debug.Handler(c).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
	var v any
	if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil {
		t.Errorf("%s: not JSON: %v\n%s", path, err, w.Body)
	}
	return w.Code, w.Body.String()
}

func TestPages(t *testing.T) {
	for path, want := range map[string][]string{
		"/debug/":          {"/debug/adsz", "/debug/config_dump"},
		"/debug/adsz":      {node, `"state":"NACK"`, `"nack":"no such thing"`, `"state":"SYNCED"`, `"state":"NOT SENT"`, `"state":"STALE"`, `"held":4`},
		"/debug/syncz":     {`"proxy":"` + node, `"cluster_sent":"2","cluster_acked":"1"`},
		"/debug/configz":   {`"kind":"VirtualService","namespace":"default","name":"reviews","source":"a.yaml:3","spec":{"hosts":["reviews"]}`},
		"/debug/endpointz": {`"svc":"reviews.default.svc.cluster.local","port":80`, `"address":"10.0.0.1","port":8080,"workload":"reviews-v1"`},
		"/debug/registryz": {`"host":"reviews.default.svc.cluster.local"`, `"endpoints":1,"ready":1`},
		"/debug/config_dump?proxyID=" + node: {
			`"@type":"type.googleapis.com/envoy.admin.v3.ClustersConfigDump"`, `"name":"outbound|80||reviews"`, "the certificate", `"inline_string":"[redacted]"`,
		},
		"/debug/config_dump?proxyID=reviews-v1.default": {`"name":"shop"`},
	} {
		code, body := get(t, config(t), path)
		if code != http.StatusOK || strings.Contains(body, "the-key") {
			t.Errorf("%s: %d, or a key in it: %s", path, code, body)
		}
		for _, w := range want {
			if !strings.Contains(body, w) {
				t.Errorf("%s: no %s in\n%s", path, w, body)
			}
		}
	}
}

func TestRefusals(t *testing.T) {
	empty := config(t)
	empty.Snapshots = fixed{}
	for _, c := range []struct {
		cfg  debug.Config
		path string
		code int
		want string
	}{
		{config(t), "/debug/config_dump", http.StatusBadRequest, "proxyID"},
		{config(t), "/debug/config_dump?proxyID=" + strings.Repeat("x", 600), http.StatusBadRequest, "longer"},
		{config(t), "/debug/config_dump?proxyID=reviews-v2.default", http.StatusNotFound, "UnknownProxy"},
		{empty, "/debug/configz", http.StatusServiceUnavailable, "NotReady"},
	} {
		if code, body := get(t, c.cfg, c.path); code != c.code || !strings.Contains(body, c.want) {
			t.Errorf("%s: %d %s", c.path, code, body)
		}
	}
}

// TestReplicas: what other replicas have is added, and never asked for when they ask themselves.
func TestReplicas(t *testing.T) {
	c := config(t)
	var asked []string
	c.Others = func(_ context.Context, path string) [][]byte {
		asked = append(asked, path)
		if strings.HasPrefix(path, "/debug/config_dump") {
			return [][]byte{[]byte(`{"configs":[]}`)}
		}
		return [][]byte{[]byte(`[{"node":"router~1"}]`), []byte(`broken`)}
	}
	if _, body := get(t, c, "/debug/adsz"); !strings.Contains(body, `"node":"router~1"`) || !strings.Contains(body, node) {
		t.Errorf("the proxies of both are not there: %s", body)
	}
	if code, body := get(t, c, "/debug/config_dump?proxyID=edge.default"); code != http.StatusOK || !strings.Contains(body, "configs") {
		t.Errorf("the other replica's proxy: %d %s", code, body)
	}
	if len(asked) != 2 || asked[1] != "/debug/config_dump?proxyID=edge.default" {
		t.Errorf("asked %q", asked)
	}
	if code, _ := get(t, c, "/debug/config_dump?proxyID=edge.default&"+admin.LocalOnly+"=true"); code != http.StatusNotFound || len(asked) != 2 {
		t.Errorf("a replica that is asked asks on: %d, %q", code, asked)
	}
}
