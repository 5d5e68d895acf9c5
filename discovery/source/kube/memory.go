package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube/signers"
)

// Memory has the objects of clusters as an earlier process read them.
type Memory interface {
	// Load returns what is remembered of the cluster at that server, and when it was current; nothing where there is none.
	Load(id mesh.ClusterID, server string) ([]Object, time.Time)
}

// Object is one object as it is remembered: reduced to what is kept of it.
type Object struct {
	Kind string          `json:"kind"`
	Key  string          `json:"key"`
	Node string          `json:"node,omitempty"`
	Body json.RawMessage `json:"body,omitempty"`
	// Secret: it holds a private key or a password.
	Secret bool `json:"-"`
}

// Known is what is known of one cluster.
type Known struct {
	Cluster mesh.ClusterID
	Server  string
	// Complete: all that can be read has been. Before, the rest says nothing.
	Complete bool
	// Revision differs when the objects do.
	Revision uint64
	// At is when this was current.
	At time.Time
	// Objects gives all of them.
	Objects func() iter.Seq2[Object, error]
}

// Known returns what is known of every cluster that is read. complete is false before it is known which these are.
func (s *Source) Known() (out []Known, complete bool) {
	out = append(out, s.local.known())
	for _, c := range s.remotes.clusters() {
		out = append(out, c.known())
	}
	s.remotes.mu.Lock()
	defer s.remotes.mu.Unlock()
	return out, s.remotes.applied
}

// lonely is how long an API server may be silent at the start before what is remembered of it is used. What it says
// itself is newer: addresses that are gone since would do harm.
const lonely = lostAfter

// memory is what is remembered of a cluster. The cluster's mu guards it.
type memory struct {
	loading  bool
	objects  []Object // until they are used, or not needed any more
	from, at time.Time
	revision uint64
	asked    time.Time // since when the server is asked
	signers  *signers.Set
	looked   time.Time // when it was asked who signs
}

// recall loads what is remembered.
func (c *cluster) recall(server string) {
	objects, at := c.src.cfg.Memory.Load(c.id, server)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.copy.loading, c.copy.objects, c.copy.from, c.copy.asked = false, objects, at, time.Now()
	c.begin()
}

// alone reports whether the server is away, and something is remembered of it. The caller holds mu.
func (c *cluster) alone() bool {
	return len(c.copy.objects) > 0 && !c.up && c.why != nil && !isUnauthorized(c.why) && time.Since(c.copy.asked) >= lonely
}

// restore fills the tables that could not be listed with what is remembered. The lists replace it when they come: what
// is gone since goes then, and not before. The caller holds mu.
func (c *cluster) restore() {
	objects := c.copy.objects
	c.copy.objects = nil
	empty := map[string]*table{}
	for _, t := range c.tables {
		if t.state != StateSynced && t.state != StateAbsent && len(t.entries) == 0 {
			empty[t.fullName()] = t
		}
	}
	n := 0
	for _, o := range objects {
		if o.Kind == kindSigners {
			c.rememberSigners(o)
			continue
		}
		t := empty[o.Kind]
		if t == nil {
			continue
		}
		x, err := t.thaw(o)
		if err != nil {
			c.log.Warn("an object that was kept is not used", "err", fmt.Errorf("%s %s: %w", o.Kind, o.Key, err))
			continue
		}
		t.put(x)
		n++
	}
	if c.connect.IsZero() {
		c.copy.at = c.copy.from
	}
	if n > 0 {
		c.log.Warn("objects that could not be read are as they were last known", "objects", n, "at", c.copy.from)
	}
}

// sync says Synced once the local cluster has been reported, and the remote ones that answer or are remembered: a start
// takes nothing away. It waits no longer than for the kinds of one cluster.
func (r *remotes) sync(ctx context.Context) {
	c := r.src.local
	c.mu.Lock()
	live := c.live
	c.mu.Unlock()
	if !live || r.synced {
		return
	}
	r.synced = true
	r.wg.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, firstList)
		defer cancel()
		for _, x := range r.clusters() {
			for x.pending() && ctx.Err() == nil {
				pause(ctx, 20*time.Millisecond)
			}
		}
		r.src.cfg.Sink.Synced()
	})
}

// pending reports whether the cluster may be reported soon.
func (c *cluster) pending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.live && (c.copy.loading || c.why == nil || len(c.copy.objects) > 0 && !isUnauthorized(c.why))
}

// known is what is known of the cluster.
func (c *cluster) known() Known {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := Known{Cluster: c.id, Complete: c.live, Revision: c.copy.revision, At: time.Now()}
	if c.conn != nil {
		out.Server = c.conn.server
	}
	switch {
	case c.up:
	case c.connect.IsZero() && !c.copy.at.IsZero():
		out.At = c.copy.at
	case !c.since.IsZero():
		out.At = c.since
	}
	out.Objects = func() iter.Seq2[Object, error] { return c.objects() }
	return out
}

// objects gives what the tables hold.
func (c *cluster) objects() iter.Seq2[Object, error] {
	type row struct {
		t *table
		x *cut
	}
	var rows []row
	c.mu.Lock()
	for _, t := range c.tables {
		for _, e := range t.entries {
			rows = append(rows, row{t, e.cut}) // a cut is never written
		}
	}
	set := c.copy.signers
	c.mu.Unlock()
	return func(yield func(Object, error) bool) {
		if set != nil {
			body, err := json.Marshal(set)
			if !yield(Object{Kind: kindSigners, Body: body}, err) {
				return
			}
		}
		for _, r := range rows {
			o, err := r.t.freeze(r.x)
			if !yield(o, err) {
				return
			}
		}
	}
}

// pod is a Pod as it is remembered.
type pod struct {
	Workload *mesh.Workload `json:"workload,omitempty"`
	Problems []mesh.Problem `json:"problems,omitempty"`
}

// freeze gives an object the form in which it is remembered.
func (t *table) freeze(x *cut) (o Object, err error) {
	o = Object{Kind: t.fullName(), Key: x.key, Node: x.node, Secret: t.name == kindSecret || t.name == kindCredential}
	body := x.kept
	switch k := body.(type) {
	case nil:
		return o, nil
	case *placeless:
		body = pod{k.workload, k.problems}
	case *credential:
		body = k.Secret
	}
	if o.Body, err = json.Marshal(body); err != nil {
		err = fmt.Errorf("keep %s %s: %w", o.Kind, o.Key, err)
	}
	return o, err
}

// thaw is the inverse of freeze.
func (t *table) thaw(o Object) (*cut, error) {
	x := &cut{key: o.Key, node: o.Node}
	if len(o.Body) == 0 {
		return x, nil
	}
	var into any
	switch {
	case t.typed == nil:
		x.kept = o.Body
		return x, nil
	case t.name == kindPod:
		p := &pod{}
		err := json.Unmarshal(o.Body, p)
		x.kept = &placeless{p.Workload, p.Problems}
		return x, err
	case t.name == kindCredential:
		s := &corev1.Secret{}
		x.kept, into = &credential{s}, s
	case t.name == kindNode:
		into = &config.Node{}
		x.kept = into
	default:
		into = t.typed()
		x.kept = into
	}
	return x, json.Unmarshal(o.Body, into)
}
