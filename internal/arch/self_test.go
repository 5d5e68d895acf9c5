package arch

import (
	"fmt"
	"go/parser"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// The tests here break the rules on purpose: a rule that cannot fail is none.

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"dns/zone", "dns/zone", true},
		{"dns/zone", "dns/zone/x", false},
		{"discovery/translate/...", "discovery/translate", true},
		{"discovery/translate/...", "discovery/translate/wire", true},
		{"discovery/translate/...", "discovery/translated", false},
		{"...", "anything/at/all", true},
	} {
		if got := matches([]string{c.pattern}, c.path); got != c.want {
			t.Errorf("%s matches %s: %v", c.pattern, c.path, got)
		}
	}
}

// TestBroken runs checks on a made-up repository that breaks them.
func TestBroken(t *testing.T) {
	r := &repo{all: map[string]*pkg{}, fset: token.NewFileSet(), used: map[int]bool{}}
	add := func(path, code string) {
		p := &pkg{ImportPath: ours(path), path: path}
		f, err := parser.ParseFile(r.fset, path+"/file.go", code, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		p.Name = f.Name.Name
		for _, i := range f.Imports {
			p.Imports = append(p.Imports, strings.Trim(i.Path.Value, `"`))
		}
		p.files = []*source{{path: path + "/file.go", lines: 501, File: f}}
		p.GoFiles = []string{"file.go"}
		r.all[p.ImportPath], r.ours = p, append(r.ours, p)
	}
	add("cmd/isthmusd", "package main\nimport (\n_ \""+ours("discovery/store")+"\"\n_ \""+ours("e2e/lab")+"\"\n)")
	add("discovery/store", "package store\nimport _ \""+ours("discovery/xds")+"\"")
	add("discovery/xds", "package xds\nimport _ \"go.etcd.io/bbolt\"\nfunc Serve() { panic(1) } // TODO")
	add("discovery/mesh", "package mesh\nimport (\n\"os\"\n\"time\"\n_ \""+ours("internal/diag")+"\"\n)\nfunc f() { go f(); _, _ = os.Args, time.Now() }")
	add("e2e/lab", "package lab")
	add("new/util", "package util")

	for check, want := range map[string][]string{
		"imports": {
			"cmd/isthmusd imports e2e/lab: of ours it may import only",
			"cmd/isthmusd -> e2e/lab",
			"discovery/store imports discovery/xds: of ours",
			"cmd/isthmusd -> discovery/store -> discovery/xds",
			"discovery/xds imports go.etcd.io/bbolt: of other modules",
			"discovery/mesh imports internal/diag: it may import nothing of ours",
			"new/util: no rule says what it may import",
		},
		"homes":    {"discovery/xds imports go.etcd.io/bbolt: only federation/ledger may", "cmd/isthmusd -> discovery/store -> discovery/xds -> go.etcd.io/bbolt"},
		"reach":    {"cmd/isthmusd reaches " + ours("e2e/lab") + ": a program contains no test code"},
		"pure":     {"discovery/mesh is pure, so it may not import os", "starts no goroutine", "may not use time.Now"},
		"sizes":    {"discovery/mesh/file.go has 501 lines", "new/util: the name says nothing"},
		"docs":     {"discovery/xds/file.go:3: Serve has no comment", "discovery/mesh: no comment says"},
		"calls":    {"discovery/xds/file.go:3: only main ends the process"},
		"comments": {"discovery/xds/file.go:3: TODO: do it or open an issue"},
	} {
		got := &recorder{}
		r.checks()[check](got)
		all := strings.Join(got.errors, "\n")
		for _, w := range want {
			if !strings.Contains(all, w) {
				t.Errorf("%s did not say %q but\n%s", check, w, all)
			}
		}
	}
}

// recorder takes the place of a test.
type recorder struct{ errors []string }

func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

// TestMetricReader reads metrics in all the ways the code makes them, and finds what is wrong with some.
func TestMetricReader(t *testing.T) {
	const code = `package relay
import "github.com/prometheus/client_golang/prometheus"
const open = "open"
func make(reg R) {
	opts := func(name, help string) prometheus.Opts { return prometheus.Opts{Namespace: "isthmus", Subsystem: "relay", Name: name, Help: help} }
	counter := func(name, help string) prometheus.CounterOpts { return prometheus.CounterOpts(opts(name, help)) }
	f.NewCounterVec(counter("bytes", "Octets" + " passed."), []string{"direction", "host"})
	f.NewGauge(prometheus.GaugeOpts(opts(open + "_total", "Open now")))
	f.NewHistogram(prometheus.HistogramOpts{Namespace: "isthmus", Subsystem: "gateway", Name: "dialMs", Help: "Time."})
	f.NewGauge(prometheus.GaugeOpts{Namespace: "isthmus", Subsystem: "relay", Name: names[0]})
}`
	r := &repo{fset: token.NewFileSet(), used: map[int]bool{}}
	f, err := parser.ParseFile(r.fset, "relay.go", code, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	files := []*source{{path: "relay.go", File: f}}
	p := &pkg{path: "eastwest/relay", Name: "relay", files: files}
	got := &recorder{}
	reader := &metricReader{complain: got.Errorf, r: r, p: p, makers: map[string]maker{}, constants: constantsOf(files), seen: map[token.Pos]bool{}}
	reader.read(files)
	for _, m := range reader.found {
		got.errors = append(got.errors, m.lint()...)
	}
	slices.Sort(got.errors)
	want := []string{
		"relay.go:10: the name and help of this metric cannot be read: write them as literals or as arguments of a function",
		"relay.go:7: counter bytes: its name ends in _total",
		"relay.go:7: counter bytes: label host grows with users' objects",
		"relay.go:8: gauge open_total: it is no counter, so its name does not end in _total",
		"relay.go:8: gauge open_total: its help is a sentence with a full stop",
		"relay.go:9: histogram dialMs: its name ends in its unit, _seconds or _bytes",
		"relay.go:9: histogram dialMs: write it in snake_case",
		"relay.go:9: metrics of eastwest/relay are named isthmus_relay_..., not isthmus_gateway_...",
	}
	if !slices.Equal(got.errors, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got.errors, "\n"), strings.Join(want, "\n"))
	}
}
