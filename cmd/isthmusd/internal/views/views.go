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

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// Views translates for the proxies that are there. Each client has a view; views of proxies that are served the same
// share one scope, and so one translation and its encoded bytes.
type Views struct {
	snapshots mesh.Snapshots
	log       *slog.Logger
	duration  *prometheus.HistogramVec

	mu     sync.Mutex
	views  map[string]*view
	scopes map[string]*scope
	of     *mesh.Snapshot // the snapshot they are made of
	names  xds.Set        // its DNS hosts, shared by all
	// owners counts the services that have a workload as their endpoint: proxies of those have a scope of their own.
	owners  map[workload]int
	encoded pool
	made    uint64 // sets made, to name them
}

type workload struct{ namespace, name string }

// view implements xds.Feed.
type view struct {
	proxy *mesh.Proxy // nil: a DNS server
	users int
	seen  uint64 // scope.id that was published

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

// follow publishes the scope's set if it is another than the view has.
func (v *view) follow(s *scope) {
	if s.set == nil || v.seen == s.id {
		return
	}
	v.seen = s.id
	v.mu.Lock()
	defer v.mu.Unlock()
	v.set = s.set
	close(v.changed)
	v.changed = make(chan struct{})
}

// New makes an empty set of views.
func New(snapshots mesh.Snapshots, log *slog.Logger, reg prometheus.Registerer) *Views {
	return &Views{
		snapshots: snapshots, log: log, views: map[string]*view{}, scopes: map[string]*scope{}, encoded: pool{},
		duration: promauto.With(reg).NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "views", Name: "translate_seconds", Help: "Time to translate one snapshot for one scope, by path: full, or endpoints alone.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 8),
		}, []string{"path"}),
	}
}

// Run retranslates for each snapshot until ctx ends.
func (vs *Views) Run(ctx context.Context) error {
	for {
		snap, changed := vs.snapshots.Latest()
		if snap != nil {
			vs.mu.Lock()
			vs.renew(snap)
			vs.mu.Unlock()
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
	proxy, err := proxyOf(node, identity)
	if err != nil {
		return nil, nil, err
	}
	vs.mu.Lock()
	defer vs.mu.Unlock()
	key := "dns"
	if proxy != nil {
		key = proxy.ID + "/" + scopeKey(proxy, true)
	}
	v := vs.views[key]
	if v == nil {
		v = &view{proxy: proxy, changed: make(chan struct{})}
		vs.views[key] = v
		if snap, _ := vs.snapshots.Latest(); snap != nil {
			vs.renew(snap)
			v.follow(vs.scopeOf(proxy))
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

// proxyOf reads the node; a DNS server is nil.
func proxyOf(node *corev3.Node, identity string) (*mesh.Proxy, error) {
	if node.GetMetadata().GetFields()["GENERATOR"].GetStringValue() == "dns" {
		return nil, nil
	}
	return translate.ParseProxy(node, identity)
}

// scopeKey names what p is served: by what it is, and by its own name if something is for it alone.
func scopeKey(p *mesh.Proxy, own bool) string {
	ipv6 := slices.ContainsFunc(p.Addresses, netip.Addr.Is6)
	if p.EastWest {
		return fmt.Sprintf("eastwest/%v", ipv6)
	}
	var labels []string
	for k, v := range p.Labels {
		labels = append(labels, k+"="+v)
	}
	slices.Sort(labels)
	name := ""
	if own {
		name = p.Name
	}
	return fmt.Sprintf("%s/%s/%s/%s/%s/%v/%s", p.Type, p.Namespace, name, p.Network, p.Domain, ipv6, strings.Join(labels, ","))
}

// renew brings every view in line with snap, unless it is there already. The caller holds mu.
func (vs *Views) renew(snap *mesh.Snapshot) {
	if vs.of != nil && snap.Revision <= vs.of.Revision {
		return
	}
	c := change{from: vs.of, to: snap}
	c.pairs, c.endpointsOnly = translate.Changed(vs.of, snap)
	vs.of = snap
	vs.count(c)
	vs.host(c)
	old := vs.scopes
	vs.scopes = make(map[string]*scope, len(old))
	for _, v := range vs.views {
		key := vs.key(v.proxy)
		s := vs.scopes[key]
		if s == nil {
			s = vs.refresh(old[key], v.proxy, c)
			vs.scopes[key] = s
		}
		v.follow(s)
	}
	vs.encoded.sweep(vs.scopes)
}

// scopeOf returns the scope of a proxy that came between two snapshots.
func (vs *Views) scopeOf(p *mesh.Proxy) *scope {
	key := vs.key(p)
	if vs.scopes[key] == nil {
		vs.scopes[key] = vs.refresh(nil, p, change{to: vs.of})
	}
	return vs.scopes[key]
}

func (vs *Views) key(p *mesh.Proxy) string {
	if p == nil {
		return "dns"
	}
	return scopeKey(p, vs.owners[workload{p.Namespace, p.Name}] > 0)
}

// count keeps owners in line with the services.
func (vs *Views) count(c change) {
	add := func(s *mesh.Service, n int) {
		for _, e := range s.Endpoints {
			if e.Cluster == c.to.Local.ID {
				vs.owners[workload{e.Namespace, e.Workload}] += n
			}
		}
	}
	if c.endpointsOnly {
		for _, pair := range c.pairs {
			add(pair[0], -1)
			add(pair[1], 1)
		}
		return
	}
	vs.owners = map[workload]int{}
	for _, s := range c.to.Services {
		add(s, 1)
	}
}

// Problems returns what the translations of the newest snapshot left out, each once.
func (vs *Views) Problems() []mesh.Problem {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	var out []mesh.Problem
	for _, s := range vs.scopes {
		out = append(out, s.problems...)
	}
	slices.SortFunc(out, func(a, b mesh.Problem) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}
