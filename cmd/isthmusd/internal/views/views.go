// Package views keeps, for every connected proxy, the encoded resources that the newest snapshot gives it.
package views

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/dns/zone"
	"github.com/isthmus-mesh/isthmus/eastwest/gateway"
)

// Views translates for the proxies that are there. Proxies that are alike share one view.
type Views struct {
	snapshots mesh.Snapshots
	log       *slog.Logger
	duration  prometheus.Histogram

	mu    sync.Mutex
	views map[string]*view
	names xds.Set // the newest snapshot's DNS hosts, shared by all views
	of    *mesh.Snapshot
	// encoded is every resource of the newest sets, by name and version, so that equal ones are one.
	encoded map[resourceID]*xds.Resource
}

type resourceID struct{ typ, name, version string }

// view implements xds.Feed.
type view struct {
	proxy    *mesh.Proxy // nil: a DNS server
	users    int
	problems []mesh.Problem

	mu      sync.Mutex
	set     xds.Set
	changed chan struct{}
}

// Latest implements xds.Feed.
func (v *view) Latest() (xds.Set, <-chan struct{}) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.set, v.changed
}

func (v *view) publish(set xds.Set) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.set = set
	close(v.changed)
	v.changed = make(chan struct{})
}

// New makes an empty set of views.
func New(snapshots mesh.Snapshots, log *slog.Logger, reg prometheus.Registerer) *Views {
	return &Views{
		snapshots: snapshots, log: log, views: map[string]*view{}, encoded: map[resourceID]*xds.Resource{},
		duration: promauto.With(reg).NewHistogram(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "views", Name: "translate_seconds", Help: "Time to translate one snapshot for one view.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 8),
		}),
	}
}

// Run retranslates every view for each snapshot until ctx ends.
func (vs *Views) Run(ctx context.Context) error {
	for {
		snap, changed := vs.snapshots.Latest()
		if snap != nil {
			vs.renew(snap)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// Feed returns the view of the node and what to call when its stream has ended.
func (vs *Views) Feed(node *corev3.Node, identity string) (xds.Feed, func(), error) {
	key, proxy, err := classify(node, identity)
	if err != nil {
		return nil, nil, err
	}
	vs.mu.Lock()
	defer vs.mu.Unlock()
	v := vs.views[key]
	if v == nil {
		v = &view{proxy: proxy, changed: make(chan struct{})}
		vs.views[key] = v
		if snap, _ := vs.snapshots.Latest(); snap != nil {
			vs.hosts(snap)
			vs.translate(v, snap, vs.encoded)
		}
	}
	v.users++
	return v, func() {
		vs.mu.Lock()
		defer vs.mu.Unlock()
		if v.users--; v.users == 0 && vs.views[key] == v {
			delete(vs.views, key)
		}
	}, nil
}

// classify names the view a node belongs to: nodes with one key are served the same.
func classify(node *corev3.Node, identity string) (string, *mesh.Proxy, error) {
	if node.GetMetadata().GetFields()["GENERATOR"].GetStringValue() == "dns" {
		return "dns", nil, nil
	}
	p, err := translate.ParseProxy(node, identity)
	if err != nil {
		return "", nil, err
	}
	var labels []string
	for k, v := range p.Labels {
		labels = append(labels, k+"="+v)
	}
	slices.Sort(labels)
	ipv6 := slices.ContainsFunc(p.Addresses, netip.Addr.Is6)
	key := fmt.Sprintf("%s/%s/%s/%s/%s/%v/%s", p.Type, p.Namespace, p.Name, p.Network, p.Domain, ipv6, strings.Join(labels, ","))
	if p.EastWest {
		key = fmt.Sprintf("eastwest/%v", ipv6)
	}
	return key, p, nil
}

func (vs *Views) renew(snap *mesh.Snapshot) {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	vs.hosts(snap)
	old := vs.encoded
	vs.encoded = make(map[resourceID]*xds.Resource, len(old))
	for typ, named := range vs.names {
		for _, r := range named {
			vs.intern(old, typ, r)
		}
	}
	for _, v := range vs.views {
		started := time.Now()
		vs.translate(v, snap, old)
		vs.duration.Observe(time.Since(started).Seconds())
	}
}

// translate gives the view the resources of snap; what did not change keeps its pointer.
func (vs *Views) translate(v *view, snap *mesh.Snapshot, old map[resourceID]*xds.Resource) {
	set, problems, err := resources(snap, v.proxy)
	if err != nil {
		// One view that cannot be encoded keeps what it has; the others go on.
		vs.log.Error("translation not served", "part", "views", "revision", snap.Revision, "err", err)
		return
	}
	for typ, named := range set {
		for name, r := range named {
			named[name] = vs.intern(old, typ, r)
		}
	}
	for typ, named := range vs.names {
		set[typ] = named
	}
	v.problems = problems
	v.publish(set)
}

// intern returns the one resource of that content.
func (vs *Views) intern(old map[resourceID]*xds.Resource, typ string, r *xds.Resource) *xds.Resource {
	id := resourceID{typ, r.Name, r.Version}
	if same := vs.encoded[id]; same != nil {
		return same
	}
	if same := old[id]; same != nil {
		r = same
	}
	vs.encoded[id] = r
	return r
}

// hosts encodes the DNS hosts once for a snapshot.
func (vs *Views) hosts(snap *mesh.Snapshot) {
	if vs.of == snap {
		return
	}
	var msgs []proto.Message
	for _, h := range zone.Hosts(snap) {
		msgs = append(msgs, h)
	}
	set, err := xds.Encode(msgs...)
	if err != nil {
		vs.log.Error("names not served", "part", "views", "revision", snap.Revision, "err", err)
		return
	}
	for typ, named := range set {
		for name, r := range named {
			if have := vs.names[typ][name]; have != nil && have.Version == r.Version {
				named[name] = have
			}
		}
	}
	vs.names, vs.of = set, snap
}

// resources translates for one proxy; nil is a DNS server.
func resources(snap *mesh.Snapshot, p *mesh.Proxy) (xds.Set, []mesh.Problem, error) {
	if p == nil {
		return xds.Set{}, nil, nil
	}
	var msgs []proto.Message
	var problems []mesh.Problem
	if p.EastWest {
		options := gateway.Options{IPv6: slices.ContainsFunc(p.Addresses, netip.Addr.Is6)}
		r, ps := options.Translate(snap)
		problems = ps
		for _, x := range r.Clusters {
			msgs = append(msgs, x)
		}
		for _, x := range r.Listeners {
			msgs = append(msgs, x)
		}
	} else {
		r, ps := translate.Translate(snap, p)
		problems = ps
		for _, x := range r.Clusters {
			msgs = append(msgs, x)
		}
		for _, x := range r.Endpoints {
			msgs = append(msgs, x)
		}
		for _, x := range r.Listeners {
			msgs = append(msgs, x)
		}
		for _, x := range r.Routes {
			msgs = append(msgs, x)
		}
		for _, x := range r.Secrets {
			msgs = append(msgs, x)
		}
	}
	set, err := xds.Encode(msgs...)
	if err != nil {
		return nil, nil, err
	}
	return set, problems, nil
}

// Problems returns what the translations of the newest snapshot left out, each once.
func (vs *Views) Problems() []mesh.Problem {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	var out []mesh.Problem
	for _, v := range vs.views {
		out = append(out, v.problems...)
	}
	slices.SortFunc(out, func(a, b mesh.Problem) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}
