package store

import (
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store/lists"
)

// derive adds what the KubeObjects come to. Services are complete.
func (b *builder) derive(d *draft) {
	if b.cfg.Derive == nil {
		return
	}
	b.derived = b.cfg.Derive(d.Snapshot, b.declaredAs(d), b.derived)
	now := b.derived.Input
	for _, k := range carried {
		k.patch(d.Snapshot, []change{{now: now}})
	}
	d.routes = lists.Patched(d.routes, nil, now.VirtualServices, func(x, y *mesh.VirtualService) int { return compareObjects(&x.Object, &y.Object) })
	d.Statuses, d.Backends, d.Objects = b.derived.Statuses, b.derived.Backends, b.derived.Objects
}

func (b *builder) declaredAs(d *draft) func(string) *mesh.ServiceDecl {
	return func(host string) *mesh.ServiceDecl { return d.decl[host] }
}

// derive does so when what it is derived from has changed.
func (p *patch) derive() {
	b := p.b
	if b.cfg.Derive == nil || slices.Equal(p.snap.KubeObjects, b.prev.KubeObjects) && slices.Equal(p.snap.Credentials, b.prev.Credentials) {
		return
	}
	was := b.derived.Input
	b.derived = b.cfg.Derive(p.snap, b.declaredAs(b.draft), b.derived)
	for _, k := range carried {
		p.rules = k.patch(p.snap, []change{{was, b.derived.Input}}) || p.rules
	}
	p.snap.Statuses, p.snap.Backends, p.snap.Objects = b.derived.Statuses, b.derived.Backends, b.derived.Objects
}

// derivedProblems are those of what was derived.
func (b *builder) derivedProblems() []mesh.Problem {
	if b.derived == nil {
		return nil
	}
	return b.derived.Input.Problems
}
