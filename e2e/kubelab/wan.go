package kubelab

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/e2e/wan"
)

// ErrNoEmulator is returned by Link in a lab whose topology does not say emulate.
var ErrNoEmulator = errors.New("the links of this lab are perfect: write emulate: true into its topology")

// Link gives one direction of the WAN a rule, at once. Places are clusters (their routers), CLUSTER/apiserver and
// machines on the WAN.
func (l *Lab) Link(from, to string, rule wan.Link) error {
	if l.wan == nil {
		return ErrNoEmulator
	}
	return l.wan.Set(from, to, rule)
}

// LinkStats returns what became of the packets of one direction.
func (l *Lab) LinkStats(from, to string) (wan.Stats, error) {
	if l.wan == nil {
		return wan.Stats{}, ErrNoEmulator
	}
	return l.wan.Stats(from, to), nil
}

// onWAN gives a node its leg to the WAN: a port of the emulator, or one of the bridge.
func (l *Lab) onWAN(place string, n *lab.Node, addresses, routes []netip.Prefix) error {
	if l.wan == nil {
		return l.net.Attach(lab.Leg{Node: n, Link: lab.LinkWAN, Parent: l.net.Node(lab.WAN), Bridge: lab.LinkWAN, Addresses: addresses})
	}
	return l.wan.Attach(wan.Port{Name: place, Enter: n.Do, Device: lab.LinkWAN, Addresses: addresses, Routes: routes})
}

// behind is what the WAN leads to the cluster's router, beside the addresses of its Nodes.
func (c *Cluster) behind() []netip.Prefix {
	out := []netip.Prefix{c.Spec.LoadBalancer}
	if c.Spec.Flat != "" {
		out = append(out, c.Spec.inside()...)
	}
	return slices.DeleteFunc(out, func(p netip.Prefix) bool { return !p.IsValid() })
}

// emulate passes the packets of the WAN until life ends.
func (l *Lab) emulate(life context.Context) {
	if l.wan != nil {
		l.parts.Go(func() error { return l.wan.Run(life) })
	}
}
