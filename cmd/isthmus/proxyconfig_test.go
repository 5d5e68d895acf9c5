package main

import (
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const envoyDump = `{"configs":[
{"@type":"type.googleapis.com/envoy.admin.v3.BootstrapConfigDump","bootstrap":{"node":{"id":"sidecar~10.0.0.1~reviews-v1.default~default.svc.cluster.local"}}},
{"@type":"type.googleapis.com/envoy.admin.v3.ClustersConfigDump","dynamic_active_clusters":[{"cluster":{"name":"outbound|80||reviews.default.svc.cluster.local","type":"EDS"}}]}]}`

func TestProxyConfig(t *testing.T) {
	held := json.RawMessage(strings.Replace(envoyDump, "EDS", "STATIC", 1))
	socket := daemon(t, map[string]any{"GET /debug/config_dump": held})
	envoy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.String() == "/config_dump?include_eds" {
			_, _ = w.Write([]byte(envoyDump))
		}
	}))
	defer envoy.Close()
	admin := envoy.Listener.Addr().String()
	file := filepath.Join(t.TempDir(), "dump.json")
	if err := os.WriteFile(file, []byte(envoyDump), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
		err  string
	}{
		{args: []string{"clusters", "reviews-v1.default", "--admin", admin}, want: "reviews.default.svc.cluster.local   80"},
		{args: []string{"cluster", "-f", file, "-o", "json"}, want: `"type": "EDS"`},
		{args: []string{"all", "-f", file, "-o", "yaml"}, want: "type: EDS"},
		{args: []string{"all", "-f", file}, want: "SECRET"},
		{args: []string{"bootstrap", "-f", file}, want: `"id": "sidecar~10.0.0.1`},
		{args: []string{"clusters", "reviews-v1.default", "--held"}, want: "STATIC"},
		{args: []string{"clusters", "-f", file, "--diff"}, want: "clusters outbound|80||reviews.default.svc.cluster.local: they differ\n  type\n    envoy    \"EDS\"\n    isthmusd \"STATIC\"", err: errDiffers.Error()},
		{args: []string{"clusters", "-f", file, "--diff", "-o", "json"}, want: `"path": "type"`, err: errDiffers.Error()},
		{args: []string{"listeners", "-f", file, "--diff"}, want: "Envoy has what isthmusd holds for it"},
		{args: []string{"bootstrap", "-f", file, "--diff"}, err: "a bootstrap is the agent's"},
		{args: []string{"clusters", "other.default", "--admin", admin}, err: "is that of sidecar~10.0.0.1"},
		{args: []string{"clusters", "reviews-v1.default", "--admin", unused(t)}, err: "ask Envoy at"},
		{args: []string{"clusters"}, err: "whose configuration is missing"},
		{args: []string{"clusters", "-f", file, "--direction", "up"}, err: "unknown direction"},
		{args: []string{"clusters", "-f", socket + "x"}, err: "no such file"},
		{args: []string{"clusters", "-f", file, "-o", "table"}, err: "unknown output format"},
	} {
		out, _, err := isthmus(append([]string{"--socket", socket, "proxy-config"}, c.args...)...)
		if !strings.Contains(out, c.want) || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("proxy-config %v: %v\n%s", c.args, err, out)
		}
	}
	if _, _, err := isthmus("--socket", socket, "proxy-config", "clusters", "-f", file, "--diff"); !errors.Is(err, errDiffers) || exitCode(err) != 1 {
		t.Errorf("a difference ends with %v", err)
	}
}

func unused(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
