package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// table holds the objects of one kind of one cluster, reduced, and has what they say reported. It is what a reflector
// fills: cache.ReflectorStore and cache.TransformingStore. Its mutable part is guarded by the cluster's mu.
type table struct {
	*kind
	c *cluster

	entries map[string]*entry

	// What status says.
	state   string
	version string // served and read
	verb    string // that failed
	err     error
	since   time.Time
}

// entry is one object.
type entry struct {
	*cut
	in       mesh.Input // as reported, without Problems
	problems []mesh.Problem
	reported bool
}

// Transformer implements cache.TransformingStore: objects of a first list are reduced one by one.
func (t *table) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) { return t.c.cut(obj) }
}

// Add implements cache.ReflectorStore.
func (t *table) Add(obj any) error { return t.Update(obj) }

// Update implements cache.ReflectorStore.
func (t *table) Update(obj any) error {
	x, err := t.c.cut(obj)
	if err != nil {
		return err
	}
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.put(x)
	return nil
}

// Delete implements cache.ReflectorStore.
func (t *table) Delete(obj any) error {
	x, err := t.c.cut(obj)
	if err != nil {
		return err
	}
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.remove(x.key)
	return nil
}

// Replace implements cache.ReflectorStore: what is not in the list is gone, the rest stays or changes.
func (t *table) Replace(list []any, _ string) error {
	seen := make(map[string]bool, len(list))
	cuts := make([]*cut, 0, len(list))
	var errs []error
	for _, obj := range list {
		x, err := t.c.cut(obj)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		seen[x.key], cuts = true, append(cuts, x)
	}
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	for _, x := range cuts {
		t.put(x)
	}
	for key := range t.entries {
		if !seen[key] {
			t.remove(key)
		}
	}
	t.c.set(t, StateSynced, "", nil)
	return errors.Join(errs...)
}

// Resync implements cache.ReflectorStore.
func (t *table) Resync() error { return nil }

// clear forgets all objects: the kind is gone.
func (t *table) clear() {
	for key := range t.entries {
		t.remove(key)
	}
}

func (t *table) put(x *cut) {
	e := t.entries[x.key]
	if e != nil && e.equal(x) {
		return
	}
	if e == nil {
		e = &entry{}
		t.entries[x.key] = e
	}
	before := e.cut
	e.cut = x
	t.c.copy.revision++
	if t.c.live {
		t.c.changed(t, before, x)
		t.report(e)
	}
}

func (t *table) remove(key string) {
	e := t.entries[key]
	if e == nil {
		return
	}
	delete(t.entries, key)
	t.c.copy.revision++
	if e.reported {
		t.c.sink.Forget(t.keyOf(e))
	}
	if t.c.live {
		t.c.changed(t, e.cut, nil)
	}
}

// keyOf is the key under which an object is reported.
func (t *table) keyOf(e *entry) string {
	return string(t.c.id) + "/" + t.fullName() + "/" + e.key
}

// report tells the sink what an object says, if it says anything.
func (t *table) report(e *entry) {
	in, problems, told := t.decode(e)
	if !told {
		return
	}
	in, problems = keepValid(in, e.in, problems)
	e.in, e.problems = in, problems
	out := in.Clone()
	out.Problems = problems
	switch {
	case !in.Empty() || len(problems) > 0:
		e.reported = true
		t.c.sink.Report(t.keyOf(e), out)
	case e.reported:
		e.reported = false
		t.c.sink.Forget(t.keyOf(e))
	}
}

// keepValid returns what an object says now, and what it said before of the parts that an edit broke: an API server has
// no memory of what was valid. It marks the problems of these parts.
func keepValid(now, before mesh.Input, problems []mesh.Problem) (mesh.Input, []mesh.Problem) {
	mark := func(about func(field string) bool) {
		for i, p := range problems {
			if about(p.Field) {
				problems[i].Message += "; what was valid before stays in use until a restart"
			}
		}
	}
	if now.Sound().Empty() && !before.Sound().Empty() && len(problems) > 0 {
		problems = slices.DeleteFunc(problems, func(p mesh.Problem) bool { return p.Reason == written.ReasonClosed })
		mark(func(string) bool { return true })
		return before, problems
	}
	part := func(key string) func(string) bool {
		return func(field string) bool { return field == key || strings.HasPrefix(field, key+".") }
	}
	broken := func(about func(string) bool) bool {
		return slices.ContainsFunc(problems, func(p mesh.Problem) bool { return about(p.Field) })
	}
	if about := part("data.mesh"); len(now.MeshConfigs) == 0 && len(before.MeshConfigs) > 0 && broken(about) {
		mark(about)
		now.MeshConfigs = before.MeshConfigs
	}
	if about := part("data.meshNetworks"); len(now.Networks) == 0 && len(before.Networks) > 0 && broken(about) {
		mark(about)
		now.Networks = before.Networks
	}
	return now, problems
}

// decode says what an object means where it stands; told is false for kinds that say nothing by themselves.
func (t *table) decode(e *entry) (in mesh.Input, problems []mesh.Problem, told bool) {
	switch x := e.kept.(type) {
	case *placeless:
		if x.workload != nil {
			w, node, network := x.workload, config.Node{}, t.c.network
			if n := t.c.nodes[e.node]; n != nil {
				node = *n
			}
			placed := *w
			config.Place(&placed, node, network)
			if placed.Locality != w.Locality || placed.Network != w.Network {
				w = &placed
			}
			in.Workloads = []*mesh.Workload{w}
		}
		return in, append([]mesh.Problem{}, x.problems...), true
	case nil: // a Secret that is none of ours, or is no more
		return in, nil, t.name == kindCredential
	case *credential:
		in, problems = config.DecodeObject(t.c.said, x.Secret, t.c.options(x.Secret))
		return in, problems, true
	case *corev1.Namespace, *corev1.Service, *discoveryv1.EndpointSlice, *corev1.ConfigMap, json.RawMessage:
		in, problems = config.DecodeObject(t.c.said, x, t.c.options(x))
		return in, problems, true
	}
	return in, nil, false
}

func (t *table) String() string { return fmt.Sprintf("%s of cluster %s", t.fullName(), t.c.id) }
