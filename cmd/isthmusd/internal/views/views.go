// Package views keeps, for every connected proxy, the encoded resources that the newest snapshot gives it.
package views

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/translate/memo"
	"github.com/isthmus-mesh/isthmus/discovery/translate/nodeid"
	"github.com/isthmus-mesh/isthmus/discovery/translate/patch"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// Views translates for the proxies that are there. Each client has a view; views of proxies that are served the same
// share one scope, and so one translation and its encoded bytes.
type Views struct {
	snapshots mesh.Snapshots
	log       *slog.Logger
	duration  *prometheus.HistogramVec

	mu      sync.Mutex
	views   map[string]*view
	scopes  map[string]*scope
	of      *mesh.Snapshot // the snapshot they are made of, with the rules that are in effect
	said    *mesh.Snapshot // the same with all rules
	rules   holder
	due     *time.Timer               // of a rule that is held back
	names   map[mesh.ClusterID]*names // its DNS hosts, by the cluster of those who ask
	owned   owners
	encoded pool
	parts   memo.Memo         // of translations, for all scopes
	made    uint64            // sets made, to name them
	trials  map[string]*trial // by scope; those that some Envoy refused something of

	verdicts verdicts
}

// view implements xds.Feed.
type view struct {
	node  *mesh.Proxy // as it describes itself; nil: a DNS server
	proxy *mesh.Proxy // node, placed by the newest snapshot
	said  *verdicts
	key   string // of its scope; empty until asked for
	users int
	seen  uint64   // scope.id that was published
	base  xds.Set  // the scope's set that was published
	own   *overlay // nil: nothing is for this proxy alone

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

// follow publishes the scope's set with what is the proxy's own over it, if that is another than the view has.
func (v *view) follow(s *scope, own *overlay) {
	if s.set == nil || v.seen == s.id && v.own == own {
		return
	}
	set := merge(s.set, own, v)
	v.seen, v.base, v.own = s.id, s.set, own
	v.mu.Lock()
	defer v.mu.Unlock()
	v.set = set
	close(v.changed)
	v.changed = make(chan struct{})
}

// place finds out where the proxy is. It keeps the value that says the same.
func (v *view) place(snap *mesh.Snapshot) {
	if v.node == nil {
		return
	}
	p := topologies.Place(snap, v.node)
	if p.Cluster != v.proxy.Cluster || p.Network != v.proxy.Network || p.Locality != v.proxy.Locality {
		v.proxy, v.own, v.key = p, nil, ""
	}
}

// New makes an empty set of views.
func New(snapshots mesh.Snapshots, log *slog.Logger, reg prometheus.Registerer) *Views {
	due := time.NewTimer(time.Hour)
	due.Stop()
	vs := &Views{
		due:       due,
		rules:     holder{patience: patience},
		snapshots: snapshots, log: log, views: map[string]*view{}, scopes: map[string]*scope{}, encoded: pool{}, names: map[mesh.ClusterID]*names{},
		trials: map[string]*trial{}, verdicts: verdicts{arrived: make(chan struct{}, 1)},
		duration: promauto.With(reg).NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "isthmus", Subsystem: "views", Name: "translate_seconds", Help: "Time to translate one snapshot for one scope, by path: full, or endpoints alone.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 8),
		}, []string{"path"}),
	}
	vs.parts.Pack = vs.pack
	return vs
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
		for waiting := true; waiting; {
			select {
			case <-changed:
				waiting = false
			case <-vs.verdicts.arrived:
				vs.mu.Lock()
				vs.judge()
				vs.mu.Unlock()
			case <-vs.due.C:
				vs.mu.Lock()
				again := *vs.said
				again.Delta = nil
				vs.become(&again)
				vs.mu.Unlock()
			case <-ctx.Done():
				vs.due.Stop()
				return nil
			}
		}
	}
}

// Feed returns the view of node n and what to call when its stream has ended.
func (vs *Views) Feed(n *corev3.Node, identity string) (xds.Feed, func(), error) {
	proxy, err := proxyOf(n, identity)
	if err != nil {
		return nil, nil, err
	}
	vs.mu.Lock()
	defer vs.mu.Unlock()
	key := "dns"
	if proxy != nil {
		key = proxy.ID + "/" + scopeKey(proxy, proxy.Name)
	}
	v := vs.views[key]
	if v == nil {
		v = &view{node: proxy, proxy: proxy, said: &vs.verdicts, changed: make(chan struct{})}
		vs.views[key] = v
		if snap, _ := vs.snapshots.Latest(); snap != nil {
			vs.renew(snap)
			v.place(vs.of)
			v.follow(vs.scopeOf(v), vs.overlayOf(v, change{to: vs.of}))
		}
	}
	v.users++
	return v, func() {
		vs.mu.Lock()
		defer vs.mu.Unlock()
		if v.users--; v.users == 0 && vs.views[key] == v {
			delete(vs.views, key)
			vs.abandon(v)
		}
	}, nil
}

// proxyOf reads the node; a DNS server is nil.
func proxyOf(n *corev3.Node, identity string) (*mesh.Proxy, error) {
	if n.GetMetadata().GetFields()["GENERATOR"].GetStringValue() == "dns" {
		return nil, nil
	}
	return nodeid.Parse(n, identity)
}

// scopeKey names what p is served: by what it is, and by name where that matters.
func scopeKey(p *mesh.Proxy, name string) string {
	ipv6 := slices.ContainsFunc(p.Addresses, netip.Addr.Is6)
	var labels []string
	for k, v := range p.Labels {
		labels = append(labels, k+"="+v)
	}
	slices.Sort(labels)
	return fmt.Sprintf("%s/%s/%s/%s/%s/%s/%v/%s/%v/%v/%s", p.Type, p.Namespace, name, p.Cluster, p.Network, p.Locality, p.NetworkView, p.Domain, ipv6, p.Metadata["HTTP10"] == "1", strings.Join(labels, ","))
}

// renew brings every view in line with snap, unless it is there already. The caller holds mu.
func (vs *Views) renew(snap *mesh.Snapshot) {
	if vs.of != nil && snap.Revision <= vs.of.Revision {
		return
	}
	vs.become(snap)
}

func (vs *Views) become(snap *mesh.Snapshot) {
	vs.said = snap
	snap, until := vs.rules.apply(snap, time.Now())
	if vs.due.Stop(); !until.IsZero() {
		vs.due.Reset(max(time.Until(until), time.Millisecond))
	}
	c := change{from: vs.of, to: snap}
	c.pairs, c.endpointsOnly = translate.Changed(vs.of, snap)
	vs.of = snap
	for _, v := range vs.views {
		v.place(snap)
	}
	vs.owned = vs.owned.after(c)
	vs.host(c)
	old := vs.scopes
	vs.scopes = make(map[string]*scope, len(old))
	for _, v := range vs.views {
		key := vs.keyOf(v)
		s := vs.scopes[key]
		if s == nil {
			s = vs.refresh(old[key], common(v.proxy), c)
			vs.scopes[key] = s
		}
		v.follow(s, vs.overlayOf(v, c))
	}
	maps.DeleteFunc(vs.trials, func(key string, _ *trial) bool { return vs.scopes[key] == nil })
	vs.encoded.sweep(vs.scopes)
	vs.parts.Sweep()
}

// scopeOf returns the scope of a proxy that came between two snapshots.
func (vs *Views) scopeOf(v *view) *scope {
	key := vs.keyOf(v)
	if vs.scopes[key] == nil {
		vs.scopes[key] = vs.refresh(nil, common(v.proxy), change{to: vs.of})
	}
	return vs.scopes[key]
}

// key names the scope of p.
func (vs *Views) key(p *mesh.Proxy) string {
	if p == nil {
		return "dns"
	}
	return vs.patchedKey(p, scopeKey(common(p), common(p).Name))
}

// keyOf is key for a view, which keeps what lasts.
func (vs *Views) keyOf(v *view) string {
	if v.proxy == nil {
		return "dns"
	}
	if v.key == "" {
		v.key = scopeKey(common(v.proxy), common(v.proxy).Name)
	}
	return vs.patchedKey(v.proxy, v.key)
}

func (vs *Views) patchedKey(p *mesh.Proxy, key string) string {
	if vs.of != nil && len(vs.of.EnvoyFilters) > 0 {
		key += "/" + patch.Facts(vs.of, p)
	}
	return key
}

// common returns what the scope of p is translated for: sidecars share one, whatever they are called; a gateway listens on its own ports.
func common(p *mesh.Proxy) *mesh.Proxy {
	if p == nil || p.Type == mesh.Router {
		return p
	}
	return translate.Nameless(p)
}

// Problems returns what the translations of the newest snapshot left out, each once.
func (vs *Views) Problems() []mesh.Problem {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	var out []mesh.Problem
	for key, s := range vs.scopes {
		out = append(out, s.problems...)
		if t := vs.trials[key]; t != nil {
			out = append(out, t.problems(vs.of)...)
		}
	}
	slices.SortFunc(out, func(a, b mesh.Problem) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}

// Held returns what the client with that node id is served, and whether there is one. Of several with one id, as an agent
// beside its Envoy, each is served the same.
func (vs *Views) Held(node string) (xds.Set, bool) {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(vs.views)) {
		if v := vs.views[key]; v.node != nil && v.node.ID == node {
			set, _ := v.Latest()
			return set, true
		}
	}
	return nil, false
}
