package kube

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

type lastInput struct{ in mesh.Input }

func (l *lastInput) Report(_ string, in mesh.Input) { l.in = in }
func (*lastInput) Forget(string)                    {}
func (*lastInput) Synced()                          {}

// A node's range counts when a pod of it has an address there, until the node is gone.
func TestRangesInUse(t *testing.T) {
	var told lastInput
	node := func(ranges ...string) *cut {
		n := &config.Node{}
		for _, r := range ranges {
			n.PodRanges = append(n.PodRanges, netip.MustParsePrefix(r))
		}
		return &cut{key: "/n", kept: n}
	}
	pod := func(address string) *cut {
		return &cut{kept: &placeless{workload: &mesh.Workload{Addresses: []string{address}}}, node: "n"}
	}
	c := &cluster{sink: &told, live: true, nodes: map[string]*config.Node{}}
	for _, step := range []struct {
		what string
		do   func()
		want string
	}{
		{"a pod before its node", func() { c.podChanged(pod("10.1.0.5")) }, "[]"},
		{"a node", func() { c.nodeChanged(nil, node("10.1.0.0/24", "fd00::/64")) }, "[]"},
		{"a pod elsewhere", func() { c.podChanged(pod("192.0.2.1")) }, "[]"},
		{"a pod gone", func() { c.podChanged(nil) }, "[]"},
		{"a pod of it", func() { c.podChanged(pod("10.1.0.5")) }, "[10.1.0.0/24]"},
		{"the node has another range", func() { c.nodeChanged(node("10.1.0.0/24", "fd00::/64"), node("10.2.0.0/24")) }, "[]"},
		{"a pod there", func() { c.podChanged(pod("10.2.0.5")) }, "[10.2.0.0/24]"},
		{"the node is gone", func() { c.nodeChanged(node("10.2.0.0/24"), nil) }, "[]"},
	} {
		step.do()
		if got := fmt.Sprint(told.in.PodRanges); got != step.want {
			t.Errorf("%s: %s, want %s", step.what, got, step.want)
		}
	}
}
