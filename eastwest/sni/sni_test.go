package sni_test

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
)

func label() *rapid.Generator[string] {
	return rapid.StringMatching(`[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?`)
}

func pods() *rapid.Generator[sni.Pod] {
	return rapid.Custom(func(t *rapid.T) sni.Pod {
		return sni.Pod{
			Workload:  strings.Join(rapid.SliceOfN(label(), 1, 3).Draw(t, "workload"), "."),
			Port:      rapid.Uint32Range(1, 65535).Draw(t, "port"),
			Cluster:   mesh.ClusterID(label().Draw(t, "cluster")),
			Service:   label().Draw(t, "service"),
			Namespace: label().Draw(t, "namespace"),
		}
	})
}

func TestPodNameIsReversible(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := pods().Draw(t, "pod")
		name, err := p.Name()
		if err != nil {
			t.Fatalf("%+v: %v", p, err)
		}
		if got, err := sni.ParsePod(name); err != nil || got != p {
			t.Fatalf("%s reads as %+v, %v; want %+v", name, got, err, p)
		}
		if len(name) > sni.MaxLen || name != strings.ToLower(name) || strings.Contains(name, "_") {
			t.Fatalf("%s is not a plain DNS name", name)
		}
		if !strings.HasSuffix(name, p.Wildcard()[1:]) {
			t.Fatalf("%s is not below %s", name, p.Wildcard())
		}
	})
}

func TestDifferentPodsHaveDifferentNames(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := pods().Draw(t, "a"), pods().Draw(t, "b")
		x, err1 := a.Name()
		y, err2 := b.Name()
		if err1 == nil && err2 == nil && (x == y) != (a == b) {
			t.Fatalf("%+v and %+v are named %s and %s", a, b, x, y)
		}
	})
}

func TestIstioNameIsReversible(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		port := rapid.Uint32Range(1, 65535).Draw(t, "port")
		subset := rapid.OneOf(rapid.Just(""), label()).Draw(t, "subset")
		host := strings.Join(rapid.SliceOfN(label(), 1, 5).Draw(t, "host"), ".")
		name := sni.Istio(port, subset, host)
		p, s, h, err := sni.ParseIstio(name)
		if err != nil || p != port || s != subset || h != host {
			t.Fatalf("%s reads as %d %q %q, %v", name, p, s, h, err)
		}
	})
}

func TestKnownNames(t *testing.T) {
	name, err := sni.Pod{Workload: "reviews-v2-abc", Port: 9080, Cluster: "birch", Service: "reviews", Namespace: "default"}.Name()
	if want := "reviews-v2-abc.p9080.birch.reviews.default.global"; err != nil || name != want {
		t.Errorf("got %s, %v; want %s", name, err, want)
	}
	if got, want := sni.Istio(9080, "v1", "reviews.default.global"), "outbound_.9080_.v1_.reviews.default.global"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	for _, c := range sni.Controls {
		if got, want := c.Name("amber.mesh"), string(c)+".amber.mesh"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestRefusedPods(t *testing.T) {
	good := sni.Pod{Workload: "w", Port: 80, Cluster: "c", Service: "s", Namespace: "n"}
	for what, edit := range map[string]func(*sni.Pod){
		"no port":             func(p *sni.Pod) { p.Port = 0 },
		"port too high":       func(p *sni.Pod) { p.Port = 65536 },
		"no workload":         func(p *sni.Pod) { p.Workload = "" },
		"dot at the end":      func(p *sni.Pod) { p.Workload = "w." },
		"upper case":          func(p *sni.Pod) { p.Workload = "W" },
		"underscore":          func(p *sni.Pod) { p.Workload = "w_1" },
		"dot in the cluster":  func(p *sni.Pod) { p.Cluster = "a.b" },
		"hyphen first":        func(p *sni.Pod) { p.Service = "-s" },
		"no namespace":        func(p *sni.Pod) { p.Namespace = "" },
		"label of 64 octets":  func(p *sni.Pod) { p.Service = strings.Repeat("s", 64) },
		"name over 253":       func(p *sni.Pod) { p.Workload = strings.Repeat("abcdefghi.", 24) + "w" },
		"letter beyond ASCII": func(p *sni.Pod) { p.Service = "sé" },
	} {
		p := good
		edit(&p)
		if name, err := p.Name(); !errors.Is(err, sni.ErrName) {
			t.Errorf("%s: got %q, %v", what, name, err)
		}
	}
}

func TestRefusedNames(t *testing.T) {
	for _, name := range []string{
		"", ".global", "p80.c.s.n.global", "w.p80.c.s.n", "w.p80.c.s.n.global.", "w.p080.c.s.n.global", "w.p0.c.s.n.global",
		"w.p65536.c.s.n.global", "w.p+80.c.s.n.global", "w.80.c.s.n.global", "W.p80.c.s.n.global", "*.p80.c.s.n.global", ".p80.c.s.n.global",
	} {
		if p, err := sni.ParsePod(name); !errors.Is(err, sni.ErrName) {
			t.Errorf("%q reads as pod %+v, %v", name, p, err)
		}
	}
	for _, name := range []string{
		"", "outbound_.80_._.", "outbound_.080_._.h", "outbound_.0_._.h", "outbound_.65536_._.h", "outbound_.+80_._.h", "inbound_.80_._.h",
		"outbound_.80_.v1.h", "outbound_.80_.a_.b_.h", "outbound_.80_._." + strings.Repeat("h", 253),
	} {
		if port, subset, host, err := sni.ParseIstio(name); !errors.Is(err, sni.ErrName) {
			t.Errorf("%q reads as %d %q %q, %v", name, port, subset, host, err)
		}
	}
}

// FuzzParse checks that whatever is read is written back the same.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"w.p80.c.s.n.global", "a.b.p65535.c.s.n.global", "outbound_.9080_.v1_.reviews.default.global",
		"outbound_.80_._.web.shop.svc.cluster.local", "join.birch.mesh", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := sni.ParsePod(s); err == nil {
			if again, err := p.Name(); err != nil || again != s {
				t.Errorf("%q reads as %+v, which is written as %q, %v", s, p, again, err)
			}
		} else if !errors.Is(err, sni.ErrName) {
			t.Errorf("%q: error %v does not wrap ErrName", s, err)
		}
		if port, subset, host, err := sni.ParseIstio(s); err == nil {
			if again := sni.Istio(port, subset, host); again != s {
				t.Errorf("%q is written back as %q", s, again)
			}
		} else if !errors.Is(err, sni.ErrName) {
			t.Errorf("%q: error %v does not wrap ErrName", s, err)
		}
	})
}
