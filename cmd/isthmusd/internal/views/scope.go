package views

import (
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/cmd/internal/served"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/translate/patch"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// change is how a snapshot differs from the one before.
type change struct {
	from, to      *mesh.Snapshot
	pairs         [][2]*mesh.Service // services that differ, old and new
	endpointsOnly bool               // nothing but those, and none came or went
}

// scope is what equal proxies are served. It is not changed after it was made.
type scope struct {
	id       uint64 // equal ids, equal sets
	of       *mesh.Snapshot
	set      xds.Set
	problems []mesh.Problem
	touched  touched // by EnvoyFilters
}

// refresh makes the scope of p for the change's newest snapshot out of the scope before, which may be nil.
func (vs *Views) refresh(old *scope, p *mesh.Proxy, c change) *scope {
	started := time.Now()
	if old != nil && old.set != nil && old.of == c.from && c.endpointsOnly {
		if s := vs.endpoints(old, p, c); s != nil {
			vs.duration.WithLabelValues("endpoints").Observe(time.Since(started).Seconds())
			return s
		}
	}
	set, touched, problems, err := vs.resources(c.to, p, vs.trialOf(p).skip)
	if err != nil {
		// One scope that cannot be encoded keeps what it has; the others go on.
		vs.log.Error("translation not served", "part", "views", "revision", c.to.Revision, "err", err)
		if old == nil {
			return &scope{of: c.to}
		}
		return &scope{id: old.id, set: old.set, problems: old.problems, touched: old.touched}
	}
	maps.Copy(set, vs.namesFor(p, c.to))
	s := &scope{of: c.to, set: set, problems: problems, touched: touched}
	if old == nil {
		s.id = vs.next()
	} else {
		s.set = s.set.Sharing(old.set)
		s.id = vs.idOf(s.set, old)
	}
	vs.duration.WithLabelValues("full").Observe(time.Since(started).Seconds())
	return s
}

// endpoints is the short path: the scope before, with other assignments of the services that changed. It returns nil when that does not do.
func (vs *Views) endpoints(old *scope, p *mesh.Proxy, c change) *scope {
	s := &scope{of: c.to, problems: old.problems, touched: old.touched, set: maps.Clone(old.set)}
	if p != nil {
		assignments, ok := translate.Endpoints(c.from, c.to, p, c.pairs)
		if !ok {
			return nil
		}
		named := old.set[xds.EndpointType]
		var changed []*xds.Resource
		for _, a := range assignments {
			r := xds.NewResource(a.ClusterName, a)
			if r == nil {
				return nil
			}
			if have := named.Get(r.Name); have == nil || have.Version != r.Version {
				changed = append(changed, vs.encoded.one(r))
			}
		}
		if len(changed) > 0 {
			s.set[xds.EndpointType] = named.With(changed...)
		}
	}
	maps.Copy(s.set, vs.namesFor(p, c.to))
	s.id = vs.idOf(s.set, old)
	return s
}

// overlay is what a sidecar has for itself alone, over its scope.
type overlay struct {
	services []*mesh.Service // of its workload
	set      xds.Set
	touched  touched
}

// overlayOf returns the view's overlay for the change's newest snapshot: the one it has, if that is still right.
func (vs *Views) overlayOf(v *view, c change) *overlay {
	if v.proxy == nil || v.proxy.Type != mesh.Sidecar {
		return nil
	}
	services := vs.owned[workloadOf(v.proxy)]
	if len(services) == 0 {
		return nil
	}
	if v.own != nil && c.endpointsOnly && slices.Equal(v.own.services, services) {
		return v.own
	}
	r := patch.Apply(c.to, v.proxy, translate.Own(c.to, v.proxy, services), vs.trialOf(v.proxy).skip)
	set, err := vs.encode(r.Resources)
	if err != nil {
		vs.log.Error("translation not served", "part", "views", "node", v.proxy.ID, "revision", c.to.Revision, "err", err)
		return v.own
	}
	o := &overlay{services: services, set: set, touched: touchedBy(r)}
	if v.own != nil {
		if o.set = set.Sharing(v.own.set); sameMaps(o.set, v.own.set) {
			v.own.services, v.own.touched = services, o.touched
			return v.own
		}
	}
	return o
}

// merge lays own over base. A type whose two parts are those of the set that v has keeps v's.
func merge(base xds.Set, own *overlay, v *view) xds.Set {
	if own == nil {
		return base
	}
	set := maps.Clone(base)
	for typ, named := range own.set {
		if v.own != nil && base[typ] == v.base[typ] && named == v.own.set[typ] {
			set[typ] = v.set[typ]
			continue
		}
		set[typ] = base[typ].With(slices.Collect(named.All())...)
	}
	return set
}

func sameMaps(a, b xds.Set) bool { return maps.Equal(a, b) }

// idOf returns the id of the scope before if the set is the same, maps included, else a new one.
func (vs *Views) idOf(set xds.Set, old *scope) uint64 {
	if sameMaps(set, old.set) {
		return old.id
	}
	return vs.next()
}

func (vs *Views) next() uint64 {
	vs.made++
	return vs.made
}

type resourceID struct{ typ, name, version string }

// pool makes equal resources of several scopes one.
type pool map[resourceID]*xds.Resource

func (p pool) one(r *xds.Resource) *xds.Resource {
	id := resourceID{r.Body.GetTypeUrl(), r.Name, r.Version}
	if same := p[id]; same != nil {
		return same
	}
	p[id] = r
	return r
}

// sweep forgets what no scope serves, when that may be half of all there is.
func (p pool) sweep(scopes map[string]*scope) {
	total := 0
	for _, s := range scopes {
		for _, named := range s.set {
			total += named.Len()
		}
	}
	if len(p) <= 2*total+1024 {
		return
	}
	clear(p)
	for _, s := range scopes {
		for typ, named := range s.set {
			for r := range named.All() {
				p[resourceID{typ, r.Name, r.Version}] = r
			}
		}
	}
}

// resources translates for one proxy; nil is a DNS server. Where EnvoyFilters may change what comes out nothing is remembered.
func (vs *Views) resources(snap *mesh.Snapshot, p *mesh.Proxy, skip func(*mesh.EnvoyFilter) bool) (xds.Set, touched, []mesh.Problem, error) {
	if p == nil {
		return xds.Set{}, nil, nil, nil
	}
	m := &vs.parts
	if len(patch.For(snap, p)) > 0 {
		m = nil
	}
	r := served.Again(m, snap, p, skip)
	set, err := vs.encode(r.Resources)
	return set, touchedBy(r), r.Problems, err
}

// pack encodes what the memo of translations keeps.
func (vs *Views) pack(m proto.Message) any {
	r, err := xds.EncodeOne(m)
	if err != nil {
		return err
	}
	return vs.encoded.one(r)
}

func (vs *Views) encode(r translate.Resources) (xds.Set, error) {
	list, taken := make([]*xds.Resource, 0, len(r.Packed)), map[resourceKey]bool{}
	add := func(x *xds.Resource) {
		if k := (resourceKey{x.Body.GetTypeUrl(), x.Name}); !taken[k] {
			taken[k] = true
			list = append(list, x)
		}
	}
	for _, x := range r.Packed {
		if err, failed := x.(error); failed {
			return nil, err
		}
		add(x.(*xds.Resource))
	}
	own, err := xds.Encode(messages(r)...)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		for typ, named := range own {
			own[typ] = named.Map(vs.encoded.one)
		}
		return own, nil
	}
	for _, named := range own {
		for x := range named.All() {
			add(vs.encoded.one(x))
		}
	}
	return xds.SetOf(list...)
}

func messages(r translate.Resources) (out []proto.Message) {
	for _, x := range r.Clusters {
		out = append(out, x)
	}
	for _, x := range r.Endpoints {
		out = append(out, x)
	}
	for _, x := range r.Listeners {
		out = append(out, x)
	}
	for _, x := range r.Routes {
		out = append(out, x)
	}
	for _, x := range r.Secrets {
		out = append(out, x)
	}
	for _, x := range r.Extensions {
		out = append(out, x)
	}
	return out
}
