package kube

import (
	"context"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// firstList bounds the wait for kinds that are neither listed nor refused: the others are used then.
const firstList = 5 * time.Second

// cluster reads one API server. It outlives connections: another one fills the same tables.
type cluster struct {
	src    *Source
	id     mesh.ClusterID
	remote bool
	said   string // Source of ObjectRefs
	sink   mesh.Sink
	log    *slog.Logger

	mu     sync.Mutex
	conn   *connection
	tables []*table
	// live is set when all kinds are known for the first time; before, nothing is reported: half a cluster would
	// mislead.
	live       bool
	namespaces map[string]map[string]string
	nodes      map[string]*config.Node
	external   map[string][]string // addresses of Services outside the cluster, by host
	network    mesh.NetworkID      // label of the root namespace
	ranges     ranges

	served   served
	connect  time.Time // first contact of this connection
	up       bool
	since    time.Time // when it came up or went down
	why      error     // it is down
	complain error     // about the credentials or the like, from outside
	problems []mesh.Problem
	news     chan struct{} // closed when served changes

	copy memory // what was read before this process began
}

func newCluster(s *Source, id mesh.ClusterID, remote bool) *cluster {
	c := &cluster{
		src: s, id: id, remote: remote, said: "cluster " + string(id), sink: s.cfg.Sink, log: s.log.With("from", string(id)),
		namespaces: map[string]map[string]string{}, nodes: map[string]*config.Node{}, external: map[string][]string{}, news: make(chan struct{}),
	}
	for _, k := range kinds(s.cfg.EverySecret) {
		if !remote || k.everywhere {
			c.tables = append(c.tables, &table{kind: k, c: c, entries: map[string]*entry{}, state: StateSyncing, since: time.Now()})
		}
	}
	return c
}

// run reads until ctx ends.
func (c *cluster) run(ctx context.Context) {
	c.mu.Lock()
	conn := c.conn
	c.connect, c.up, c.served = time.Time{}, false, served{}
	recall := !c.live && c.src.cfg.Memory != nil
	c.copy.loading = recall
	c.mu.Unlock()
	var wg sync.WaitGroup
	defer wg.Wait()
	if recall {
		wg.Go(func() { c.recall(conn.server) })
	}
	for _, t := range c.tables {
		w := &watcher{table: t, conn: conn}
		wg.Go(func() { w.run(ctx) })
	}
	c.beat(ctx, conn)
}

// forget removes all that the cluster said.
func (c *cluster) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.live = false // nothing is reported anew because of what goes
	for _, t := range c.tables {
		t.clear()
	}
	c.sink.Forget(c.problemsKey())
	c.sink.Forget(c.clusterKey())
}

// introduce tells of a remote cluster that it is one of ours, and on which network its pods are.
func (c *cluster) introduce() {
	if !c.live {
		return
	}
	if !c.remote {
		c.sink.Report(c.clusterKey(), mesh.Input{PodRanges: c.ranges.list})
		return
	}
	c.sink.Report(c.clusterKey(), mesh.Input{Clusters: []*mesh.Cluster{{ID: c.id, TrustDomain: c.src.cfg.TrustDomain, Network: c.network, Managed: true, PodRanges: c.ranges.list}}})
}

func (c *cluster) clusterKey() string { return string(c.id) + "/cluster" }

// options are what objects mean something by. The caller holds mu.
func (c *cluster) options(obj any) config.Options {
	o := config.Options{
		Domain: c.src.cfg.Domain, Namespaces: c.namespaces, RootNamespace: c.src.cfg.Namespace, TrustDomain: c.src.cfg.TrustDomain,
		Local: c.id, Remote: c.remote, Network: c.network, ByLabel: true,
	}
	switch x := obj.(type) {
	case *corev1.Service:
		if behindNodes(x) {
			o.Nodes = c.allNodes()
		}
	case *corev1.ConfigMap:
		o.External = c.src.external()
	default:
		o.Nodes = nil
	}
	return o
}

// behindNodes reports whether a Service is a gateway that is reached at the nodes.
func behindNodes(s *corev1.Service) bool {
	return s.Spec.Type == corev1.ServiceTypeNodePort && s.Labels[labelNetwork] != ""
}

const labelNetwork = "topology.istio.io/network"

func (c *cluster) allNodes() map[string]config.Node {
	out := make(map[string]config.Node, len(c.nodes))
	for name, n := range c.nodes {
		out[name] = *n
	}
	return out
}

// changed takes note of an object that others depend on, and has them reported anew. Either of the two is nil for an
// object that is new or gone. The caller holds mu.
func (c *cluster) changed(t *table, before, after *cut) {
	switch t.name {
	case kindNamespace:
		c.namespaceChanged(before, after)
	case kindNode:
		c.nodeChanged(before, after)
	case kindPod:
		c.podChanged(after)
	case kindService:
		c.serviceChanged(before, after)
	case kindSecret:
		c.src.remotes.poke()
	}
}

// said that matter of a namespace.
var namespaceLabels = []string{"isthmus.io/export"}

func (c *cluster) namespaceChanged(before, after *cut) {
	name, labels := namespaceOf(before, after)
	old := c.namespaces[name]
	if labels == nil {
		delete(c.namespaces, name)
	} else {
		c.namespaces[name] = labels
	}
	if name == c.src.cfg.Namespace {
		if n := mesh.NetworkID(labels[labelNetwork]); n != c.network {
			c.network = n
			c.introduce()
			c.again(func(t *table, e *entry) bool { return t.name == kindPod })
		}
	}
	for _, l := range namespaceLabels {
		if old[l] != labels[l] {
			c.again(func(t *table, e *entry) bool { return t.relabel && strings.HasPrefix(e.key, name+"/") })
			return
		}
	}
}

func namespaceOf(before, after *cut) (string, map[string]string) {
	if after == nil {
		return before.kept.(*corev1.Namespace).Name, nil
	}
	ns := after.kept.(*corev1.Namespace)
	if ns.Labels == nil {
		return ns.Name, map[string]string{}
	}
	return ns.Name, ns.Labels
}

func (c *cluster) nodeChanged(before, after *cut) {
	var name string
	var was, is config.Node
	if before != nil {
		name, was = strings.TrimPrefix(before.key, "/"), *before.kept.(*config.Node)
	}
	if after != nil {
		name, is = strings.TrimPrefix(after.key, "/"), *after.kept.(*config.Node)
		c.nodes[name] = after.kept.(*config.Node)
	} else {
		delete(c.nodes, name)
	}
	if !slices.Equal(was.PodRanges, is.PodRanges) {
		c.countRanges()
	}
	moved := was.Locality != is.Locality
	dialled := moved || !reflect.DeepEqual(was, is)
	c.again(func(t *table, e *entry) bool {
		if t.name == kindPod {
			return moved && e.node == name
		}
		s, ok := e.kept.(*corev1.Service)
		return ok && dialled && behindNodes(s)
	})
}

// serviceChanged keeps the addresses by which a Service may be named as the gateway of a network.
func (c *cluster) serviceChanged(before, after *cut) {
	var host string
	var addresses []string
	for _, x := range []*cut{before, after} {
		if x != nil {
			s := x.kept.(*corev1.Service)
			host, addresses = mesh.LocalHost(s.Name, s.Namespace), nil
			if x == after {
				addresses = config.ExternalAddresses(s)
			}
		}
	}
	if slices.Equal(c.external[host], addresses) {
		return
	}
	if len(addresses) == 0 {
		delete(c.external, host)
	} else {
		c.external[host] = addresses
	}
	c.src.externalChanged(c)
}

// again has objects reported anew. The caller holds mu.
func (c *cluster) again(which func(*table, *entry) bool) {
	if !c.live {
		return
	}
	for _, t := range c.tables {
		for _, e := range t.entries {
			if which(t, e) {
				t.report(e)
			}
		}
	}
}

// set notes how a kind fares. The caller holds mu.
func (c *cluster) set(t *table, state, verb string, err error) {
	if t.state != state {
		t.state, t.since = state, time.Now()
		t.verb, t.err = verb, err
	} else if state != StateForbidden { // of several verbs the first is named, so that what is said stays the same
		t.verb, t.err = verb, err
	}
	c.begin()
	c.complaints()
}

// begin reports all objects once every kind is known. The caller holds mu.
func (c *cluster) begin() {
	if c.live || c.copy.loading {
		return
	}
	if c.connect.IsZero() && !c.alone() {
		return
	}
	for _, t := range c.tables {
		if t.state == StateSyncing && time.Since(c.connect) < firstList && !c.connect.IsZero() {
			return
		}
	}
	c.restore()
	for _, first := range []string{kindNamespace, kindNode, kindPod, kindService} { // others depend on these
		for _, t := range c.tables {
			if t.name == first && t.group == "" {
				for _, key := range slices.Sorted(maps.Keys(t.entries)) {
					c.changed(t, nil, t.entries[key].cut)
				}
			}
		}
	}
	c.live = true
	c.introduce() // first: whoever hears of a pod asks on which network it is
	for _, t := range c.tables {
		for _, e := range t.entries {
			t.report(e)
		}
	}
	c.src.metrics.objects(c)
	if !c.remote {
		c.src.remotes.poke()
	}
}

func (c *cluster) status() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := State{Cluster: c.id, Remote: c.remote, Connected: c.up, Since: c.since}
	if c.conn != nil {
		out.Server = c.conn.server
	}
	if !c.up && c.why != nil {
		out.Error = plain(c.why)
	}
	for _, t := range c.tables {
		k := KindState{Kind: t.fullName(), Version: t.version, Objects: len(t.entries), State: t.state}
		if p, wrong := t.problem(); wrong {
			k.Message, k.Remedy = p.Message, p.Remedy
		}
		out.Kinds = append(out.Kinds, k)
	}
	return out
}
