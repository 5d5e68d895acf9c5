// Package delegate joins a VirtualService with those that it hands routes over to, as Istio does: one level deep, HTTP
// only, and only what both ask for is matched. It is pure.
package delegate

import (
	"cmp"
	"maps"
	"strings"

	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
)

// Ref names a delegate.
type Ref struct{ Namespace, Name string }

// Refs returns the delegates that the VirtualService names, in its order.
func Refs(vs *mesh.VirtualService) []Ref {
	var out []Ref
	for _, h := range vs.Spec.GetHttp() {
		if d := h.GetDelegate(); d != nil {
			out = append(out, refOf(vs, d))
		}
	}
	return out
}

func refOf(vs *mesh.VirtualService, d *networking.Delegate) Ref {
	return Ref{cmp.Or(d.GetNamespace(), vs.Object.Namespace), d.GetName()}
}

// Merge returns root with the rules of its delegates in place of the rules that name them. find returns a VirtualService
// or nil; exportTo is the mesh's default. A rule whose delegate cannot be used keeps it: such requests are answered
// with 503.
func Merge(root *mesh.VirtualService, find func(Ref) *mesh.VirtualService, exportTo []string) (*mesh.VirtualService, []mesh.Problem) {
	var problems []mesh.Problem
	out := &mesh.VirtualService{Object: root.Object, Spec: proto.CloneOf(root.Spec)}
	out.Spec.Http = nil
	for i, h := range root.Spec.GetHttp() {
		object, field := root.Rule(i)
		if h.GetDelegate() == nil {
			out.Spec.Http, out.Origins = append(out.Spec.Http, h), append(out.Origins, mesh.Origin{Object: object, Index: i})
			continue
		}
		d, why := usable(root, refOf(root, h.GetDelegate()), find, exportTo)
		if d == nil {
			problems = append(problems, mesh.Problem{Object: object, Field: field + ".delegate", Reason: "UnknownDelegate", Message: why, Remedy: "create it, or correct the name; until then such requests get 503"})
			out.Spec.Http, out.Origins = append(out.Spec.Http, h), append(out.Origins, mesh.Origin{Object: object, Index: i})
			continue
		}
		for j, x := range d.Spec.GetHttp() {
			merged, ok := mergeRoute(h, x)
			if !ok {
				_, at := d.Rule(j)
				problems = append(problems, mesh.Problem{Object: d.Object, Field: at + ".match", Reason: "ConflictingMatch", Message: "no request matches it and " + object.String() + " " + field + " at once; it is left out there",
					Remedy: "match within what the delegating rule matches, without regular expressions for the same part"})
				continue
			}
			out.Spec.Http, out.Origins = append(out.Spec.Http, merged), append(out.Origins, mesh.Origin{Object: d.Object, Index: j})
		}
	}
	return out, problems
}

// usable returns the delegate, or why it cannot be one.
func usable(root *mesh.VirtualService, ref Ref, find func(Ref) *mesh.VirtualService, exportTo []string) (*mesh.VirtualService, string) {
	d := find(ref)
	name := ref.Namespace + "/" + ref.Name
	switch {
	case d == nil:
		return nil, "there is no VirtualService " + name
	case len(d.Spec.GetHosts()) > 0:
		return nil, "VirtualService " + name + " has hosts of its own, which a delegate must not have"
	case !scope.Visible(d.Spec.GetExportTo(), exportTo, d.Object.Namespace, root.Object.Namespace):
		return nil, "VirtualService " + name + " is not exported to namespace " + root.Object.Namespace
	case len(Refs(d)) > 0:
		return nil, "VirtualService " + name + " delegates itself, which goes one level deep only"
	}
	return d, ""
}

// mergeRoute gives the delegate's rule what the delegating one says and it does not. ok is false when nothing matches both.
func mergeRoute(root, d *networking.HTTPRoute) (out *networking.HTTPRoute, ok bool) {
	out = proto.CloneOf(d)
	if out.Match = mergeMatches(root.GetMatch(), d.GetMatch()); len(out.Match) == 0 && len(root.GetMatch())+len(d.GetMatch()) > 0 {
		return nil, false
	}
	out.Name = joinNames(root.GetName(), d.GetName())
	inherit(&out.Rewrite, root.GetRewrite())
	inherit(&out.Timeout, root.GetTimeout())
	inherit(&out.Retries, root.GetRetries())
	inherit(&out.Fault, root.GetFault())
	inherit(&out.CorsPolicy, root.GetCorsPolicy())
	if out.Mirror == nil && len(out.Mirrors) == 0 {
		out.Mirror, out.MirrorPercentage, out.MirrorPercent, out.Mirrors = root.GetMirror(), root.GetMirrorPercentage(), root.GetMirrorPercent(), root.GetMirrors() //nolint:staticcheck // users still write the older field
	}
	if h := root.GetHeaders(); h != nil {
		if out.Headers == nil {
			out.Headers = &networking.Headers{}
		}
		out.Headers.Request = mergeHeaders(h.GetRequest(), out.Headers.GetRequest())
		out.Headers.Response = mergeHeaders(h.GetResponse(), out.Headers.GetResponse())
	}
	return out, true
}

func inherit[T any](own **T, root *T) {
	if *own == nil {
		*own = root
	}
}

func joinNames(root, d string) string {
	if root == "" || d == "" {
		return root + d
	}
	return root + "-" + d
}

// mergeHeaders does both; what both set is set as the delegate says.
func mergeHeaders(root, d *networking.Headers_HeaderOperations) *networking.Headers_HeaderOperations {
	if root == nil {
		return d
	}
	out := proto.CloneOf(root)
	for _, m := range []struct {
		to   *map[string]string
		from map[string]string
	}{{&out.Set, d.GetSet()}, {&out.Add, d.GetAdd()}} {
		if *m.to == nil {
			*m.to = map[string]string{}
		}
		maps.Copy(*m.to, m.from)
	}
	out.Remove = append(out.Remove, d.GetRemove()...)
	return out
}

// mergeMatches pairs each match of the root with each of the delegate.
func mergeMatches(root, d []*networking.HTTPMatchRequest) []*networking.HTTPMatchRequest {
	if len(root) == 0 {
		return d
	}
	if len(d) == 0 {
		return root
	}
	var out []*networking.HTTPMatchRequest
	for _, r := range root {
		for _, x := range d {
			if m, ok := mergeMatch(r, x); ok {
				out = append(out, m)
			}
		}
	}
	return out
}

func mergeMatch(root, d *networking.HTTPMatchRequest) (out *networking.HTTPMatchRequest, ok bool) {
	out = proto.CloneOf(d)
	ok = true
	text := func(own **networking.StringMatch, r *networking.StringMatch) {
		ok = ok && within(r, *own)
		inherit(own, r)
	}
	text(&out.Uri, root.GetUri())
	text(&out.Scheme, root.GetScheme())
	text(&out.Method, root.GetMethod())
	text(&out.Authority, root.GetAuthority())
	texts := func(own *map[string]*networking.StringMatch, r map[string]*networking.StringMatch) {
		for k, m := range r {
			if x, both := (*own)[k]; both {
				ok = ok && within(m, x)
				continue
			}
			if *own == nil {
				*own = map[string]*networking.StringMatch{}
			}
			(*own)[k] = m
		}
	}
	texts(&out.Headers, root.GetHeaders())
	texts(&out.WithoutHeaders, root.GetWithoutHeaders())
	texts(&out.QueryParams, root.GetQueryParams())
	for k, want := range root.GetSourceLabels() {
		if have, both := out.SourceLabels[k]; both && have != want {
			return nil, false
		}
		if out.SourceLabels == nil {
			out.SourceLabels = map[string]string{}
		}
		out.SourceLabels[k] = want
	}
	if root.GetPort() != 0 && out.GetPort() != 0 && root.GetPort() != out.GetPort() ||
		root.GetSourceNamespace() != "" && out.GetSourceNamespace() != "" && root.GetSourceNamespace() != out.GetSourceNamespace() {
		return nil, false
	}
	out.Port, out.SourceNamespace = cmp.Or(root.GetPort(), out.GetPort()), cmp.Or(root.GetSourceNamespace(), out.GetSourceNamespace())
	out.Gateways = root.GetGateways() // a delegate has none
	out.IgnoreUriCase = root.GetIgnoreUriCase() || out.GetIgnoreUriCase()
	out.StatPrefix, out.Name = cmp.Or(out.GetStatPrefix(), root.GetStatPrefix()), joinNames(root.GetName(), d.GetName())
	return out, ok
}

// within reports whether all that the delegate matches is matched by the root. Of expressions that is not known.
func within(root, d *networking.StringMatch) bool {
	if root.GetMatchType() == nil || d.GetMatchType() == nil {
		return true
	}
	switch r := root.GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		x, ok := d.GetMatchType().(*networking.StringMatch_Exact)
		return ok && x.Exact == r.Exact
	case *networking.StringMatch_Prefix:
		switch x := d.GetMatchType().(type) {
		case *networking.StringMatch_Exact:
			return strings.HasPrefix(x.Exact, r.Prefix)
		case *networking.StringMatch_Prefix:
			return strings.HasPrefix(x.Prefix, r.Prefix)
		}
	}
	return false
}
