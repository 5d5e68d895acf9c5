package views

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/patch"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// What Envoy thinks of a patch, only Envoy knows. When it refuses a resource that EnvoyFilters have changed, and there are
// several, all of them are left out and put back one after the other: one that is refused stays out until it is changed,
// the others stay in. One Envoy's word counts for those that are served the same, and for no others.

// verdictTime is how long a filter that was put back waits for Envoy's answer; without one it stays in.
const verdictTime = 5 * time.Second

// maxVerdicts bounds the answers that wait to be looked at; more are dropped, for Envoy repeats a refusal when asked again.
const maxVerdicts = 1024

// resourceKey names a resource as clients know it.
type resourceKey struct{ typ, name string }

// touched are the EnvoyFilters whose patches are in a resource.
type touched map[resourceKey][]*mesh.EnvoyFilter

var typesOf = map[patch.Kind]string{
	patch.Cluster: xds.ClusterType, patch.Listener: xds.ListenerType, patch.Route: xds.RouteType,
	patch.Extension: "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
}

func touchedBy(r patch.Result) touched {
	out := touched{}
	for x, filters := range r.Touched {
		out[resourceKey{typesOf[x.Kind], x.Name}] = filters
	}
	return out
}

// verdict is what one client said to what it was sent.
type verdict struct {
	view     *view
	typ      string
	versions map[string]string // by name
	refusal  *string           // nil: it took all
}

// verdicts hold answers until there is time for them.
type verdicts struct {
	arrived chan struct{} // holds one

	mu     sync.Mutex
	list   []verdict
	trying map[*view]bool // whose acceptance matters, too
}

// Answered implements xds.Judge.
func (v *view) Answered(typ string, sent []*xds.Resource, refusal *string) {
	if v.node == nil {
		return
	}
	q := v.said
	q.mu.Lock()
	defer q.mu.Unlock()
	if refusal == nil && !q.trying[v] || len(q.list) >= maxVerdicts {
		return
	}
	versions := make(map[string]string, len(sent))
	for _, r := range sent {
		versions[r.Name] = r.Version
	}
	q.list = append(q.list, verdict{v, typ, versions, refusal})
	q.notify()
}

func (q *verdicts) notify() {
	select {
	case q.arrived <- struct{}{}:
	default:
	}
}

// filterID names an EnvoyFilter as it is written now: changed, it is another.
type filterID struct{ namespace, name, content string }

func idOfFilter(f *mesh.EnvoyFilter) filterID {
	b, _ := proto.MarshalOptions{Deterministic: true}.Marshal(f.Spec) // what was decoded can be encoded
	sum := sha256.Sum256(b)
	return filterID{f.Object.Namespace, f.Object.Name, hex.EncodeToString(sum[:8])}
}

// trial is what is known of the EnvoyFilters of one scope.
type trial struct {
	refused map[filterID]string    // with Envoy's words
	waiting []filterID             // left out until their turn comes
	testing *filterID              // put back last
	judge   *view                  // whose answer is waited for
	open    map[resourceKey]string // resources with the tested filter that the judge has not answered, and their versions
	until   time.Time
}

func (vs *Views) trialOf(p *mesh.Proxy) *trial { return vs.trials[vs.key(p)] }

// skip reports whether a filter is left out. A nil trial leaves none out.
func (t *trial) skip(f *mesh.EnvoyFilter) bool {
	if t == nil || len(t.refused)+len(t.waiting) == 0 {
		return false
	}
	id := idOfFilter(f)
	_, refused := t.refused[id]
	return refused || slices.Contains(t.waiting, id)
}

func (t *trial) problems(snap *mesh.Snapshot) (out []mesh.Problem) {
	for _, f := range snap.EnvoyFilters {
		if text, ok := t.refused[idOfFilter(f)]; ok {
			out = append(out, mesh.Problem{
				Object: f.Object, Field: "spec.configPatches", Reason: "RefusedByEnvoy", Message: "Envoy says: " + text + "; the filter is left out",
				Remedy: "correct the patch",
			})
		}
	}
	return out
}

// judge looks at the answers that have come. The caller holds mu.
func (vs *Views) judge() {
	vs.verdicts.mu.Lock()
	list := vs.verdicts.list
	vs.verdicts.list = nil
	vs.verdicts.mu.Unlock()
	for _, x := range list {
		if x.view.users > 0 && vs.of != nil {
			vs.hear(x)
		}
	}
	now := time.Now()
	for key, t := range vs.trials {
		if t.testing != nil && !now.Before(t.until) {
			vs.proceed(key, t)
		}
	}
}

func (vs *Views) hear(x verdict) {
	key := vs.keyOf(x.view)
	t := vs.trials[key]
	if x.refusal == nil {
		if t == nil || t.judge != x.view || t.testing == nil {
			return
		}
		for name, version := range x.versions {
			if k := (resourceKey{x.typ, name}); t.open[k] == version {
				delete(t.open, k)
			}
		}
		if len(t.open) == 0 {
			vs.proceed(key, t)
		}
		return
	}
	culprits := x.culprits(vs.scopes[key])
	if len(culprits) == 0 {
		return // of an older version, or not a patch's fault
	}
	if t == nil {
		t = &trial{refused: map[filterID]string{}}
		vs.trials[key] = t
	}
	text := oneLine(*x.refusal)
	switch {
	case t.testing != nil && slices.Contains(culprits, *t.testing):
		t.refused[*t.testing] = text
	case len(culprits) == 1:
		t.refused[culprits[0]] = text
	default:
		for _, id := range culprits {
			if !slices.Contains(t.waiting, id) {
				t.waiting = append(t.waiting, id)
			}
		}
	}
	t.judge = x.view
	vs.log.Warn("envoy refused what EnvoyFilters changed", "part", "views", "node", x.view.proxy.ID, "filters", len(culprits), "err", text)
	vs.proceed(key, t)
}

// culprits returns the filters that may be at fault: those in resources that are still served as they were refused, and
// if the refusal names any of these, in those.
func (x verdict) culprits(s *scope) []filterID {
	collect := func(named bool) (out []filterID) {
		for name, version := range x.versions {
			r := x.view.set[x.typ].Get(name)
			if r == nil || r.Version != version || named && !strings.Contains(*x.refusal, name) {
				continue
			}
			for _, f := range x.view.touchedIn(s, resourceKey{x.typ, name}) {
				if id := idOfFilter(f); !slices.Contains(out, id) {
					out = append(out, id)
				}
			}
		}
		slices.SortFunc(out, func(a, b filterID) int {
			return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
		})
		return out
	}
	if named := collect(true); len(named) > 0 {
		return named
	}
	return collect(false)
}

// touchedIn returns the filters in a resource as the view has it: its own lies over the scope's.
func (v *view) touchedIn(s *scope, k resourceKey) []*mesh.EnvoyFilter {
	if v.own != nil && v.own.set[k.typ].Get(k.name) != nil {
		return v.own.touched[k]
	}
	if s == nil {
		return nil
	}
	return s.touched[k]
}

// proceed puts the next filter back and serves what comes of it.
func (vs *Views) proceed(key string, t *trial) {
	t.testing, t.open = nil, map[resourceKey]string{}
	if len(t.waiting) > 0 {
		t.testing, t.waiting = &t.waiting[0], slices.Clone(t.waiting[1:])
		t.until = time.Now().Add(verdictTime)
		time.AfterFunc(verdictTime, vs.verdicts.notify)
	}
	vs.verdicts.mu.Lock()
	vs.verdicts.trying = map[*view]bool{}
	for _, other := range vs.trials {
		if other.testing != nil {
			vs.verdicts.trying[other.judge] = true
		}
	}
	vs.verdicts.mu.Unlock()
	vs.serveAnew(key)
	if t.testing == nil {
		return
	}
	for k, version := range t.judge.with(*t.testing, vs.scopes[key]) {
		t.open[k] = version
	}
}

// with returns the resources of the view that have patches of the filter, and their versions.
func (v *view) with(id filterID, s *scope) map[resourceKey]string {
	out := map[resourceKey]string{}
	all := touched{}
	if s != nil {
		maps.Copy(all, s.touched)
	}
	if v.own != nil {
		maps.Copy(all, v.own.touched)
	}
	for k := range all {
		r := v.set[k.typ].Get(k.name)
		if r != nil && slices.ContainsFunc(v.touchedIn(s, k), func(f *mesh.EnvoyFilter) bool { return idOfFilter(f) == id }) {
			out[k] = r.Version
		}
	}
	return out
}

// serveAnew translates one scope once more and publishes it.
func (vs *Views) serveAnew(key string) {
	c := change{to: vs.of}
	done := false
	for _, v := range vs.views {
		if vs.keyOf(v) != key {
			continue
		}
		if !done {
			vs.scopes[key], done = vs.refresh(vs.scopes[key], common(v.proxy), c), true
		}
		v.follow(vs.scopes[key], vs.overlayOf(v, c))
	}
}

// abandon ends the trial that waits for a client that is gone: what is still out is put back, and judged by others.
func (vs *Views) abandon(v *view) {
	for key, t := range vs.trials {
		if t.judge != v || t.testing == nil {
			continue
		}
		t.waiting, t.judge = nil, nil
		vs.proceed(key, t)
	}
}

// oneLine is Envoy's text without line breaks, cut at 500 bytes.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 500 {
		s = strings.ToValidUTF8(s[:500], "") + "..."
	}
	return s
}
