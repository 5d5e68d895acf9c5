package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// shares are the weights of the own endpoints of a service together, and of those behind gateways.
func shares(t *testing.T, body []byte) (own, far uint32) {
	t.Helper()
	cla := new(endpointv3.ClusterLoadAssignment)
	if err := proto.Unmarshal(body, cla); err != nil {
		t.Fatal(err)
	}
	for _, l := range cla.GetEndpoints() {
		for _, e := range l.GetLbEndpoints() {
			if e.GetEndpoint().GetAddress().GetSocketAddress() != nil {
				own += e.GetLoadBalancingWeight().GetValue()
			} else {
				far += e.GetLoadBalancingWeight().GetValue()
			}
		}
	}
	return own, far
}

// TestDrain: the share of a drained cluster falls step by step to nothing, also over a restart; where nobody else serves
// it is used still; undo gives all back.
func TestDrain(t *testing.T) {
	amber, _ := member(t, "amber", nil)
	birch, _ := member(t, "birch", nil)
	birch.mustJoin(t, amber)
	settled(t, amber, birch)
	const host = "outbound|9080||" + globalHost
	token := amber.workloadToken(t, "default", "productpage", "productpage")
	p := connect(t, amber, sidecar(t, amber.cfg, "productpage", "default"), amber.dialOptions(t, token), nil)
	is := func(what string, ok func(own, far uint32) bool) {
		t.Helper()
		p.waitFor(t, xds.EndpointType, host, func(body []byte) error {
			if own, far := shares(t, body); !ok(own, far) {
				return fmt.Errorf("%s: own %d, of birch %d", what, own, far)
			}
			return nil
		})
	}
	even := func(own, far uint32) bool { return own > 0 && own == far }
	is("at first", even)
	var e *admin.Error
	for path, in := range map[string]admin.DrainRequest{"birch": {Undo: true}, "elm": {Over: "1s"}, "amber": {Over: "1s"}} {
		if err := amber.call("POST", "/v1/peers/"+path+"/drain", in, nil); !errors.As(err, &e) || e.Reason != "UnknownPeer" {
			t.Errorf("%s %+v: %v", path, in, err)
		}
	}
	if err := amber.call("POST", "/v1/peers/birch/drain", admin.DrainRequest{Over: "soon"}, nil); !errors.As(err, &e) || e.Hint == "" {
		t.Errorf("over soon: %v", err)
	}
	if err := amber.call("POST", "/v1/peers/birch/drain", admin.DrainRequest{Over: "6s"}, nil); err != nil {
		t.Fatal(err)
	}
	is("under way", func(own, far uint32) bool { return far > 0 && far < own })
	is("at the end", func(own, far uint32) bool { return own > 0 && far == 0 })
	drained := func(d *daemonTest, percent int) {
		t.Helper()
		if x := d.peers(t)["birch"].Drain; x == nil || x.Percent != percent || x.Over != "6s" {
			t.Errorf("birch is shown with %+v, want %d %%", x, percent)
		}
	}
	drained(amber, 100)
	if birch.peers(t)["amber"].Drain != nil {
		t.Error("birch shows a drain that is amber's")
	}

	p.stop()
	amber.stop(t)
	amber = start(t, amber.cfg)
	p = connect(t, amber, sidecar(t, amber.cfg, "productpage", "default"), amber.dialOptions(t, token), nil)
	p.waitFor(t, xds.EndpointType, host, nil)
	if own, far := shares(t, p.resource(xds.EndpointType, host)); own == 0 || far != 0 {
		t.Errorf("the first endpoints after a restart: own %d, of birch %d", own, far)
	}
	drained(amber, 100)
	settled(t, amber, birch)

	amber.write(t, "reviews.yaml", strings.Replace(exportedYAML("amber"), `isthmus.io/export: "true"`, "a: b", 1))
	is("nobody else", func(own, far uint32) bool { return own == 0 && far > 0 })
	amber.write(t, "reviews.yaml", exportedYAML("amber"))
	is("others again", func(own, far uint32) bool { return own > 0 && far == 0 })
	if err := amber.call("POST", "/v1/peers/birch/drain", admin.DrainRequest{Undo: true}, nil); err != nil {
		t.Fatal(err)
	}
	is("undone", even)
	if x := amber.peers(t)["birch"].Drain; x != nil {
		t.Errorf("after undo birch is shown with %+v", x)
	}
}
