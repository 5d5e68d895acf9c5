package main

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/api/admin"
)

// TestOperatorRequests is about requests that make no sense: each is refused in one line, and the socket is the operator's alone.
func TestOperatorRequests(t *testing.T) {
	d, _ := member(t, "amber", nil)
	if info, err := os.Stat(d.cfg.Admin.Socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", info, err)
	}
	for name, c := range map[string]struct {
		method, path string
		in           any
		text         string
	}{
		"ttl":              {"POST", "/v1/tokens", admin.TokenRequest{Kind: "cluster", Name: "birch", TTL: "soon"}, `"soon"`},
		"negative ttl":     {"POST", "/v1/tokens", admin.TokenRequest{Kind: "cluster", Name: "birch", TTL: "-1m"}, `"-1m"`},
		"long ttl":         {"POST", "/v1/tokens", admin.TokenRequest{Kind: "cluster", Name: "birch", TTL: "48h"}, "24h"},
		"kind":             {"POST", "/v1/tokens", admin.TokenRequest{Kind: "pod", Name: "birch"}, "pod"},
		"uses of cluster":  {"POST", "/v1/tokens", admin.TokenRequest{Kind: "cluster", Name: "birch", Uses: 3}, "birch"},
		"machine's name":   {"POST", "/v1/tokens", admin.TokenRequest{Kind: "vm", Name: "a b", Namespace: "default", ServiceAccount: "x"}, "a b"},
		"no namespace":     {"POST", "/v1/tokens", admin.TokenRequest{Kind: "vm", Name: "dune", ServiceAccount: "x"}, "dune"},
		"unknown field":    {"POST", "/v1/tokens", map[string]string{"king": "cluster"}, "king"},
		"not an object":    {"POST", "/v1/join", "hello", "read the request"},
		"too large":        {"POST", "/v1/join", admin.JoinRequest{Token: strings.Repeat("x", 2<<20)}, "too large"},
		"workload's name":  {"POST", "/v1/workload-tokens", admin.WorkloadTokenRequest{Namespace: "Default", ServiceAccount: "x"}, "Default"},
		"approve nobody":   {"POST", "/v1/peers/birch/approve", nil, "birch"},
		"explain nothing":  {"POST", "/v1/explain", admin.ExplainRequest{From: "nobody.default", URL: "http://reviews.default:9080/", NoProbe: true}, "nobody"},
		"explain nonsense": {"POST", "/v1/explain", admin.ExplainRequest{From: "amber-v1.default", URL: "::", NoProbe: true}, "::"},
		"explain no host":  {"POST", "/v1/explain", admin.ExplainRequest{From: "amber-v1.default", URL: "http://nowhere.default:80/", NoProbe: true}, "nowhere.default"},
	} {
		t.Run(name, func(t *testing.T) {
			var e *admin.Error
			if err := d.call(c.method, c.path, c.in, nil); !errors.As(err, &e) {
				t.Fatalf("got %v", err)
			}
			t.Logf("%s: %s | %s", e.Reason, e.Message, e.Hint)
			if !strings.Contains(e.Message, c.text) || strings.Contains(e.Message, "\n") || e.Reason == "" || len(e.Message) > 1000 {
				t.Errorf("%s: %q, want one line with %q", e.Reason, e.Message, c.text)
			}
		})
	}
	var list []admin.Token
	if err := d.call("GET", "/v1/tokens", nil, &list); err != nil || len(list) != 0 {
		t.Errorf("tokens %+v, %v", list, err)
	}
	var x admin.Explanation
	if err := d.call("POST", "/v1/explain", admin.ExplainRequest{From: "amber-v1.default", URL: "http://reviews.default.global:9080/", NoProbe: true}, &x); err != nil || x.Host != globalHost || len(x.Targets) != 1 || len(x.Targets[0].Endpoints) != 2 {
		t.Errorf("explanation %+v, %v", x, err)
	}
}
