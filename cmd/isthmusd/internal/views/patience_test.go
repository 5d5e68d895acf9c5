package views

import (
	"slices"
	"strings"
	"testing"
	"time"

	networking "istio.io/api/networking/v1"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func subsetRule(name, host string, subsets ...string) *mesh.DestinationRule {
	d := &mesh.DestinationRule{Object: mesh.ObjectRef{Kind: "DestinationRule", Namespace: "shop", Name: name}, Spec: &networking.DestinationRule{Host: host}}
	for _, s := range subsets {
		d.Spec.Subsets = append(d.Spec.Subsets, &networking.Subset{Name: s, Labels: map[string]string{"version": s}})
	}
	return d
}

func routeTo(name, host, subset string) *mesh.VirtualService {
	return &mesh.VirtualService{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "shop", Name: name}, Spec: &networking.VirtualService{Hosts: []string{host},
		Http: []*networking.HTTPRoute{{Route: []*networking.HTTPRouteDestination{{Destination: &networking.Destination{Host: host, Subset: subset}}}}}}}
}

// TestHolder goes through orders in which rules may come and go.
func TestHolder(t *testing.T) {
	a := mesh.LocalHost("svc-00000", "shop")
	toV1, toV2, both, one := routeTo("r", a, "v1"), routeTo("r", a, "v2"), subsetRule("d", a, "v1", "v2"), subsetRule("d", a, "v1")
	wild, nowhere := subsetRule("d", "*.shop.svc.cluster.local", "v1"), routeTo("r", "none.shop.svc.cluster.local", "")
	type step struct {
		after time.Duration // since the step before
		route *mesh.VirtualService
		rule  *mesh.DestinationRule
		// in effect
		wantRoute *mesh.VirtualService
		wantRule  *mesh.DestinationRule
		waits     bool
		wantPast  *mesh.DestinationRule // beside it
	}
	for name, steps := range map[string][]step{
		"the route first":          {{0, nil, nil, nil, nil, false, nil}, {0, toV1, nil, nil, nil, true, nil}, {1, toV1, one, toV1, one, false, nil}},
		"the rule goes first":      {{0, toV1, one, toV1, one, false, nil}, {0, toV1, nil, toV1, one, true, nil}, {1, nil, nil, nil, nil, false, nil}},
		"a subset goes first":      {{0, toV2, both, toV2, both, false, nil}, {0, toV2, one, toV2, one, true, both}, {1, toV1, one, toV1, one, false, nil}},
		"another route too early":  {{0, toV1, one, toV1, one, false, nil}, {0, toV2, one, toV1, one, true, nil}, {1, toV2, both, toV2, both, false, nil}},
		"for good":                 {{0, toV1, one, toV1, one, false, nil}, {0, toV1, nil, toV1, one, true, nil}, {5, toV1, nil, toV1, nil, false, nil}, {0, toV2, nil, toV1, nil, true, nil}, {5, toV2, nil, toV2, nil, false, nil}},
		"wildcards define, too":    {{0, nil, wild, nil, wild, false, nil}, {0, toV1, wild, toV1, wild, false, nil}, {0, toV1, nil, toV1, wild, true, nil}},
		"a host that is not there": {{0, nil, nil, nil, nil, false, nil}, {0, nowhere, nil, nil, nil, true, nil}, {5, nowhere, nil, nowhere, nil, false, nil}},
		"as it was at the start":   {{0, toV1, nil, toV1, nil, false, nil}},
	} {
		t.Run(name, func(t *testing.T) {
			h := holder{patience: patience}
			now := time.Unix(1000, 0)
			for i, s := range steps {
				now = now.Add(s.after * time.Second)
				snap := world(2, 1)
				snap.Delta = &mesh.Delta{}
				snap.VirtualServices, snap.DestinationRules = without(s.route), without(s.rule)
				got, until := h.apply(snap, now)
				if !slices.Equal(got.VirtualServices, without(s.wantRoute)) || !slices.Equal(got.DestinationRules, append(without(s.wantRule), without(s.wantPast)...)) {
					t.Errorf("step %d: in effect are %v and %v", i, got.VirtualServices, got.DestinationRules)
				}
				if s.waits != !until.IsZero() || s.waits && until.After(now.Add(patience)) {
					t.Errorf("step %d: waits until %v, now is %v", i, until, now)
				}
			}
		})
	}
}

func without[T any](x *T) []*T {
	if x == nil {
		return nil
	}
	return []*T{x}
}

// TestNothingLeadsNowhere changes rules in any order: as long as nobody waits too long, no route in effect leads to a
// subset that no rule in effect defines; and once the patience is over what is in effect is what is said.
func TestNothingLeadsNowhere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		hosts := []string{mesh.LocalHost("svc-00000", "shop"), mesh.LocalHost("svc-00001", "shop")}
		h := holder{patience: patience}
		now := time.Unix(1000, 0)
		snap := world(2, 1)
		h.apply(snap, now)
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			now = now.Add(patience / 13)
			next := *snap
			next.Revision++
			name, host := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "name"), rapid.SampledFrom(hosts).Draw(t, "host")
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				next.VirtualServices = replacedIn(snap.VirtualServices, routeTo(name, host, rapid.SampledFrom([]string{"v1", "v2"}).Draw(t, "subset")), func(x *mesh.VirtualService) string { return x.Object.Name })
			case 1:
				next.DestinationRules = replacedIn(snap.DestinationRules, subsetRule(name, host, rapid.SliceOfDistinct(rapid.SampledFrom([]string{"v1", "v2"}), rapid.ID).Draw(t, "subsets")...), func(x *mesh.DestinationRule) string { return x.Object.Name })
			case 2:
				next.VirtualServices = slices.DeleteFunc(slices.Clone(snap.VirtualServices), func(x *mesh.VirtualService) bool { return x.Object.Name == name })
			case 3:
				next.DestinationRules = slices.DeleteFunc(slices.Clone(snap.DestinationRules), func(x *mesh.DestinationRule) bool { return x.Object.Name == name })
			}
			snap = &next
			got, _ := h.apply(snap, now)
			defined := subsetsIn(got.DestinationRules)
			for _, vs := range got.VirtualServices {
				for x := range subsetsOf(vs) {
					if !defined[x] {
						t.Fatalf("%s leads to %v, which is not defined", vs.Object.Name, x)
					}
				}
			}
			if !slices.IsSortedFunc(got.DestinationRules, func(a, b *mesh.DestinationRule) int { return strings.Compare(a.Object.Name, b.Object.Name) }) {
				t.Fatal("the rules are not sorted")
			}
		}
		got, until := h.apply(snap, now.Add(patience))
		if !until.IsZero() || !slices.Equal(got.VirtualServices, snap.VirtualServices) || !slices.Equal(got.DestinationRules, snap.DestinationRules) {
			t.Fatalf("in the end %v and %v are in effect", got.VirtualServices, got.DestinationRules)
		}
	})
}

func replacedIn[T any](list []*T, x *T, name func(*T) string) []*T {
	out := slices.DeleteFunc(slices.Clone(list), func(y *T) bool { return name(y) == name(x) })
	out = append(out, x)
	slices.SortFunc(out, func(a, b *T) int { return strings.Compare(name(a), name(b)) })
	return out
}
