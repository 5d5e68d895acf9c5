package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/api/admin"
)

// Clusters whose pods share addresses do not join on one network, unless their operator says so; then status says it.
func TestOverlappingRanges(t *testing.T) {
	on := func(network, pods string) func(*Config) {
		return func(c *Config) { c.Network, c.PodRanges = network, []string{pods} }
	}
	amber, _ := member(t, "amber", on("vpn", "10.77.0.0/16"))
	far, _ := member(t, "far", on("elsewhere", "10.77.0.0/16"))
	near, _ := member(t, "near", on("vpn", "10.77.3.0/24"))
	far.mustJoin(t, amber)
	token := amber.tokenFor(t, admin.TokenRequest{Name: "near"}).Token
	_, err := near.join(token)
	if err == nil || !strings.Contains(err.Error(), "pods of amber (10.77.0.0/16) and pods of near (10.77.3.0/24) share addresses on network vpn") || !strings.Contains(err.Error(), "--allow-overlap") {
		t.Fatalf("join with overlapping ranges: %v", err)
	}
	if p := amber.peers(t); len(p) != 1 {
		t.Fatalf("refused, and yet known: %v", names(p))
	}
	var reply admin.JoinReply // the refusal did not spend the token
	if err := near.call("POST", "/v1/join", admin.JoinRequest{Token: token, AllowOverlap: true}, &reply); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*daemonTest{amber, near} {
		eventually(t, "the overlap is named by "+d.cfg.Cluster, func() error {
			var st admin.Status
			if err := d.call("GET", "/v1/status", nil, &st); err != nil {
				return err
			}
			for _, p := range st.Problems {
				if p.Reason == "RangeOverlap" && strings.Contains(p.Message, "10.77.3.0/24") && p.Remedy != "" {
					return nil
				}
			}
			return fmt.Errorf("%s does not name the overlap: %v", d.cfg.Cluster, st.Problems)
		})
	}
}
