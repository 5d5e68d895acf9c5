package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// daemon answers on a unix socket with fixed values, in the form of isthmusd.
func daemon(t *testing.T, answers map[string]any) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "d.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		out, ok := answers[r.Method+" "+r.URL.Path]
		if !ok {
			out = &admin.Error{Reason: "NotFound", Message: "nothing at " + r.URL.Path, Hint: "ask for something else"}
		}
		if _, failed := out.(*admin.Error); failed {
			w.WriteHeader(http.StatusUnprocessableEntity)
		}
		_ = json.NewEncoder(w).Encode(out)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return socket
}

func isthmus(args ...string) (stdout, stderr string, err error) {
	var out, errOut bytes.Buffer
	cmd := command()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&errOut)
	err = cmd.ExecuteContext(context.Background())
	return out.String(), errOut.String(), err
}

func birch() admin.Peer {
	return admin.Peer{Name: "birch", TrustDomain: "birch.mesh", Topology: "multi-control-plane", State: "approved", Freshness: "late",
		StaleSince: time.Now().Add(-3 * time.Second), Path: "down", Gateways: []string{"172.31.0.21:15443"}, Services: 2, Endpoints: 3}
}

func TestCommands(t *testing.T) {
	socket := daemon(t, map[string]any{
		"GET /v1/peers":   []admin.Peer{birch()},
		"POST /v1/tokens": admin.TokenReply{Token: "isth1_x.y", ID: "t1", Expires: time.Now()},
		"GET /v1/tokens":  []admin.Token{{ID: "t1", Kind: "cluster", Name: "birch", State: "issued"}},
		"GET /v1/status": admin.Status{Cluster: "amber", TrustDomain: "amber.mesh", Ready: true, Peers: []admin.Peer{birch()},
			Imports:  []admin.Service{{Host: "reviews.default.global", Endpoints: map[string]int{"birch": 3}}},
			Problems: []admin.ProblemLine{{Object: "VirtualService/default/x", Source: "a.yaml:3", Reason: "UnknownHost", Message: "no such host", Remedy: "correct it"}}},
		"GET /v1/proxies": []admin.Proxy{{Node: "sidecar~10.0.0.1~reviews-v1.default~default.svc.cluster.local", Identity: "spiffe://amber.mesh/ns/default/sa/reviews", Types: map[string]admin.ProxyState{"EDS": {State: "STALE", Sent: "5e", Acked: "4a", Held: 12}}}, {Node: "sidecar~1", Types: map[string]admin.ProxyState{"CDS": {State: "NACK", Nack: "bad cluster"}, "LDS": {State: "SYNCED"}}}},
		"POST /v1/explain": admin.Explanation{Host: "reviews.default.global", Route: "default", Targets: []admin.Destination{{Host: "reviews.default.global", Weight: 100,
			Endpoints: []admin.ExplainedAddress{{Workload: "reviews-v2", Cluster: "birch", Via: []string{"172.31.0.21:15443"}, SNI: "reviews-v2.p9080.birch.reviews.default.global", Ready: true, Freshness: "fresh",
				Handshake: &admin.Probe{Version: "TLS 1.3", Identity: "spiffe://birch.mesh/ns/default/sa/reviews"}}}}}},
	})
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"peers"}, []string{"birch", "birch.mesh", "multi-control-plane", "late, stale since", "down", "172.31.0.21:15443"}},
		{[]string{"token", "create", "--for", "birch"}, []string{"isth1_x.y"}},
		{[]string{"token", "list"}, []string{"t1", "issued"}},
		{[]string{"status"}, []string{"cluster amber (amber.mesh)", "LINKS", "reviews.default.global", "birch:3", "PROBLEMS  1", "VirtualService/default/x (a.yaml:3): UnknownHost: no such host", "correct it"}},
		{[]string{"proxy-status", "reviews-v1.default"}, []string{"spiffe://amber.mesh/ns/default/sa/reviews", "STALE", "12", "5e", "4a"}},
		{[]string{"proxy-status"}, []string{"NACK", "SYNCED", "sidecar~1 refused CDS: bad cluster"}},
		{[]string{"explain", "--from", "a.default", "http://reviews.default.global:9080/"}, []string{"100 % to reviews.default.global", "via gateway 172.31.0.21:15443", "TLS 1.3", "proved spiffe://birch.mesh"}},
		{[]string{"peer", "show", "birch"}, []string{`"trustDomain": "birch.mesh"`}},
	} {
		out, _, err := isthmus(append(c.args, "--socket", socket)...)
		if err != nil {
			t.Errorf("%v: %v", c.args, err)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%v does not print %q:\n%s", c.args, w, out)
			}
		}
		if c.args[0] == "peer" || c.args[0] == "token" && c.args[1] == "create" {
			continue
		}
		out, _, err = isthmus(append(c.args, "--socket", socket, "-o", "json")...)
		if err != nil || !json.Valid([]byte(out)) {
			t.Errorf("%v -o json: %v\n%s", c.args, err, out)
		}
	}
}

// TestActs: commands that change something say so, as JSON too.
func TestActs(t *testing.T) {
	socket := daemon(t, map[string]any{
		"POST /v1/peers/birch/approve": struct{}{}, "POST /v1/peers/birch/evict": struct{}{}, "POST /v1/peers/birch/drain": struct{}{}, "DELETE /v1/tokens/t1": struct{}{},
	})
	for _, c := range []struct {
		args       []string
		text, json string
	}{
		{[]string{"peer", "approve", "birch"}, "cluster birch is a member\n", `{"cluster":"birch","state":"approved"}`},
		{[]string{"peer", "evict", "birch"}, "cluster birch is evicted\n", `{"cluster":"birch","state":"evicted"}`},
		{[]string{"peer", "drain", "birch", "--over", "5m"}, "cluster birch is drained over 5m\n", `{"cluster":"birch","state":"draining"}`},
		{[]string{"peer", "drain", "birch", "--undo"}, "cluster birch has its share again\n", `{"cluster":"birch","state":"undrained"}`},
		{[]string{"token", "revoke", "t1"}, "token t1 is revoked\n", `{"token":"t1","state":"revoked"}`},
	} {
		if out, _, err := isthmus(append(c.args, "--socket", socket)...); err != nil || out != c.text {
			t.Errorf("%v: %q, %v; want %q", c.args, out, err, c.text)
		}
		out, _, err := isthmus(append(c.args, "--socket", socket, "-o", "json")...)
		var compact bytes.Buffer
		if err != nil || json.Compact(&compact, []byte(out)) != nil || strings.TrimSpace(compact.String()) != c.json {
			t.Errorf("%v -o json: %q, %v; want %s", c.args, out, err, c.json)
		}
	}
	help, _, err := isthmus("peer", "evict", "--help")
	for _, want := range []string{"certificates, names and endpoints", "run it there as well", "new token"} {
		if err != nil || !strings.Contains(help, want) {
			t.Errorf("the help of peer evict does not say %q: %v\n%s", want, err, help)
		}
	}
}

func TestRefusals(t *testing.T) {
	socket := daemon(t, nil)
	for _, c := range []struct {
		args []string
		want string
		hint string
	}{
		{[]string{"peers", "--socket", filepath.Join(t.TempDir(), "none")}, "no isthmusd listens on", "start it"},
		{[]string{"peers", "--socket", socket}, "nothing at /v1/peers", "ask for something else"},
		{[]string{"token", "create", "--socket", socket}, "name either a cluster or a machine", "--for CLUSTER"},
		{[]string{"token", "create", "--for", "a", "--vm", "b", "--socket", socket}, "name either a cluster or a machine", "--for CLUSTER"},
		{[]string{"token", "create", "--vm", "b", "--ports", "http=99999", "--socket", socket}, "1 to 65535", ""},
		{[]string{"token", "create", "--vm", "b", "--labels", "x", "--socket", socket}, "KEY=VALUE", ""},
		{[]string{"token", "inspect", "isth1_abc"}, "cut short", ""},
		{[]string{"join", "nonsense", "--socket", socket}, "must begin with isth1_", ""},
		{[]string{"status", "-o", "yaml", "--socket", daemon(t, map[string]any{"GET /v1/status": admin.Status{}})}, `unknown output format "yaml"`, "-o table or -o json"},
		{[]string{"peer", "evict", "birch", "-o", "yaml", "--socket", socket}, `unknown output format "yaml"`, "-o table or -o json"},
		{[]string{"explain", "--socket", socket, "http://reviews.default.global:9080/"}, "where the request comes from is missing", "isthmus explain --from productpage.default http://reviews.default.global:9080/"},
		{[]string{"explain", "--from", "a.default", "-H", "x", "--socket", socket, "http://reviews.default.global:9080/"}, "NAME=VALUE", ""},
		{[]string{"token", "create", "--vm", "b", "--ports", "http", "--socket", socket}, "NAME=NUMBER", ""},
		{[]string{"nonsense"}, "unknown command", ""},
	} {
		_, _, err := isthmus(c.args...)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") && c.args[0] != "nonsense" {
			t.Errorf("%v: %v, want one line with %q", c.args, err, c.want)
		}
		if !strings.Contains(diag.HintOf(err), c.hint) {
			t.Errorf("%v: hint %q, want %q", c.args, diag.HintOf(err), c.hint)
		}
	}
}
